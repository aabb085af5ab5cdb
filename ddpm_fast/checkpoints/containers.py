"""Finds the networks in what a weights file holds, whatever training scripts wrapped around them.

A file is flattened to dotted names ("ema.module.conv_in.weight"). A network is a prefix under which the names are
those of a family. Everything else (optimizers, counters, metrics, other modules) is left out, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .family import Family
from .files import CheckpointError, listing
from .foreign import AUTOENCODER
from .pickles import LeftOut, tensor_of

MAX_DEPTH = 12  # of dicts within dicts, and of a network's prefix
MAX_ENTRIES = 1_000_000  # a few bytes of pickle can hold a structure of exponential size

# Wrapper modules that put their own name in the middle of others: torch.compile, FSDP, checkpointing, Fabric.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Containers whose name says nothing about which network they hold.
_PLAIN = {"state_dict", "module"}
_AVERAGED = re.compile(r"(^|[_\-])(ema|swa|avg|averaged?|shadow|polyak)([_\-\d.]|$)|Ema$|EMA")
_NOT_AVERAGED = re.compile(r"online_model|(^|[_\-])(non?|not|without|before|pre)[_\-]?(ema|avg|swa)", re.I)
# What tools and training code leave in a network's own state dict.
_BOOKKEEPING = re.compile(r"(.*\.)?total_(ops|params)")  # thop
_SCHEDULE = re.compile(
    r"betas?|alphas?|sigmas?|log_snr|timesteps|time_steps|loss_weight|lvlb_weights|one_minus_\w+"
    r"|((p2_loss|sqrt|log|posterior|alphas?|betas?)_\w+)"
)


@dataclass(frozen=True)
class Network:
    """One network of a file: its tensors under the family's own names."""

    name: str  # what `weights` takes
    place: str  # where it is in the file, a dotted name
    prefix: str  # of the network's names in the flattened file; of averages without names, the model's
    family: Family
    tensors: Mapping[str, Tensor]
    averaged: bool
    without_average: tuple[str, ...] = ()  # names of an averaged one whose tensors are the trained ones


@dataclass
class Contents:
    """A file's values by their dotted names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # names of what is no tensor
    unread: list[str] = field(default_factory=list)  # of these, names of objects that have weights inside
    ordered: dict[str, list[Tensor]] = field(default_factory=dict)  # averages in the order of parameters()
    state_dicts: list[str] = field(default_factory=list)  # prefixes of the dicts that hold tensors themselves


def flatten(content: Any, path: Path) -> Contents:
    """All tensors in nested dicts, lists and tuples. Raises CheckpointError for a structure without end."""
    contents, entries = Contents(), 0
    within: set[int] = set()  # the containers around the one at hand: a pickle can hold itself

    def walk(value: Any, name: str, depth: int) -> None:
        nonlocal entries
        entries += 1
        if entries > MAX_ENTRIES:
            raise CheckpointError(f"{path} holds more than {MAX_ENTRIES:,} values; it is no checkpoint")
        tensor = tensor_of(value)
        if tensor is not None:
            contents.tensors.setdefault(name, tensor)
        elif isinstance(value, (list, tuple)) and len(value) > 1 and _is_averaged(name, {}) and _tensors(value):
            contents.ordered[f"{name}."] = [tensor for tensor in map(tensor_of, value) if tensor is not None]
        elif not isinstance(value, (dict, list, tuple)) or is_optimizer(value):
            contents.others.append(name)
            if isinstance(value, LeftOut) and value.has_weights:
                contents.unread.append(name)
        elif depth <= MAX_DEPTH and id(value) not in within:
            within.add(id(value))
            inside(value, name, depth)
            within.remove(id(value))

    def inside(value: Any, name: str, depth: int) -> None:
        if isinstance(value, dict):
            prefix = f"{name}." if name else ""
            averages = value.get("shadow_params")
            ordered = isinstance(averages, (list, tuple)) and _tensors(averages)
            if isinstance(averages, (list, tuple)) and ordered:
                contents.ordered[prefix] = [tensor for tensor in map(tensor_of, averages) if tensor is not None]
            elif any(tensor_of(v) is not None for v in value.values()):
                contents.state_dicts.append(prefix)
            for key, inner in value.items():
                if not (ordered and key in ("shadow_params", "collected_params", "temp_stored_params")):
                    walk(inner, _without_wrappers(f"{prefix}{key}"), depth + 1)
        else:
            for i, inner in enumerate(value):
                walk(inner, f"{name}.{i}" if name else str(i), depth + 1)

    walk(content, "", 0)
    return contents


def _tensors(values: Sequence[Any]) -> bool:
    return all(tensor_of(value) is not None for value in values)


def is_optimizer(value: Any) -> bool:
    """Whether this is an optimizer's state dict."""
    return isinstance(value, dict) and "param_groups" in value


