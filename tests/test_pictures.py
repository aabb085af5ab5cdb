"""Folders of PNGs that fill batch by batch: what they hold, and that two sets never mix in one."""

# ruff: noqa: F401, F811  (fixtures are imported)

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from store_setup import StandIn, begin, files, levels, manifest
from test_cli import Run, checkpoint, classes, drawn, run

from ddpm_fast.cli import sample as cli_sample
from ddpm_fast.data import load_data
from ddpm_fast.evaluation.image_stream import open_stream
from ddpm_fast.store import SampleStore, StoreError
from ddpm_fast.store.export import export
from ddpm_fast.store.pictures import PictureFolder, draw_pictures
from ddpm_fast.store.workers import fill


def pixels(folder: Path) -> dict[int, np.ndarray]:
    return {int(p.stem): np.asarray(Image.open(p)) for p in folder.glob("*.png")}


def same(folder: Path, ids: range, seed: int = 3) -> bool:
    found = pixels(folder)
    return set(found) == set(ids) and all(np.array_equal(found[i], levels(seed, i)) for i in ids)


def start(folder: Path, **changes: Any) -> PictureFolder:
    return PictureFolder.begin(folder, manifest(**changes))[0]


def test_each_batch_is_written_as_it_ends(tmp_path: Path):
    sampler, seen = StandIn(batch_size=4), []
    folder = start(tmp_path / "a")
    for first in (0, 4, 8):
        sampler.at_shard[first] = lambda: seen.append(sorted(pixels(tmp_path / "a")))
    assert draw_pictures(folder, sampler, range(10)) == 10
    assert seen == [[], list(range(4)), list(range(8))] and same(tmp_path / "a", range(10))


def test_the_same_set_longer_shorter_or_elsewhere_goes_on(tmp_path: Path):
    """An image is a function of its id, so a folder may grow; only batches that lack something are drawn."""
    for ids, n, drawn_ids in (
        (range(10), 10, list(range(10))),
        (range(6), 6, []),
        (range(22), 22, list(range(8, 22))),
        (range(30, 33), 3, [30, 31, 32]),
    ):
        sampler = StandIn(batch_size=4)
        folder = start(tmp_path / "a", n=n, first_id=ids.start, shard_size=2, sampler__batch_size=5, threads=7)
        draw_pictures(folder, sampler, ids)
        assert sampler.drawn == drawn_ids
    assert same(tmp_path / "a", range(22)) is False and set(pixels(tmp_path / "a")) == {*range(22), 30, 31, 32}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 4}, "seed: was 3, now 4"),
        ({"model__fingerprint": "e" * 64}, "model.fingerprint: was"),
        ({"sampler__steps": 5, "sampler__table": "u" * 64}, "sampler.steps: was null, now 5"),
        ({"sampler__to_uint8": "truncate"}, 'sampler.to_uint8: was "round", now "truncate"'),
        ({"labels": {"rule": 1, "classes": 2}}, "labels: was null, now {"),
        ({"n": 10**6 + 1}, "digits: was 6, now 7"),
    ],
)
def test_another_set_is_refused(changes: dict[str, Any], named: str, tmp_path: Path):
    draw_pictures(start(tmp_path / "a"), StandIn(), range(4))
    before = files(tmp_path)
    with pytest.raises(StoreError, match="holds PNGs of a set that was begun with other options: ") as caught:
        start(tmp_path / "a", **{"shard_size": 40, **changes})
    assert named in str(caught.value) and str(caught.value).endswith("Set them back, or name another folder")
    assert files(tmp_path) == before


def test_another_version_s_set_is_named_as_such(tmp_path: Path):
    start(tmp_path)
    path = tmp_path / "set.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(StoreError, match=r"set\.json has format 0; this version reads 1"):
        start(tmp_path)


@pytest.mark.parametrize("name", ["cat.png", "cat.JPG", "000000.png"])
def test_pictures_of_unknown_origin_are_refused(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(StoreError, match=rf"holds pictures \({name}\) and no set.json .*; name a new or an empty"):
        start(tmp_path)
    assert os.listdir(tmp_path) == [name]


def test_other_files_are_no_obstacle_and_a_set_of_shards_is(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    draw_pictures(start(tmp_path), StandIn(), range(4))
    begin(tmp_path / "set")
    with pytest.raises(StoreError, match=r"holds a set of shards \(manifest.json\); name another folder for PNGs"):
        start(tmp_path / "set")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "DIGITS"])
