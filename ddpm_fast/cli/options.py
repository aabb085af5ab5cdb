"""Options that several commands share, and what their words mean."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from ..checkpoints import Checkpoint

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint: a folder, a weights file or a Hugging Face id. Default: the bundled model.",
    ),
]
Network = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint, as for sample; or, with random weights, a config.json or one of cifar10, lsun256 and tiny. "
        "Default: the bundled model.",
    ),
]
WeightsPreset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="A known set of settings, for weights that come without a config. A wrong name lists them."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which of several networks in SOURCE: model, ema, unet, ... Default: the averaged one. A wrong name lists "
        "them.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override one setting by its name. Repeat for more."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Dtype = Annotated[str, typer.Option(help="Precision of the network: float32, bfloat16 or float16.")]
Ops = Annotated[str, typer.Option(help="Implementation of the operations: auto, reference, cpu, winograd or triton.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: torch's own choice.")]
Label = Annotated[
    str | None, typer.Option(metavar="K|NAME", help="Class of the images, by number or name, for a model with classes.")
]
DTYPES = ("float32", "bfloat16", "float16")

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU where there is one, else the CPU.")
]


def assignments(settings: list[str] | None) -> dict[str, Any]:
    """["norm_eps=1e-6", ...] -> {"norm_eps": 1e-6, ...}: the values as `_value` reads them."""
    values: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes NAME=VALUE; got {setting!r}")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    """JSON, or Python's None, True, False, lists and tuples, whose words need no quotes; or else plain text."""
    with suppress(json.JSONDecodeError):
        return json.loads(text)
    if text[:1] + text[-1:] in ("[]", "()"):
        inside = text[1:-1].strip().removesuffix(",")
        return [_value(part.strip()) for part in _parts(inside)] if inside else []
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    return {"None": None, "True": True, "False": False}.get(text, text)


def _parts(text: str) -> list[str]:
    """The text between its commas, without those in brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def chosen_device(name: str | None) -> torch.device:
    """The device called ``name``, or a GPU if there is one. ValueError for what torch does not see here."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; see ddpm-fast doctor"
        )
    return device


def chosen_dtype(name: str) -> torch.dtype:
    """The dtype called ``name``. ValueError for one that the engine does not compute in."""
    import torch

    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {name}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def class_number(label: str | int | None, checkpoint: Checkpoint) -> int | str | None:
    """The number of the class called ``label``: a name, or a number as text. "all", numbers and None stay."""
    names = checkpoint.labels or []
    if label is None or label == "all" or isinstance(label, int):
        return label
    if re.fullmatch(r"[+-]?\d+", label):
        return int(label)
    if label in names:
        return names.index(label)
    known = f"one of {', '.join(names)}" if names else "all"
    raise ValueError(f"--label must be a whole number or {known}; got {label!r}")
