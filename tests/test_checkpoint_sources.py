"""Where checkpoints come from: folders of accelerate and of training scripts, DDUF files, places on the hub."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folder import as_bin, refused, sound_folder, tiny
from safetensors.torch import save_file
from test_checkpoints_diffusers import TINY, assert_same, pipeline, run, theirs

from ddpm_fast import cli
from ddpm_fast.checkpoints import Checkpoint, CheckpointError, convert, load
from ddpm_fast.checkpoints.sources import HubPlace, hub_place

RAW, AVERAGED = theirs(TINY, 1), theirs(TINY, 2)


def is_of(checkpoint: Checkpoint, model: Any) -> None:
    assert_same(run(checkpoint.model, TINY), run(model, TINY))


# --- folders ---


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_the_names_that_accelerate_gives(kind: str, tmp_path: Path) -> None:
    """save_model and save_state write model.safetensors or pytorch_model.bin, or an index of its shards."""
    state = {name: t.contiguous() for name, t in RAW.state_dict().items()}
    stem, end = ("model", ".safetensors") if "safetensors" in kind else ("pytorch_model", ".bin")
    write = save_file if end == ".safetensors" else torch.save
    RAW.save_config(tmp_path)
    torch.save({"random_state": 3}, tmp_path / "random_states_0.pkl")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.bin")
    if "sharded" not in kind:
        write(state, tmp_path / f"{stem}{end}")
    else:
        names, weight_map = sorted(state), {}
        for i, part in enumerate((names[:20], names[20:])):
            file = f"{stem}-0000{i + 1}-of-00002{end}"
            write({n: state[n] for n in part}, tmp_path / file)
            weight_map |= dict.fromkeys(part, file)
        (tmp_path / f"{stem}{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    is_of(load(tmp_path), RAW)


def test_diffusers_own_name_goes_before_accelerate_s(tmp_path: Path) -> None:
    AVERAGED.save_pretrained(tmp_path, variant="fp16")
    save_file(dict(RAW.state_dict()), tmp_path / "model.safetensors")
    is_of(load(tmp_path), AVERAGED)


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    save_file({"embeddings.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path, r"config\.json is of a model of transformers \(bert\), no diffusion model")


def test_a_training_checkpoint_and_its_two_networks(tmp_path: Path) -> None:
    """As diffusers' training script leaves them: the averaged one, or the one that is asked for."""
    for name, model in (("unet", RAW), ("unet_ema", AVERAGED)):
        model.save_pretrained(tmp_path / "checkpoint-200" / name)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "checkpoint-200/optimizer.bin")
    for source in (tmp_path, tmp_path / "checkpoint-200"):
        checkpoint = load(source)
        is_of(checkpoint, AVERAGED)
        assert any("the averaged weights, unet_ema, are used (--weights unet" in note for note in checkpoint.notes)
        chosen = load(source, weights="unet")
        is_of(chosen, RAW)
        assert any("unet is used, as asked" in note for note in chosen.notes)
        is_of(load(source, weights="unet_ema"), AVERAGED)
        with pytest.raises(CheckpointError, match="has no weights 'ema'; it has unet_ema, unet"):
            load(source, weights="ema")


def test_a_training_checkpoint_that_accelerate_wrote(tmp_path: Path) -> None:
    RAW.save_config(tmp_path / "checkpoint-20")
    save_file(dict(RAW.state_dict()), tmp_path / "checkpoint-20/model.safetensors")
    is_of(load(tmp_path), RAW)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("__0_0.distcp", r"python -m torch\.distributed\.checkpoint\.format_utils dcp_to_torch"),
        ("zero_to_fp32.py", "a checkpoint of DeepSpeed"),
        ("diffusion_flax_model.msgpack", r"its diffusion_flax_model\.msgpack is weights of Flax"),
        ("model.ckpt-7.index", "is a TensorFlow checkpoint"),
        ("model.onnx", "is an ONNX model"),
    ],
)
def test_folders_of_other_software(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"some bytes")
    refused(tmp_path, message)


