"""``ddpm-fast sample`` into a folder, and ``export``: which folder is what, and what the words mean."""

# ruff: noqa: F401, F811  (fixtures are imported)

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from store_setup import files
from test_cli import Run, checkpoint, classes, drawn, run

import ddpm_fast as df
from ddpm_fast.cli import sample as cli_sample
from ddpm_fast.store import SampleStore
from ddpm_fast.store import manifest as store_manifest


def stored(folder: Path) -> np.ndarray:
    """All images of a set [n, H, W, C]."""
    return np.concatenate([np.load(p) for p in sorted((folder / "images").iterdir())])


def test_a_set_and_its_exports(run: Run, checkpoint: Path, tmp_path: Path):
    words = ("sample", checkpoint, "-n", 7, "--seed", 3, "--batch-size", 2, "--shard-size", 3, "--out", "set")
    code, out, err = run(*words)
    assert (code, out) == (0, "7 images in set: 3 shards, all finished\n") and "7/7" in err
    expected = np.concatenate(
        [drawn(checkpoint, n, seed=3, first_id=i, batch_size=2) for i, n in ((0, 3), (3, 3), (6, 1))]
    )
    assert np.array_equal(stored(tmp_path / "set"), expected)
    before = files(tmp_path / "set")
    assert run(*words)[:2] == (0, out)  # nothing left to do
    assert files(tmp_path / "set") == before
    assert run("export", "set", "a.npz")[:2] == (0, "7 images of set in a.npz\n")
    assert np.array_equal(np.load(tmp_path / "a.npz")["arr_0"], expected)
    assert run("export", "set", "pngs")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "pngs" / "000006.png")), expected[6])