def _without_wrappers(name: str) -> str:
    if not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def networks(contents: Contents, families: Sequence[Family]) -> list[Network]:
    """The networks of a file: each prefix under which the names are those of a family, the first that fits."""
    groups: dict[str, list[str]] = {}
    for name in contents.tensors:
        prefix = ""
        for part in name.split(".", MAX_DEPTH + 1):
            groups.setdefault(prefix, []).append(name[len(prefix) :])
            prefix += part + "."
    places: dict[str, Family] = {}
    for prefix, names in groups.items():
        known = frozenset(names)
        family = next((f for f in families if f.detect(known)), None)
        if family is not None:
            places[prefix] = family
    places = {p: f for p, f in places.items() if not any(_holds(q, p) and places[q].hides for q in places)}
    found = []
    for prefix, family in places.items():
        inner = tuple(p for p in places if _holds(prefix, p))
        tensors = {
            name[len(prefix) :]: tensor
            for name, tensor in contents.tensors.items()
            if name.startswith(prefix) and not (inner and name.startswith(inner))
        }
        averaged = _is_averaged(prefix, contents.tensors)
        found.append(Network("", prefix.removesuffix("."), prefix, family, tensors, averaged))
    loadable = [n for n in found if n.family.load is not None]
    found += [*_by_order(contents, loadable), *_by_squeezed_names(contents, loadable)]
    return [replace(network, name=name) for name, network in zip(_short_names([n.place for n in found]), found)]


def _holds(outer: str, inner: str) -> bool:
    return outer != inner and inner.startswith(outer)


def _is_averaged(prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """By its name, or as torch's AveragedModel, whose counter is beside the module."""
    if any(_NOT_AVERAGED.search(part) for part in prefix.split(".")):
        return False
    starts = [prefix[: m.start()] for m in re.finditer(r"module\.", prefix)]
    counted = any(f"{start}n_averaged" in tensors for start in starts)
    return counted or any(_AVERAGED.search(part) for part in prefix.split("."))


def _short_names(full: list[str]) -> list[str]:
    """For each dotted name its shortest beginning that no other has, without containers that say nothing."""
    plain = [[p for p in name.split(".") if p and p not in _PLAIN] or [name or "model"] for name in full]
    if len({tuple(parts) for parts in plain}) < len(plain):
        plain = [name.split(".") for name in full]
    short = []
    for i, parts in enumerate(plain):
        others = [other for j, other in enumerate(plain) if j != i]
        length = next((n for n in range(1, len(parts)) if all(o[:n] != parts[:n] for o in others)), len(parts))
        short.append(".".join(parts[:length]))
    return short


# --- averages that have no names of their own ---


def _by_order(contents: Contents, found: Sequence[Network]) -> Iterator[Network]:
    """The averages of diffusers' EMAModel and Score-SDE's: a list in the order of the model's parameters()."""
    for place, averages in contents.ordered.items():
        for network in found:
            holders = [p for p in contents.state_dicts if network.prefix.startswith(p)]
            tried = (_aligned(contents.tensors, prefix, averages) for prefix in (*holders, network.prefix))
            named = next((names for names in tried if names is not None), None)
            if named is not None:
                tensors = {name: named.get(network.prefix + name, t) for name, t in network.tensors.items()}
                name = place.removesuffix(".") or "ema"
                trained = (
                    n for n, t in network.tensors.items() if network.prefix + n not in named and _is_weight(n, t)
                )
                rest = tuple(n for n in trained if n not in network.family.reads)
                yield Network(name, name, network.prefix, network.family, tensors, True, rest)
                break


def _aligned(tensors: Mapping[str, Tensor], prefix: str, averages: Sequence[Tensor]) -> dict[str, Tensor] | None:
    """The averages by name, where the shapes under the prefix leave one way to name them; buffers are passed over."""
    own = [(n, tuple(t.shape)) for n, t in tensors.items() if n.startswith(prefix) and t.is_floating_point()]
    shapes = [tuple(t.shape) for t in averages]
    first = _subsequence([shape for _, shape in own], shapes)
    last = _subsequence([shape for _, shape in reversed(own)], shapes[::-1])
    if not shapes or first is None or last is None or first != [len(own) - 1 - i for i in reversed(last)]:
        return None
    return {own[i][0]: average for i, average in zip(first, averages)}


def _subsequence(among: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...]]) -> list[int] | None:
    """The first places at which the wanted shapes stand in their order, or None."""
    places, i = [], 0
    for shape in wanted:
        while i < len(among) and among[i] != shape:
            i += 1
        if i == len(among):
            return None
        places.append(i)
        i += 1
    return places