def test_a_damaged_set_json_costs_one_line(content: str, tmp_path: Path):
    start(tmp_path / "a")
    path = tmp_path / "a" / "set.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digits": 10**9}) if content == "DIGITS" else content)
    with pytest.raises(StoreError, match=r"set.json does not say what the PNGs beside it are: .*; name another") as e:
        start(tmp_path / "a")
    assert "\n" not in str(e.value)


def test_readers_of_folders_see_images_alone(tmp_path: Path):
    """set.json and labels.csv are no images: not for ours, nor for tools that take *.png or known suffixes."""
    draw_pictures(start(tmp_path / "a", labels={"rule": "all", "classes": 3}), StandIn(), range(5))
    assert len(load_data(str(tmp_path / "a"))) == 5
    stream = open_stream(tmp_path / "a")
    assert stream.count == 5
    assert np.array_equal(next(stream.batches(5)), np.stack([levels(3, i, i % 3) for i in range(5)]))


def test_labels_are_listed_of_all_that_are_there(tmp_path: Path):
    for ids in (range(3), range(7, 9)):
        folder = start(tmp_path / "a", n=len(ids), first_id=ids.start, labels={"rule": "all", "classes": 3})
        draw_pictures(folder, StandIn(), ids)
    lines = (tmp_path / "a" / "labels.csv").read_text().splitlines()
    assert lines == ["file,label", *(f"{i:06d}.png,{i % 3}" for i in (0, 1, 2, 7, 8))]


def test_an_export_is_of_the_same_folder_and_never_mixes(tmp_path: Path):
    for seed in (3, 4):
        fill(begin(tmp_path / f"set{seed}", n=6, seed=seed), StandIn())
    store3, store4 = (begin(tmp_path / f"set{seed}", n=6, seed=seed) for seed in (3, 4))
    export(store3, tmp_path / "pngs")
    before = files(tmp_path / "pngs")
    with pytest.raises(StoreError, match="seed: was 3, now 4"):
        export(store4, tmp_path / "pngs")
    assert files(tmp_path / "pngs") == before
    draw_pictures(start(tmp_path / "pngs"), sampler := StandIn(), range(8))
    assert sampler.drawn == [4, 5, 6, 7] and same(tmp_path / "pngs", range(8))
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "cat.png").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"holds pictures \(cat.png\)"):
        export(store3, tmp_path / "cats")


def test_a_full_disk_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, write, count = start(tmp_path / "a"), Path.write_bytes, 0

    def full(path: Path, content: bytes) -> int:
        nonlocal count
        count += 1
        if count == 7:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError) as caught:
        draw_pictures(folder, StandIn(), range(8))
    assert str(caught.value) == (
        f"no space is left for {tmp_path / 'a'}; make room; 6 images are finished and kept; "
        "the same command goes on from there"
    )
    draw_pictures(start(tmp_path / "a"), sampler := StandIn(), range(8))
    assert sampler.drawn == [4, 5, 6, 7] and same(tmp_path / "a", range(8))
    assert not [p for p in (tmp_path / "a").iterdir() if p.name.startswith(".")]


def test_an_empty_file_is_no_image(tmp_path: Path):
    """After a power failure a name may be there without its content."""
    draw_pictures(start(tmp_path / "a"), StandIn(), range(8))
    (tmp_path / "a" / "000005.png").write_bytes(b"")
    draw_pictures(start(tmp_path / "a"), sampler := StandIn(), range(8))
    assert sampler.drawn == [4, 5, 6, 7] and same(tmp_path / "a", range(8))


# --- by the command ---


def test_the_command_never_mixes(run: Run, checkpoint: Path, tmp_path: Path):
    words = ("sample", checkpoint, "--batch-size", 2, "--out", "pngs")
    assert run(*words, "-n", 5)[0] == 0
    before = files(tmp_path)
    for more, named in (
        (("--seed", 7, "-n", 2), "seed: was 0, now 7"),
        (("--steps", 5), "sampler.steps: was null, now 5"),
        (("--dtype", "bfloat16"), 'sampler.dtype: was "float32", now "bfloat16"'),
        (("--set", "variance_type=fixed_large"), "schedule.variance_type: was"),
        (("--truncate",), "sampler.to_uint8: was"),
    ):
        code, out, err = run(*words, *more)
        assert (code, out) == (2, "") and err.count("\n") == 1 and named in err
        assert err.startswith("ddpm-fast: pngs holds PNGs of a set that was begun with other options: ")
    for option in (("--store",), ("--shard-size", 2), ("--verify",)):
        code, _, err = run(*words, *option)
        assert code == 2 and f"{option[0]} needs a folder of shards; pngs holds PNGs of a set: name another" in err
    assert files(tmp_path) == before
    assert run(*words, "-n", 2)[1] == "2 images in pngs, beside 3 others of the same set\n"
    assert files(tmp_path) == before
    assert run(*words, "-n", 7, "--first-id", 0)[1] == "7 images in pngs\n"
    assert sorted(pixels(tmp_path / "pngs")) == list(range(7))
    assert np.array_equal(
        np.stack([pixels(tmp_path / "pngs")[i] for i in range(7)]), drawn(checkpoint, 7, batch_size=2)
    )


