"""Options that several commands share, and what their words mean."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

Source = Annotated[
    str | None,
    typer.Argument(help="A folder, a weights file or a Hugging Face id. Default: the bundled model."),
]
Preset = Annotated[str | None, typer.Option(help="Settings for weights that come without a config.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override a setting by its name. Repeat for more."),
]
DTYPES = ("float32", "bfloat16", "float16")

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: a GPU if there is one.")]


def assignments(settings: list[str] | None) -> dict[str, Any]:
    """["norm_eps=1e-6", ...] -> {"norm_eps": 1e-6, ...}; values are JSON, or else plain text."""
    values: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes NAME=VALUE; got {setting!r}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = {"None": None, "True": True, "False": False}.get(text, text)
    return values


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
