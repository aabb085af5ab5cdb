"""What every family of checkpoints shares: the result, what a family is handed, and the strict fit of its weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import dtype_called
from ..classes import listed
from ..schedule import Schedule
from .files import CheckpointError, listing

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def stored_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype to store weights in, as given or by its name; None for None. CheckpointError for any other."""
    try:
        return None if dtype is None else dtype_called(dtype, FLOATS)
    except ValueError as error:
        raise CheckpointError(f"the weights' {error}") from None


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A loaded checkpoint: a model in eval mode on the CPU in float32, and the schedule it was trained with.

    It can be pickled and copied; its repr is a few lines, without the tree of modules (print ``model`` for that).
    """

    model: Any  # a UNet; of a lucidrains file a LucidrainsUnet, which `Sampler` takes as well
    schedule: Schedule
    source: str
    family: str
    notes: list[str]  # what was inferred, assumed or chosen
    labels: list[str] | None = None  # names of the classes, where the checkpoint has them

    def __repr__(self) -> str:
        model, schedule = self.model, self.schedule
        config = getattr(model, "config", None)
        size = getattr(config, "image_size", None)
        channels = getattr(config, "in_channels", getattr(config, "channels", None))
        images = " x ".join(map(str, (channels, *size))) if size else f"{channels} channels, size not stated"
        parameters = sum(p.numel() for p in model.parameters())
        betas = "betas of its own" if schedule.trained_betas is not None else f"{schedule.beta_schedule} betas"
        facts = {
            "source": self.source,
            "family": self.family,
            "model": f"{type(model).__name__}, {parameters:,} parameters",
            "images": images,
            "schedule": f"{schedule.num_train_timesteps} timesteps, {betas}, {schedule.prediction_type}, "
            f"{schedule.variance_type if schedule.method == 'ddpm' else schedule.method}",
        }
        if self.labels:
            facts["labels"] = listed(len(self.labels), self.labels)
        if self.notes:
            facts["notes"] = f"{len(self.notes)} (checkpoint.notes)"
        return "Checkpoint(\n" + "".join(f"  {name}: {value}\n" for name, value in facts.items()) + ")"


@dataclass(frozen=True)
class Found:
    """Weights, and what lay beside them, as a family's loader is handed them."""

    source: str
    weights: Path  # the file, or the index of its shards
    tensors: Mapping[str, Tensor]  # of the network alone, under its own names
    config: dict[str, Any] | None = None  # config.json
    scheduler: dict[str, Any] | None = None  # scheduler_config.json
    labels: list[str] | None = None
    preset: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recorded: Mapping[str, Any] = field(default_factory=dict)  # what the file says beside its tensors
    prefix: str = ""  # of the network's names in the file
    beside: Mapping[str, Tensor] = field(default_factory=dict)  # all tensors of the file, by their dotted names there


@dataclass(frozen=True)
class Family:
    """A kind of network, known by its tensor names. Without `load` it is recognised only to be refused.

    detect: gets the names under one prefix of a file, without that prefix. It must hold for the network's own prefix
        and for no other, so it asks for whole names or for their beginnings.
    """

    name: str
    detect: Callable[[frozenset[str]], bool]
    load: Callable[[Found], Checkpoint] | None = None
    refusal: str = ""  # what the file is, and what to do
    hides: bool = False  # a network inside it must not be loaded by itself
    reads: frozenset[str] = frozenset()  # buffers beside the layers that `load` itself wants to see


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """CheckpointError for the first name that is not known, with the names close to it."""
    known = sorted(known)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known)}"
            raise CheckpointError(f"unknown {what} {name!r}; {hint}")


def fit(model: nn.Module, found: Found, tensors: Mapping[str, Tensor]) -> list[str]:
    """Gives a model built on the meta device these weights, in float32; names and shapes must match exactly.

    tensors: the file's, under the model's own names. Returns notes. Raises CheckpointError naming what differs.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    _check_match(found, expected, tensors)
    check_storage(found, tensors)
    state, dtypes = {}, set()
    for name, tensor in tensors.items():
        # a copy, so that the model does not hang on a mapped file that may change
        value = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        bad = int((~value.isfinite()).sum())
        if bad:
            raise CheckpointError(f"{found.weights}: {name} holds {bad:,} NaN or infinite values; the file is unusable")
        state[name] = value
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()
    others = sorted(dtypes - {"float32"})
    return [f"stored in {', '.join(others)}, loaded as float32"] if others else []


def _check_match(found: Found, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = sorted(name for name in tensors if name not in expected)
    shapes = [
        f"{name} (file {list(tensors[name].shape)}, config {list(shape)})"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    counted = ((missing, "missing"), (unexpected, "unexpected"), (shapes, "mis-shaped"))
    problems = [f"{len(names)} {kind}: {listing(names)}" for names, kind in counted if names]
    if problems:
        raise CheckpointError(f"{found.weights} does not fit its configuration: {'; '.join(problems)}")


def check_storage(found: Found, tensors: Mapping[str, Tensor]) -> None:
    """That these are plain dense numbers which the file really holds: a few bytes can claim terabytes by stride 0."""
    storages: dict[int, int] = {}
    claimed = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
            raise CheckpointError(f"{found.weights}: {name} is {tensor.dtype}; weights must be one of {kinds}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{found.weights}: {name} is not a dense tensor ({tensor.layout}, {tensor.device})")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        claimed += tensor.numel() * tensor.element_size()
    if claimed > sum(storages.values()):
        raise CheckpointError(
            f"{found.weights}: its tensors claim {claimed:,} bytes, but it stores only {sum(storages.values()):,}"
        )