def test_pngs_that_were_begun_stay_pngs(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever their number: the folder says what it is."""
    monkeypatch.setattr(cli_sample, "MOST_PICTURES", 2)
    words = ("sample", checkpoint, "--steps", 2, "--batch-size", 2, "--out", "a")
    assert run(*words, "-n", 2)[0] == 0
    assert run(*words, "-n", 3)[1] == "3 images in a\n" and sorted(pixels(tmp_path / "a")) == [0, 1, 2]


def test_a_set_does_not_grow_and_the_command_for_more_is_said(run: Run, checkpoint: Path, tmp_path: Path):
    words = ("sample", checkpoint, "--steps", 2, "--batch-size", 2, "--store")
    assert run(*words, "-n4", "--first-id=3", "--out", "my set")[0] == 0
    code, _, err = run(*words, "-n", 10, "--first-id=3", "--out", "my set")
    command = f"ddpm-fast sample {checkpoint} --steps 2 --batch-size 2 --store -n 6 --first-id 7 --out 'my set-7'\n"
    assert code == 2 and err.startswith("ddpm-fast: my set holds a set of 4 images, and a set does not grow: ")
    assert err.endswith(f": {command}")
    import shlex

    assert run(*shlex.split(command)[1:])[0] == 0
    parts = [np.load(p) for name in ("my set", "my set-7") for p in sorted((tmp_path / name / "images").iterdir())]
    one = drawn(checkpoint, 10, first_id=3, batch_size=2, steps=2)
    assert np.array_equal(np.concatenate(parts), one)


@pytest.mark.parametrize("out", ["a.npz", "a.png"])
def test_a_file_that_cannot_be_written_at_the_end_keeps_its_images(
    out: str, run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import ddpm_fast.images
    import ddpm_fast.store.export as store_export

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", out)

    words = ("sample", checkpoint, "-n", 4, "--batch-size", 2, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(store_export, "_npz", full)
        patch.setattr(ddpm_fast.images, "save_picture", full)
        code, _, err = run(*words)
    said = err.splitlines()[-1]
    assert code == 2 and said == (
        f"ddpm-fast: {out} cannot be written (No space left on device); its 4 images are kept in {out}.parts; "
        "the same command writes it without drawing them again"
    )
    monkeypatch.setattr("ddpm_fast.sampler.Sampler.sample", None)  # nothing is drawn
    assert run(*words)[:2] == (0, f"4 images in {out}\n")
    assert os.listdir(tmp_path) == [out]


@pytest.mark.parametrize("out", ["pngs", "a.npz", "a.tar"])
def test_an_interrupted_export_says_what_is_there(out: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = begin(tmp_path / "set", n=8)
    fill(store, StandIn())
    load = SampleStore.load

    def stop(self: SampleStore, shard: int) -> Any:
        if shard == 1:
            raise KeyboardInterrupt
        return load(self, shard)

    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SampleStore, "load", stop)
        code, _, err = run("export", "set", out)
    said = {"pngs": "4 images are in pngs; the same command goes on"}
    other = f"{out} is not written; set is as it was, and the same command begins again"
    assert code == 130 and err.splitlines()[-1] == f"ddpm-fast: interrupted; {said.get(out, other)}"
    if out == "pngs":
        assert sorted(pixels(tmp_path / "pngs")) == [0, 1, 2, 3]
    else:
        assert files(tmp_path) == before
    assert run("export", "set", out)[0] == 0


def test_an_interruption_before_the_first_batch_leaves_no_image(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_fast.sampler.Sampler.sample", stop)
    code, _, err = run("sample", checkpoint, "-n", 4, "--out", "pngs")
    last = "ddpm-fast: interrupted; 0 of 4 images are finished and kept in pngs; the same command goes on"
    assert code == 130 and err.splitlines()[-1] == last
    code, _, err = run("sample", checkpoint, "-n", 4, "--out", "a.npz")
    assert code == 130 and err.splitlines()[-1] == "ddpm-fast: interrupted; nothing half-written is left"
    assert set(files(tmp_path)) == {"pngs/set.json"}