def test_the_command_line_takes_the_choice(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Every command with a SOURCE: what is chosen, and one line for a name that is not there."""
    source = sound_folder(tmp_path)
    raw = {n: t + 1e-3 for n, t in tiny().state_dict().items()}
    as_bin(source, {"net": raw, "ema": tiny().state_dict()})

    def ran(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, out, _ = ran("inspect", source, "--json", "--weights", "net")
    assert code == 0 and any("net is used, as asked" in note for note in json.loads(out)["notes"])
    assert ran("convert", source, tmp_path / "out", "--weights", "net")[0] == 0
    assert all(torch.equal(t, raw[n]) for n, t in load(tmp_path / "out").model.state_dict().items())
    commands: tuple[tuple[object, ...], ...] = (
        ("sample", source),
        ("inspect", source),
        ("verify", source),
        ("plan", source),
        ("bench", source, "--providers", "reference"),
        ("profile", source),
        ("convert", source, tmp_path / "other"),
    )
    for words in commands:
        code, _, err = ran(*words, "--weights", "swa")
        last = err.splitlines()[-1]
        assert code == 2 and last.endswith("has no weights 'swa'; it has net, ema"), (words, err)
    code, _, err = ran("plan", "tiny", "--weights", "ema")
    assert code == 2 and "--weights is for files with several networks; leave it out here" in err


def test_convert_takes_the_choice(tmp_path: Path) -> None:
    RAW.save_config(tmp_path)
    torch.save({"net": RAW.state_dict(), "ema": AVERAGED.state_dict()}, tmp_path / "file.pt")
    convert(tmp_path / "file.pt", tmp_path / "raw", weights="net")
    convert(tmp_path / "file.pt", tmp_path / "averaged")
    is_of(load(tmp_path / "raw"), RAW)
    is_of(load(tmp_path / "averaged"), AVERAGED)


# --- DDUF ---


def dduf(tmp_path: Path, **kwargs: Any) -> Path:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import export_folder_as_dduf

    pipeline().save_pretrained(tmp_path / "folder", **kwargs)
    export_folder_as_dduf(tmp_path / "model.dduf", folder_path=tmp_path / "folder")
    return tmp_path / "model.dduf"


def test_a_dduf_file(tmp_path: Path) -> None:
    """As huggingface_hub writes it: the same model and schedule as the folder's."""
    path = dduf(tmp_path)
    checkpoint = load(path)
    is_of(checkpoint, pipeline().unet)
    folder = load(tmp_path / "folder")
    assert checkpoint.schedule == folder.schedule and checkpoint.notes == folder.notes
    assert checkpoint.source == str(path)


def test_damaged_dduf_files(tmp_path: Path) -> None:
    path = dduf(tmp_path)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    refused(path, r"model\.dduf is damaged or truncated")
    at = data.find(b'"block_out_channels"')
    data[at + 2] ^= 1
    path.write_bytes(data)
    refused(path, r"model\.dduf is damaged or truncated: BadZipFile: Bad CRC-32 for file 'unet/config\.json'")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused(path, r"is no DDUF file: it has no model_index\.json; it has readme\.txt")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model_index.json", b"{}")
    refused(path, "is no DDUF file: its members are too many, or compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model_index.json", b"{}")
        archive.writestr("unet/config.json", b"{")
    assert "model.dduf/unet" in refused(path, "has no weights")


def test_members_of_a_dduf_file_cannot_lead_elsewhere(tmp_path: Path) -> None:
    path, outside = tmp_path / "model.dduf", tmp_path / "outside.safetensors"
    names = ["unet/../../outside.safetensors", "/outside.safetensors", "unet/diffusion_pytorch_model.\\..\\x"]
    names += ["unet/diffusion_pytorch_model./../../outside.safetensors"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model_index.json", b"{}")
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), b"x")
    refused(path, "has no weights")
    assert not outside.exists() and not list(tmp_path.parent.glob("outside*"))


def test_a_zip_of_a_folder(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "folder")
    shutil.make_archive(str(tmp_path / "model"), "zip", tmp_path / "folder")
    refused(tmp_path / "model.zip", "is a zip of a folder of diffusers; unpack it")


# --- the hub ---