def _by_squeezed_names(contents: Contents, found: Sequence[Network]) -> Iterator[Network]:
    """The averages that CompVis' code keeps in ``model_ema``, a module whose buffers' names have lost their dots."""
    for network in found:
        for root in dict.fromkeys(network.prefix[: m.start()] for m in re.finditer(r"[^.]+\.", network.prefix)):
            owner = network.prefix[len(root) :].split(".")[0]
            place = f"{root}{owner}_ema."
            own = {name: (network.prefix + name)[len(root) + len(owner) + 1 :] for name in network.tensors}
            named = {name: contents.tensors.get(place + rest.replace(".", "")) for name, rest in own.items()}
            if all(named[name] is not None for name in own if name.endswith(".weight")):
                tensors = {name: t if (a := named[name]) is None else a for name, t in network.tensors.items()}
                name = place.removesuffix(".")
                yield Network(name, name, network.prefix, network.family, tensors, True)
                break


# --- the choice ---


def choose(contents: Contents, found: Sequence[Network], weights: str | None, path: Path, notes: list[str]) -> Network:
    """The network to load: the one that ``weights`` names, or the averaged of several, with a note.

    Raises CheckpointError where the name or the choice is not clear, or nothing can be loaded.
    """
    loadable = [n for n in found if n.family.load is not None]
    if not loadable:
        raise CheckpointError(f"{path} is {found[0].family.refusal}")
    autoencoders = [n.name for n in found if n.family.name == AUTOENCODER]
    if autoencoders:
        raise CheckpointError(
            f"{path} is a latent diffusion model: beside its U-Net it holds an autoencoder ({listing(autoencoders)}); "
            "it is no DDPM over pixels: run it in its own code"
        )
    names = ", ".join(n.name for n in loadable)
    if weights is not None:
        chosen = _named(loadable, weights, path)
        if len(loadable) > 1:
            notes.append(f"of the {len(loadable)} networks in the file ({names}) {chosen.name} is used, as asked")
        return chosen
    loadable = _distinct(loadable)
    for place, averages in contents.ordered.items():
        name = place.removesuffix(".") or "shadow_params"
        if averages and name not in [n.place for n in found]:
            raise CheckpointError(
                f"{path}: its averages ({name}, {len(averages)} tensors) fit no network in the file ({names}) in only "
                f"one way, so they have no names; the trained weights are loaded by weights={loadable[0].name!r} "
                f"(--weights {loadable[0].name}), and sample worse"
            )
    names = ", ".join(n.name for n in loadable)
    averaged = [n for n in loadable if n.averaged]
    unread = [] if averaged else [name for name in contents.unread if _is_averaged(name, {})]
    if unread:
        raise CheckpointError(
            f"{path}: its averages ({listing(unread)}) are no tensors but objects of a class that is not read here; "
            f"save them as a state dict of tensors, or load the trained weights by weights={loadable[0].name!r} "
            f"(--weights {loadable[0].name}), which sample worse"
        )
    if len(loadable) == 1:
        if averaged:
            notes.append(f"the network in the file is an averaged one ({averaged[0].name})")
        return loadable[0]
    if len(averaged) != 1:
        which = "none of them averaged" if not averaged else f"{len(averaged)} of them averaged"
        first = (averaged or loadable)[0].name
        raise CheckpointError(
            f"{path} holds {len(loadable)} networks ({names}), {which}: choose one, as in weights={first!r} "
            f"(--weights {first})"
        )
    notes.append(
        f"of the {len(loadable)} networks in the file ({names}) the averaged one, {averaged[0].name}, is used; "
        "weights=NAME (--weights NAME) takes another"
    )
    return averaged[0]


