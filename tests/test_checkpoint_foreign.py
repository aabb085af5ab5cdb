"""Files of other software and networks of other kinds: each is named for what it is, and nothing in it is run."""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import json
import pathlib
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folder import refused
from test_checkpoints_diffusers import TINY, assert_same, run, theirs

from ddpm_fast.checkpoints import load
from ddpm_fast.checkpoints.pickles import names_in


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes modules that exist while a file is written, and are gone when it is read: importing would fail."""

    def make(name: str, **values: Any) -> types.ModuleType:
        for at in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:at])
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
        module = sys.modules[name]
        for key, value in values.items():
            value.__module__ = name
            setattr(module, key, value)
        return module

    yield make


def forget(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.delitem(sys.modules, name)


class Ran(Exception):
    """Raised where something of a file is run."""


def reconstruct(meta: Any) -> Any:
    raise Ran


class Snapshot:
    """As torch_utils.persistence pickles an object: a function and the source code that it would execute."""

    def __init__(self, meta: dict[str, Any], function: Any):
        self.meta, self.function = meta, function

    def __reduce__(self) -> Any:
        return self.function, (self.meta,), None


def persistent(class_name: str, function: Any) -> Snapshot:
    source = f"class {class_name}:\n    pass\n" + "# source\n" * 200
    state = {"weight": np.arange(6.0), "training": False}
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Snapshot(meta, function)


# --- raw pickles ---


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("keys", "class_name", "message"),
    [
        (
            ("ema", "loss_fn", "augment_pipe", "dataset_kwargs"),
            "EDMPrecond",
            r"an EDM snapshot \(EDMPrecond\), pickled",
        ),
        (("ema",), "SongUNet", r"an EDM snapshot \(SongUNet\)"),
        (("G", "D", "G_ema"), "Generator", r"a snapshot of EDM or StyleGAN \(torch_utils\.persistence\)"),
    ],
)
def test_snapshots_of_edm(
    keys: tuple[str, ...],
    class_name: str,
    message: str,
    protocol: int,
    tmp_path: Path,
    modules: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
    reconstruct.__qualname__ = "_reconstruct_persistent_obj"
    path = tmp_path / "edm-cifar10-32x32-uncond-vp.pkl"
    path.write_bytes(pickle.dumps({key: persistent(class_name, reconstruct) for key in keys}, protocol))
    with pytest.raises(Ran):  # the trap works
        pickle.loads(path.read_bytes())
    forget(monkeypatch, "torch_utils.persistence", "torch_utils")
    text = refused(path, message)
    assert text.endswith("; nothing in it was run") and "source code" in text


class Forest:
    pass


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_other_pickles(protocol: int, tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pkl"
    modules("sklearn.ensemble._forest", Forest=Forest)
    modules("their.models", Net=Net)
    for content, message in (
        (Forest(), r"it is a pickle of scikit-learn \(sklearn\.ensemble\._forest\.Forest\), no network"),
        (Net(), r"it is a pickle of their\.models\.Net, a whole object and not a state dict"),
        ({"a": np.zeros(3), "b": np.float64(1)}, "it is a pickle of NumPy arrays; save them"),
        ({"a": torch.zeros(3)}, r"it is a pickle of tensors that pickle\.dump wrote; save it with torch\.save"),
        ({"a": [1.0]}, "is damaged, or not a state dict of plain tensors"),
    ):
        path.write_bytes(pickle.dumps(content, protocol))
        refused(path, message)
    Net.__module__ = Forest.__module__ = __name__


def test_a_training_state_of_edm(tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modules("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
    reconstruct.__qualname__ = "_reconstruct_persistent_obj"
    path = tmp_path / "training-state-000100.pt"
    torch.save({"net": persistent("EDMPrecond", reconstruct), "optimizer_state": {}}, path)
    forget(monkeypatch, "torch_utils.persistence", "torch_utils")
    refused(path, r"it is an EDM snapshot \(EDMPrecond\), .*; nothing in it was run")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_under_a_safetensors_name(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"conv_in.weight": [0.5] * 9}, protocol))
    refused(path, "is a torch.save file under a safetensors name; rename it to .bin")


def test_a_safetensors_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """640 bytes, 0x0280, are written as a pickle of protocol 2 begins."""
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"fc.weight": tensor}).ljust(640).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x02"
    refused(path, "no checkpoint of a known family; its 1 tensors are fc.weight")


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "compile", "open"])
def test_a_pickle_that_runs_a_builtin_is_not_called_harmless(name: str, tmp_path: Path) -> None:
    """Beside tensors as well: the advice is to leave it, not to save it anew."""
    for content in (b"", b"ctorch._utils\n_rebuild_tensor_v2\n0"):
        path = tmp_path / "model.pkl"
        path.write_bytes(b"\x80\x02" + content + b"cbuiltins\n" + name.encode() + b"\nX\x01\x00\x00\x001\x85R.")
        refused(path, rf"would run builtins\.{name}, .* do not open it unless you trust who wrote it; nothing in")


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules(zipped: bool, tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save(model), and a dict with a model in it: the class is named."""
    modules("their.models", Net=Net)
    for content in (Net(), {"epoch": 3, "model": Net()}):
        torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "model.pt", r"would run their\.models\.Net, .* nothing was run; .* save its state_dict\(\)")
    Net.__module__ = __name__


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_the_names_of_a_pickle(protocol: int) -> None:
    """Against pickletools' own disassembly: the same globals, whether by GLOBAL or by STACK_GLOBAL and memo."""
    content = [
        np.zeros(3),
        np.ones(2),
        datetime.date(2020, 1, 1),
        pathlib.PurePosixPath("/a"),
        Net,
        Net().layer,
        "text",
    ]
    data = pickle.dumps(content, protocol)
    found = names_in(io.BytesIO(data))

    class Noting(pickle._Unpickler):  # the one in Python, which runs, beside ours, which does not
        seen: list[str] = []  # noqa: RUF012 - one test

        def find_class(self, module: str, name: str) -> Any:
            self.seen.append(f"{module}.{name}")
            return super().find_class(module, name)

    Noting.seen = []
    Noting(io.BytesIO(data)).load()
    assert set(found.imports) == set(Noting.seen) and "text" in found.texts and not found.by_torch