PLACES = {
    "org/name": ("org/name", None, ""),
    "org/name@v1": ("org/name", "v1", ""),
    "org/name@refs/pr/1": ("org/name", "refs/pr/1", ""),
    "org/name@feature/x": ("org/name", "feature/x", ""),
    "org/name/unet": ("org/name", None, "unet"),
    "org/name/checkpoint-20/unet_ema@v1": ("org/name", "v1", "checkpoint-20/unet_ema"),
    "hf://org/name": ("org/name", None, ""),
    "hf://org/name@v1/unet": ("org/name", "v1", "unet"),
    "hf://org/name@refs%2Fpr%2F1/unet": ("org/name", "refs/pr/1", "unet"),
    "hf://org/name/unet": ("org/name", None, "unet"),
    "hf://models/org/name": ("org/name", None, ""),
    "https://huggingface.co/org/name": ("org/name", None, ""),
    "huggingface.co/org/name/tree/v1/unet": ("org/name", "v1", "unet"),
    "https://huggingface.co/org/name/": ("org/name", None, ""),
    "https://huggingface.co/org/name/tree/main": ("org/name", None, ""),
    "https://huggingface.co/org/name/tree/main/unet": ("org/name", None, "unet"),
    "http://hf.co/org/name/tree/v1/a/b?x=1#y": ("org/name", "v1", "a/b"),
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F1/unet": ("org/name", "refs/pr/1", "unet"),
    "https://huggingface.co/org/name/tree/refs/pr/1": ("org/name", "refs/pr/1", ""),
    "https://huggingface.co/org/name/blob/main/unet/ema.pt": ("org/name", None, "unet/ema.pt"),
    "https://huggingface.co/org/name/resolve/v1/model.safetensors?download=true": (
        "org/name",
        "v1",
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("text", PLACES)
def test_places_on_the_hub(text: str) -> None:
    place = hub_place(text)
    assert place == HubPlace(*PLACES[text])


@pytest.mark.parametrize(
    "text", ["name", "a b/c", "org/name/../x", "/absolute/path", "./folder", "-org/name", "org//x"]
)
def test_what_is_no_place_on_the_hub(text: str) -> None:
    assert hub_place(text) is None
    with pytest.raises(CheckpointError, match="does not exist, neither as a folder nor as a file"):
        load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://github.com/org/name", "is not fetched: addresses are of huggingface.co"),
        ("https://huggingface.co.evil.org/org/name", "is not fetched"),
        ("ftp://huggingface.co/org/name", "is not fetched"),
        ("https://huggingface.co/datasets/org/name", "is of one of the hub's datasets, not of a model"),
        ("https://huggingface.co/spaces/org/name", "is of one of the hub's spaces"),
        ("https://huggingface.co/org", "is not the address of a model on the hub"),
        ("https://huggingface.co/org/name/discussions/3", "is not the address of a model on the hub"),
        ("https://huggingface.co/org/name/tree/main/../x", "is not the address of a model on the hub"),
    ],
)
def test_other_addresses(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(text)


def test_a_home_of_nobody() -> None:
    with pytest.raises(CheckpointError, match="~nosuchuser/x cannot be found"):
        load("~nosuchuser/x")


class Hub:
    """Stands in for snapshot_download: copies what the patterns name, and keeps what was asked for."""

    def __init__(self, remote: Path, cache: Path):
        self.remote, self.cache, self.calls = remote, cache, list[tuple[str, str | None]]()

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((repo, revision))
        self.cache.mkdir(exist_ok=True)
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def fetched(self) -> set[str]:
        return {p.relative_to(self.cache).as_posix() for p in self.cache.rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repository with a pipeline, a training folder and single files."""
    import huggingface_hub

    made = Hub(tmp_path / "remote", tmp_path / "cache")
    pipeline().save_pretrained(made.remote)
    for name, model in (("unet", RAW), ("unet_ema", AVERAGED)):
        model.save_pretrained(made.remote / "checkpoint-20" / name)
    RAW.save_config(made.remote / "single")
    torch.save({"net": RAW.state_dict(), "ema": AVERAGED.state_dict()}, made.remote / "single/both.pt")
    RAW.save_config(made.remote / "accelerated")
    save_file(dict(RAW.state_dict()), made.remote / "accelerated/model.safetensors")
    (made.remote / "unet/modeling.py").write_text("")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_a_folder_of_a_repository(hub: Hub) -> None:
    """The U-Net alone, with the schedule of the pipeline that it is part of."""
    for source in ("org/name/unet", "https://huggingface.co/org/name/tree/main/unet"):
        checkpoint = load(source)
        is_of(checkpoint, pipeline().unet)
        assert checkpoint.source == source and checkpoint.notes == []
    assert hub.calls == [("org/name", None)] * 2
    names = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert hub.fetched() == names | {"model_index.json", "scheduler/scheduler_config.json"}


def test_a_training_folder_of_a_repository(hub: Hub) -> None:
    is_of(load("org/name/checkpoint-20@v1"), AVERAGED)
    is_of(load("https://huggingface.co/org/name/tree/v1/checkpoint-20", weights="unet"), RAW)
    is_of(load("hf://org/name@v1/checkpoint-20/unet"), RAW)
    assert hub.calls == [("org/name", "v1")] * 3


def test_a_file_of_a_repository(hub: Hub) -> None:
    is_of(load("https://huggingface.co/org/name/blob/main/single/both.pt"), AVERAGED)
    is_of(load("hf://org/name/single/both.pt", weights="net"), RAW)
    assert "single/config.json" in hub.fetched() and "unet/config.json" not in hub.fetched()


def test_accelerate_s_names_in_a_repository(hub: Hub) -> None:
    is_of(load("org/name/accelerated"), RAW)


def test_what_a_repository_has_not(hub: Hub) -> None:
    for source in ("org/name/absent", "hf://org/name/single/absent.pt"):
        with pytest.raises(
            CheckpointError, match=f"^{source.removeprefix('hf://')} has none of the files of a diffusers checkpoint$"
        ):
            load(source)


def test_a_mistyped_path_is_not_asked_for_on_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's name, and a path below a folder that is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    for source in ("results/first/model.pt", "runs/first/unett"):
        with pytest.raises(CheckpointError, match="does not exist, neither as a folder nor as a file"):
            load(source)
    assert hub.calls == []


def test_a_local_folder_goes_before_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sound_folder(tmp_path / "org").rename(tmp_path / "org/name")
    assert load("org/name").model.config.sample_size == 4 and not hub.calls


def test_two_files_of_accelerate_in_one_folder(tmp_path: Path) -> None:
    """The one in safetensors is taken, and a note names the other."""
    for seed, name in ((1, "model.safetensors"), (2, "pytorch_model.bin")):
        model = theirs(TINY, seed)
        model.save_config(tmp_path)
        if seed == 1:
            save_file(model.state_dict(), tmp_path / name)
        else:
            torch.save(model.state_dict(), tmp_path / name)
    checkpoint = load(tmp_path)
    assert_same(run(checkpoint.model, TINY), run(theirs(TINY, 1), TINY))
    assert "model.safetensors is used, and not pytorch_model.bin beside it" in checkpoint.notes
