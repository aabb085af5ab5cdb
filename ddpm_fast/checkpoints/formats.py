"""File formats that are no weights of PyTorch, known by their first bytes or their names."""

from __future__ import annotations

import re
from pathlib import Path

_FLAX = (
    "weights of Flax (JAX), which are not read; convert them once with a diffusers that still knows Flax: "
    "UNet2DModel.from_pretrained(folder, from_flax=True).save_pretrained(folder)"
)
_TENSORFLOW = "a TensorFlow checkpoint, which is not read; convert it in the code that wrote it, to safetensors"
_UNFINISHED = "a download that did not finish; download it again"
_ARCHIVE = "an archive; unpack it and name the weights inside"

# (beginning of the file, what it is), the first that fits.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file (quantised weights of stable-diffusion.cpp or llama.cpp), which is not read"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (weights of Keras), which is not read"),
    (b"\x93NUMPY", "a NumPy array; weights come as safetensors or as a torch.save file"),
    (b"\x89PNG", "a picture, not weights"),
    (b"\xff\xd8\xff", "a picture, not weights"),
    (b"\x1f\x8b", _ARCHIVE),
    (b"\xfd7zXZ\x00", _ARCHIVE),
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),
    (b"BZh", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
    (b"Rar!\x1a\x07", _ARCHIVE),
)
_NAMES: tuple[tuple[str, str], ...] = (
    (r"\.(part|partial|crdownload|download|incomplete|aria2)$", _UNFINISHED),
    (r"\.msgpack$", _FLAX),
    (r"\.onnx$", "an ONNX model, a program for other runtimes, which is not read; name the weights that it came from"),
    (r"\.(tflite|pb|mlmodel|engine|plan)$", "a compiled model of another runtime, which is not read"),
    (r"\.ckpt(-\d+)?\.(index|meta|data-\d{5}-of-\d{5})$", _TENSORFLOW),
    (r"\.(h5|keras)$", "a model of Keras, which is not read"),
)


def foreign_format(path: Path, head: bytes) -> str | None:
    """What a file is, by its name or its first bytes (64, or all), where it is no checkpoint; None where it may be."""
    for pattern, kind in _NAMES:
        if re.search(pattern, path.name.lower()):
            return kind
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return (
            "a web page, not the file itself: the address was that of a page, or asked for a login; download the file "
            "again by its direct address"
        )
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model, which is not read"
    if not head.strip(b"\0"):
        return f"nothing but zeros at its beginning: {_UNFINISHED}"
    return None


def foreign_zip(names: list[str]) -> str | None:
    """What a zip file holds, where that is neither weights nor a DDUF file."""
    if any(name.endswith("model_index.json") or name.endswith("unet/config.json") for name in names):
        return "a zip of a folder of diffusers; unpack it and name the folder"
    if any(name.endswith(".npy") for name in names):
        return "an .npz of NumPy arrays; weights come as safetensors or as a torch.save file"
    if "config.json" in names and any(name.endswith(".weights.h5") for name in names):
        return "a model of Keras, which is not read"
    if any("/models/" in f"/{name}" and name.endswith(".json") for name in names):
        return "a program of torch.export (.pt2), not a state dict; save the module's state_dict()"
    return None