def _distinct(found: Sequence[Network]) -> list[Network]:
    """Without networks that are the very tensors of another one; the averaged of such stays."""
    seen: dict[tuple[int, ...], Network] = {}
    for network in found:
        places = tuple(t.data_ptr() if t.layout == torch.strided else id(t) for t in network.tensors.values())
        if places not in seen or (network.averaged and not seen[places].averaged):
            seen[places] = network
    return list(seen.values())


def _named(found: Sequence[Network], weights: str, path: Path) -> Network:
    """By its own name, by a dotted beginning of its place, or by one part of it; of several the averaged one."""
    wanted = weights.strip(".")
    for fitting in (
        [n for n in found if wanted in (n.name, n.place)],
        [n for n in found if n.name.startswith(f"{wanted}.") or n.place.startswith(f"{wanted}.")],
        [n for n in found if wanted in n.place.split(".")],
    ):
        fitting = fitting if len(fitting) == 1 else [n for n in fitting if n.averaged]
        if len(fitting) == 1:
            return fitting[0]
    raise CheckpointError(f"{path} has no weights {weights!r}; it has {', '.join(n.name for n in found)}")


def without_strays(network: Network, notes: list[str]) -> dict[str, Tensor]:
    """The network's tensors without counters, random states and schedules that were saved in its own state dict."""
    if network.without_average:
        notes.append(
            f"{len(network.without_average)} tensors have no average, so the trained ones are used: "
            f"{listing(list(network.without_average))}"
        )
    left = {n for n, t in network.tensors.items() if n not in network.family.reads and _is_stray(n, t)}
    if left:
        notes.append(f"left out, as they are no weights: {listing(sorted(left))}")
    return {name: t for name, t in network.tensors.items() if name not in left}


def _is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not _is_stray(name, tensor)


def _is_stray(name: str, tensor: Tensor) -> bool:
    if _BOOKKEEPING.fullmatch(name):
        return True
    if "." in name:
        return False
    counter = tensor.ndim == 0 or not (tensor.is_floating_point() or tensor.is_complex())
    return counter or (tensor.ndim == 1 and _SCHEDULE.fullmatch(name) is not None)


def note_left_out(contents: Contents, network: Network, found: Sequence[Network], notes: list[str]) -> None:
    """Notes what the file holds beside its networks, by the shortest names that tell it from the chosen one."""
    if "inner_model" in network.prefix.split("."):
        notes.append(
            "the network is an inner_model, as k-diffusion wraps them: its images are right if it was trained on the "
            "timesteps of a DDPM, and not on continuous noise levels (sigmas)"
        )
    prefixes = tuple(n.prefix for n in found if n.family.load is not None)
    places = {n.place for n in found}
    inside = network.prefix.split(".")[:-1]
    names: dict[str, None] = {}
    ordered = [f"{place}shadow_params" for place in contents.ordered if place.removesuffix(".") not in places]
    for name in (*contents.tensors, *ordered, *contents.others):
        parts = name.split(".")
        of_average = any(place and name.startswith(f"{place}.") for place in places)
        if not name or name.startswith(prefixes) or of_average or parts[-1] in network.family.reads:
            continue
        common = next((i for i, (a, b) in enumerate(zip(parts, inside)) if a != b), min(len(parts), len(inside)))
        names[".".join(parts[: common + 1])] = None
    if names:
        which = "" if len(prefixes) > 1 else f"the network in the file is {network.name}; "
        notes.append(f"{which}left out: {listing(list(names), 6)}")