# --- settings and numbers beside a network ---

BESIDE = {
    "argparse": argparse.Namespace(lr=1e-4, sizes=[1, 2]),
    "namespace": types.SimpleNamespace(lr=1e-4),
    "path": pathlib.PurePosixPath("/data"),
    "NumPy's number": np.float64(0.5),
    "NumPy's array": np.arange(4),
    "date": datetime.datetime(2020, 1, 1),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_settings_beside_a_network(name: str, zipped: bool, tmp_path: Path) -> None:
    """What training scripts save beside the weights is left out; its classes are not imported."""
    model = theirs(TINY)
    model.save_config(tmp_path)
    content = {"args": BESIDE[name], "model": model.state_dict(), "best": {"loss": BESIDE[name]}}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    checkpoint = load(tmp_path / "file.pt")
    assert_same(run(checkpoint.model, TINY), run(model, TINY))
    assert "the network in the file is model; left out: args, best" in checkpoint.notes


class Config:
    def __init__(self) -> None:
        raise Ran

    def __setstate__(self, state: Any) -> None:
        raise Ran


def test_settings_of_libraries_that_are_not_there(
    tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules("omegaconf.dictconfig", Config=Config)
    Config.__qualname__ = "DictConfig"
    setattr(sys.modules["omegaconf.dictconfig"], "DictConfig", Config)  # noqa: B010 - a name that types do not know
    settings = Config.__new__(Config)
    settings.__dict__["_content"] = {"lr": 1e-4}
    model = theirs(TINY)
    model.save_config(tmp_path)
    torch.save({"hyper_parameters": settings, "state_dict": model.state_dict()}, tmp_path / "file.ckpt")
    forget(monkeypatch, "omegaconf.dictconfig", "omegaconf")
    checkpoint = load(tmp_path / "file.ckpt")
    assert_same(run(checkpoint.model, TINY), run(model, TINY))
    assert "the network in the file is state_dict; left out: hyper_parameters" in checkpoint.notes


class Attributes(dict):  # type: ignore[type-arg]
    """As EasyDict, yacs and Lightning make theirs: a dict with attributes of its own."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.__dict__.update(self, _frozen=False)

    def __setstate__(self, state: Any) -> None:
        raise Ran


DICTS = [
    "easydict.EasyDict",
    "addict.addict.Dict",
    "yacs.config.CfgNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", DICTS)
def test_settings_in_classes_of_dicts(
    name: str, zipped: bool, tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a class is not imported, whatever items it has."""
    module, _, short = name.rpartition(".")
    kind = type(short, (Attributes,), {"__setstate__": Attributes.__setstate__})
    modules(module, **{short: kind})
    model = theirs(TINY)
    model.save_config(tmp_path)
    settings = kind({"lr": 1e-4, "net": kind({"width": 8})})
    content = {"hyper_parameters": settings, "state_dict": model.state_dict(), "empty": kind()}
    torch.save(content, tmp_path / "file.ckpt", _use_new_zipfile_serialization=zipped)
    parents = [module[:at] for at in range(len(module) + 1) if at == len(module) or module[at] == "."]
    forget(monkeypatch, *parents)
    checkpoint = load(tmp_path / "file.ckpt")
    assert_same(run(checkpoint.model, TINY), run(model, TINY))
    left = next(note for note in checkpoint.notes if "left out" in note)
    assert left.startswith("the network in the file is state_dict; left out: hyper_parameters")


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_do_not_open_the_door_to_code(zipped: bool, tmp_path: Path) -> None:
    """Beside settings that are left out, anything else is refused as before."""
    model = theirs(TINY)
    model.save_config(tmp_path)
    trace = tmp_path / "trace"

    class Malicious:
        def __reduce__(self) -> Any:
            return pathlib.os.mkdir, (str(trace),)  # type: ignore[attr-defined]

    for content in (Malicious(), functools.partial(print, 1), torch.nn.Linear(2, 2)):
        beside = {"args": argparse.Namespace(a=1), "model": model.state_dict(), "x": content}
        torch.save(beside, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "file.pt", r"is refused: unpickling it would run (\w+\.mkdir|functools\.partial|torch\.nn)")
    assert not trace.exists()


# --- files of other formats ---


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(3))
    return stream.getvalue()


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return stream.getvalue()


FORMATS: dict[str, tuple[str, bytes, str]] = {
    "gguf": ("model.gguf", b"GGUF\x03\x00\x00\x00" + bytes(56), "is a GGUF file"),
    "gguf under another name": ("model.bin", b"GGUF\x03\x00\x00\x00" + bytes(56), "is a GGUF file"),
    "onnx": ("model.onnx", b"\x08\x07\x12\x07pytorch", "is an ONNX model"),
    "hdf5": ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(50), "is a model of Keras|is an HDF5 file"),
    "hdf5 under another name": ("weights.bin", b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file"),
    "flax": ("diffusion_flax_model.msgpack", b"\x84\xa7conv_in", r"is weights of Flax \(JAX\), .* from_flax=True"),
    "tflite": ("model.tflite", b"\x1c\x00\x00\x00TFL3", "is a compiled model of another runtime"),
    "tflite under another name": ("model.bin", b"\x1c\x00\x00\x00TFL3" + bytes(9), "is a TensorFlow Lite model"),
    "tensorflow": ("model.ckpt-790000.index", b"\x00\x00\x0e", "is a TensorFlow checkpoint"),
    "tensorflow's data": ("model.ckpt.data-00000-of-00001", b"\x00\x00\x0e", "is a TensorFlow checkpoint"),
    "npy": ("model.npy", b"\x93NUMPY\x01\x00", "is a NumPy array; weights come as"),
    "npz": ("weights.npz", npz(), r"is an \.npz of NumPy arrays"),
    "gzip": ("model.pt.gz", b"\x1f\x8b\x08\x00" + bytes(20), "is an archive; unpack it"),
    "picture": ("model.pt", b"\x89PNG\r\n\x1a\n" + bytes(20), "is a picture"),
    "page": (
        "model.pt",
        b"\n<!DOCTYPE html>\n<html><head>",
        "is a web page, not the file itself: .* download the file",
    ),
    "page of a bucket": ("model.bin", b'<?xml version="1.0"?><Error><Code>AccessDenied', "is a web page"),
    "pointer": ("model.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "nothing": ("model.safetensors", b"", "is empty; the download or the save that made it did not finish"),
    "zeros": (
        "model.safetensors",
        bytes(4096),
        "is nothing but zeros at its beginning: a download that did not finish",
    ),
    "part": ("model.safetensors.part", b"\x80\x02", "is a download that did not finish; download it again"),
    "browser": ("model.ckpt.crdownload", b"PK\x03\x04", "is a download that did not finish"),
    "export": ("model.pt2", zipped("a/data/weights/weight_0", "a/models/model.json"), r"a program of torch\.export"),
    "keras": ("model.zip", zipped("metadata.json", "config.json", "model.weights.h5"), "is a model of Keras"),
    "text": ("model.pt", b"Entry not found", r"neither a safetensors nor a torch\.save file \(it begins with b'Entry"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats(name: str, tmp_path: Path) -> None:
    file, content, message = FORMATS[name]
    path = tmp_path / file
    path.write_bytes(content)
    assert len(refused(path, message)) < 400


def test_a_file_cut_short(tmp_path: Path) -> None:
    """Half a zip file of torch.save, and half a safetensors file."""
    torch.save(theirs(TINY).state_dict(), tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "half.pt", "is damaged or truncated")


# --- networks of other kinds ---

NETWORKS: dict[str, tuple[tuple[str, ...], str]] = {
    "stable diffusion": (
        (
            "model.diffusion_model.time_embed.0.weight",
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            "first_stage_model.encoder.conv_in.weight",
            "first_stage_model.decoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        ),
        "a latent diffusion model .Stable Diffusion or the like",
    ),
    "unconditional latent diffusion": (
        (
            "model.diffusion_model.time_embed.0.weight",
            "model.diffusion_model.input_blocks.0.0.weight",
            "first_stage_model.encoder.conv_in.weight",
            "first_stage_model.decoder.conv_in.weight",
        ),
        "a latent diffusion model",
    ),
    "with an autoencoder": (
        (
            "unet.time_embedding.linear_1.weight",
            "unet.down_blocks.0.resnets.0.conv1.weight",
            "vae.encoder.conv_in.weight",
            "vae.decoder.conv_in.weight",
        ),
        r"a latent diffusion model: beside its U-Net it holds an autoencoder \(vae\)",
    ),
    "SDXL": (
        (
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
            "model.diffusion_model.time_embed.0.weight",
            "model.diffusion_model.input_blocks.0.0.weight",
        ),
        "a latent diffusion model",
    ),
    "autoencoder": (("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"), "an autoencoder"),
    "ControlNet": (("control_model.time_embed.0.weight", "control_model.input_hint_block.0.weight"), "a ControlNet"),
    "ControlNet of diffusers": (
        ("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight", "controlnet_down_blocks.0.weight"),
        "a ControlNet",
    ),
    "LoRA": (
        (
            "unet.down_blocks.0.attentions.0.to_q.lora_A.weight",
            "unet.down_blocks.0.attentions.0.to_q.lora_B.weight",
        ),
        "a LoRA, a change to another model",
    ),
    "LoRA of kohya": (
        ("lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"),
        "a LoRA, a change to another model",
    ),
    "DiT": (
        ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight"),
        "a diffusion transformer .DiT",
    ),
    "transformer of diffusers": (
        ("transformer_blocks.0.attn1.to_q.weight", "proj_out_2.weight"),
        "a transformer of diffusers",
    ),
    "Flux": (("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "a Flux transformer"),
    "U-ViT": (("patch_embed.proj.weight", "pos_embed", "in_blocks.0.attn.qkv.weight"), "a U-ViT, a transformer"),
    "EDM": (("model.map_layer0.weight", "model.enc.32x32_conv.weight"), "an EDM network"),
    "EDM2": (("unet.emb_noise.weight", "unet.enc.64x64_conv.weight"), "an EDM2 network"),
    "k-diffusion": (
        (
            "model.timestep_embed.weight",
            "model.mapping.0.weight",
            "model.u_net.d_blocks.0.1.main.0.mapper.weight",
            "model_ema.timestep_embed.weight",
            "model_ema.mapping.0.weight",
        ),
        "a network of k-diffusion, whose noise levels",
    ),
    "k-diffusion's denoiser": (("inner_model.proj_in.weight", "inner_model.u_net.x"), "a model of k-diffusion"),
    "k-diffusion's transformer": (
        ("inner_model.time_emb.weight", "inner_model.patch_in.proj.weight"),
        "k-diffusion",
    ),
    "simple diffusion": (
        (
            "model.init_conv.weight",
            "model.downs.0.0.block1.proj.weight",
            "model.time_mlp.0.weights",
            "model.vit.layers.0.0.q_scale",
            "model.final_conv.weight",
        ),
        "a UViT of simple diffusion",
    ),
    "Imagen": (("unets.0.init_conv.convs.0.weight", "unets.0.to_time_hiddens.1.weight"), "imagen-pytorch"),
    "NCSN": (("module.begin_conv.weight", "module.refine1.adapt_convs.0.weight"), "an NCSN"),
    "StyleGAN": (("mapping.fc0.weight", "synthesis.b4.const"), "a StyleGAN generator"),
    "CLIP": (("text_model.encoder.layers.0.mlp.fc1.weight",), "a CLIP text encoder"),
}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}], ids=["bare", "lightning"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_kinds(name: str, wrap: Any, tmp_path: Path) -> None:
    names, message = NETWORKS[name]
    torch.save(wrap({key: torch.zeros(2, 2) for key in names}), tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", message)


def test_a_consistency_model_has_openai_s_layout(tmp_path: Path) -> None:
    """It cannot be told by its names, so the refusal that asks for settings says so."""
    from openai_oracle import Net as OpenAINet
    from openai_oracle import weights

    plain = OpenAINet(32, 1, (1, 2), (2,), heads=4)
    torch.save(weights(plain), tmp_path / "cd_imagenet64_l2.pt")
    refused(tmp_path / "cd_imagenet64_l2.pt", r"A consistency model .* has this very layout, and is no DDPM")
    torch.save(weights(plain), tmp_path / "ema_0.9999.pt")
    assert "A consistency model" not in refused(
        tmp_path / "ema_0.9999.pt", "an OpenAI checkpoint of no released architecture"
    )