def test_a_folder_is_of_shards_or_of_pngs_by_a_stated_rule(
    run: Run,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(cli_sample, "MOST_PICTURES", 2)
    base = ("sample", checkpoint, "--steps", 2, "--batch-size", 3)
    for n, words, is_set in ((2, (), False), (3, (), True), (3, ("--pngs",), False), (1, ("--store",), True)):
        assert run(*base, "-n", n, "--out", f"out{n}{len(words)}", *words)[0] == 0
        found = set(files(tmp_path / f"out{n}{len(words)}"))
        assert ("manifest.json" in found) == is_set and ("000000.png" in found) != is_set
    assert run(*base, "-n", 1, "--out", "out11")[0] == 0  # one that was begun goes on without being told
    assert "000000.png" not in files(tmp_path / "out11")


def test_the_same_command_again_goes_on_with_what_the_set_chose(
    run: Run,
    checkpoint: Path,
    tmp_path: Path,
):
    """Threads, shard size, batch and operations are the set's where they are left to the machine."""
    words = ("sample", checkpoint, "-n", 5, "--steps", 2, "--store", "--out", "set", "--batch-size", "auto")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert run(*words)[0] == 0
        content = files(tmp_path / "set")
        manifest = json.loads(content["manifest.json"])
        assert manifest["threads"] == 1 and manifest["sampler"]["batch_size"] >= 1
        (tmp_path / "set/checksums/000000.sha256").unlink()
        torch.set_num_threads(2)
        code, _, err = run(*words)
        assert code == 0, err
        assert torch.get_num_threads() == 1 and files(tmp_path / "set") == content
    finally:
        torch.set_num_threads(before)


def test_labels_of_a_set(run: Run, classes: Path, tmp_path: Path):
    base = ("sample", classes, "-n", 5, "--batch-size", 5, "--first-id", 2)
    assert run(*base, "--label", "all", "--store", "--out", "set")[0] == 0
    expected = drawn(classes, 5, labels=[2, 0, 1, 2, 0], first_id=2, batch_size=5)
    assert np.array_equal(stored(tmp_path / "set"), expected)
    assert np.load(tmp_path / "set/labels/000000.npy").tolist() == [2, 0, 1, 2, 0]
    assert run(*base, "--label", "all", "--out", "a.npz")[0] == 0
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_1"].tolist() == [2, 0, 1, 2, 0] and np.array_equal(file["arr_0"], expected)
    # Under guidance the last class stands for none, so there are two.
    assert run(*base, "--label", "all", "--guidance-scale", 1.5, "--store", "--out", "guided")[0] == 0
    assert np.load(tmp_path / "guided/labels/000000.npy").tolist() == [0, 1, 0, 1, 0]
    guided = drawn(classes, 5, labels=[0, 1, 0, 1, 0], first_id=2, batch_size=5, guidance_scale=1.5)
    assert np.array_equal(stored(tmp_path / "guided"), guided)


@pytest.mark.parametrize(
    "words, options",
    [
        (("--steps", "2,3"), {"steps": "2,3"}),
        (("--steps", "ddim5"), {"steps": "ddim5"}),
        (("--steps", "5"), {"steps": 5}),
        (("--method", "ddim", "--eta", "0.5"), {"method": "ddim", "eta": 0.5}),
        (("--ops", "reference"), {"ops": "reference"}),
        (("--graph", "none"), {"graph": "none"}),
    ],
)
def test_words_of_the_sampler(
    words: tuple[str, ...], options: dict[str, Any], run: Run, checkpoint: Path, tmp_path: Path
):
    assert run("sample", checkpoint, "-n", 2, "--batch-size", 2, "--store", "--out", "set", *words)[0] == 0
    assert np.array_equal(stored(tmp_path / "set"), drawn(checkpoint, 2, batch_size=2, **options))
    if options.get("steps"):
        assert not np.array_equal(stored(tmp_path / "set"), drawn(checkpoint, 2, batch_size=2))


def test_truncated_levels(run: Run, checkpoint: Path, tmp_path: Path):
    loaded = df.load(checkpoint)
    x = df.Sampler(loaded.model, loaded.schedule, batch_size=3).sample(3)
    for name, words in (("a.npz", ()), ("set", ("--store",))):
        assert run("sample", checkpoint, "-n", 3, "--truncate", "--out", name, *words)[0] == 0
    expected = np.floor(np.clip((x.double().numpy() + 1) * 127.5, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)
    for got in (np.load(tmp_path / "a.npz")["arr_0"], stored(tmp_path / "set")):
        assert np.abs(got.astype(int) - expected).max() <= 1 and (got == expected).mean() > 0.999
        assert (got != df.to_uint8(x).numpy()).mean() > 0.3


def test_damage_is_said_and_mended(run: Run, checkpoint: Path, tmp_path: Path):
    words = ("sample", checkpoint, "-n", 6, "--shard-size", 2, "--steps", 2, "--out", "set")
    assert run(*words)[0] == 0
    content = files(tmp_path / "set")
    path = tmp_path / "set/images/000001.npy"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(content["images/000001.npy"][:-1] + b"\x00")
    os.utime(path, ns=(stamp, stamp))
    code, _, err = run("export", "set", "a.npz")
    assert code == 2 and "shard 1 of set is damaged (set/images/000001.npy)" in err and "with --verify" in err
    code, _, err = run(*words, "--verify")
    assert code == 0 and "ddpm-fast: damaged shards of set are drawn again: 1\n" in err, err
    assert files(tmp_path / "set") == content


def test_what_changed_on_the_machine_is_a_warning(
    run: Run,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    words = ("sample", checkpoint, "-n", 1, "--store", "--steps", 2, "--out", "set")
    assert run(*words)[0] == 0
    monkeypatch.setattr(store_manifest, "__version__", "9.9")
    code, _, err = run(*words)
    assert (
        code == 0 and "ddpm-fast: warning: since set was begun this changed: ddpm_fast: was" in err and '"9.9"' in err
    ), err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--seed", 1), "set holds a set that was begun with other options: seed: was 0, now 1. Set them back"),
        (("-n", 3), "n: was 2, now 3"),
        (("--steps", 4, "--dtype", "bfloat16"), "sampler.steps: was 2, now 4"),
        (("--batch-size", 1), "sampler.batch_size: was 2, now 1"),
        (("--pngs",), "set holds a set of shards: name another folder, or ddpm-fast export set FOLDER for PNGs"),
        (("--film", "a.gif"), "--film goes with a .png, an .npz or PNGs"),
        (("--label", 1), "this model has no classes, so it takes no labels"),
        (("--label", "all"), "--label all needs a model with classes"),
        (("--label", "cat"), "--label must be a whole number or all; got 'cat'"),
        (("--batch-size", "many"), "--batch-size must be a whole number or auto; got 'many'"),
        (("--shard-size", 0), "--shard-size must be at least 1; got 0"),
        (("--shard-size", 4, "--out", "a.npz"), "--shard-size needs --out to be a folder of shards; got a.npz"),
        (("--store", "--out", "a.png"), "--store needs --out to be a folder of shards; got a.png"),
        (("--verify", "--pngs"), "--verify needs --out to be a folder of shards; got --pngs"),
        (("--steps", "fast"), "steps as text must be like"),
        (("--ops", "magic"), "ops must be"),
    ],
)
def test_a_mistake_with_a_set_costs_one_line(
    words: tuple[object, ...], message: str, run: Run, checkpoint: Path, tmp_path: Path
):
    base = ("sample", checkpoint, "-n", 2, "--steps", 2, "--out", "set")
    assert run(*base, "--store")[0] == 0
    before = files(tmp_path)
    code, out, err = run(*base, *words)
    assert (code, out) == (2, "") and err.startswith("ddpm-fast: ") and err.count("\n") == 1
    assert message in err and files(tmp_path) == before


def test_torchrun_s_workers_need_a_folder(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("sample", checkpoint, "--out", "a.npz")
    assert code == 2 and "torchrun with 2 workers needs --out to be a folder of shards; got a.npz" in err


@pytest.mark.parametrize(
    "words, message", [(("nowhere", "a.npz"), "nowhere holds no sample store"), ((".", "a"), "holds no")]
)
def test_an_export_of_nothing(words: tuple[str, str], message: str, run: Run):
    code, _, err = run("export", *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_the_library_reads_a_set(run: Run, checkpoint: Path, tmp_path: Path):
    assert run("sample", checkpoint, "-n", 5, "--shard-size", 2, "--steps", 2, "--out", "set")[0] == 0
    store = SampleStore.open(tmp_path / "set")
    assert store.count == 5 and store.manifest["n"] == 5 and [len(part) for part in store.shards()] == [2, 2, 1]
