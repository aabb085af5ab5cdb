"""What a set of samples is a function of, as plain values: two runs of one manifest draw the same bytes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..sampler import Sampler

FORMAT = 1
MOST_SHARDS = 1_000_000  # six digits, so that names sort
TARGET_SHARDS = 1000  # about as many as a set is cut into, where a shard of one batch would make more
# What may differ between the runs of one set: where the weights lay, and what it runs on (warned of).
_NOT_COMPARED = ("source", "environment", "ops_reason")
_CHAIN = ("sampler.steps:", "sampler.method:", "sampler.eta:")  # the words for what the table holds


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of a model's configuration and weights, by name."""
    digest = hashlib.sha256(json.dumps(config_of(model), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_of(model: torch.nn.Module) -> dict[str, Any]:
    """A U-Net's configuration; of a network of another code base its class."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return to_dict() if callable(to_dict) else {"class": type(model).__name__}


def shard_size(n: int, batch_size: int) -> int:
    """Images a shard where none is asked for: whole batches, as few as keep a set near 1,000 shards."""
    batches = -(-n // batch_size)
    return batch_size * max(1, -(-batches // TARGET_SHARDS))


def label_of(rule: int | str | None, sample_id: int, classes: int) -> int:
    """The class of a sample: the one named, or all of them in turn by the id."""
    assert rule is not None
    return sample_id % classes if rule == "all" else int(rule)


def describe(
    checkpoint: Checkpoint,
    sampler: Sampler,
    *,
    n: int,
    seed: int,
    first_id: int,
    label: int | str | None,  # a class, "all", or None for a model without
    shard_size: int,  # images
    truncate: bool,
    chain: Mapping[str, Any],  # method, steps and eta as they were asked for: to name a difference by
) -> dict[str, Any]:
    """The manifest of a set, JSON-ready."""
    table = sampler.table
    digest = hashlib.sha256(table.rows.contiguous().numpy().tobytes())
    digest.update(repr((table.timesteps, table.variance, table.thresholding, table.learned)).encode())
    channels, height, width = sampler.image_shape
    options = {
        **chain,
        "table": digest.hexdigest(),
        "guidance_scale": sampler.guidance_scale,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "ops": sampler.ops.name,
        "normalisation": sampler.ops.normalises(sampler.dtype),  # compiled, it rounds another way
        "batch_size": sampler.batch_size,  # a library may round another way in another batch
        "to_uint8": "truncate" if truncate else "round",
    }
    return {
        "format": FORMAT,
        "n": n,
        "seed": seed,
        "first_id": first_id,
        "shard_size": shard_size,
        "image_shape": [height, width, channels],
        "labels": None if label is None else {"rule": label, "classes": classes_of(sampler)},
        "model": {"fingerprint": fingerprint(checkpoint.model), "config": config_of(checkpoint.model)},
        "schedule": checkpoint.schedule.to_dict(),
        "sampler": options,
        "device": sampler.device.type,
        # A CPU's libraries cut sums by the number of threads, and so round by it.
        "threads": torch.get_num_threads() if sampler.device.type == "cpu" else None,
        "source": checkpoint.source,
        "ops_reason": sampler.ops_reason,
        "environment": environment(sampler.device),
    }


def is_known_format(value: Any) -> bool:
    return _is_whole(value, FORMAT, FORMAT + 1)


def check_manifest(manifest: Any) -> None:
    """Raise ValueError, naming the field, unless a set can be made and read by this manifest.

    Only what is read back is checked; everything else is compared and no more.
    """
    if not isinstance(manifest, Mapping):
        raise ValueError(f"a manifest is a JSON object; got {_short(manifest)}")
    for name in ("format", "labels", "threads"):
        if name not in manifest:
            raise ValueError(f"{name} is missing")
    n = _whole(manifest, "n", 1, 2**63)
    _whole(manifest, "seed", -(2**63), 2**64)
    _whole(manifest, "first_id", 0, 2**63 - n + 1)
    size = _whole(manifest, "shard_size", 1, 2**63)
    if -(-n // size) >= MOST_SHARDS:
        raise ValueError(
            f"a set has less than {MOST_SHARDS:,} shards; got {-(-n // size):,}: {-(-n // (MOST_SHARDS - 1)):,} images "
            "a shard are the least"
        )
    shape = manifest.get("image_shape")
    if not isinstance(shape, (list, tuple)) or len(shape) != 3 or not all(_is_whole(side, 1, 2**31) for side in shape):
        raise ValueError(f"image_shape must be three positive whole numbers (H, W, C); got {_short(shape)}")
    if size * shape[0] * shape[1] * shape[2] >= 2**63:
        raise ValueError(f"shard_size and image_shape must make a shard that can be; got {size} of {_short(shape)}")
    for name in ("model", "schedule", "sampler", "environment"):
        _section(manifest, name)
    if not isinstance(manifest.get("device"), str):
        raise ValueError(f"device must be text; got {_short(manifest.get('device'))}")
    if manifest["threads"] is not None:
        _whole(manifest, "threads", 1, 2**20)
    sampler = manifest["sampler"]
    _whole(sampler, "batch_size", 1, 2**63, "sampler.")
    if not isinstance(sampler.get("ops"), str):
        raise ValueError(f"sampler.ops must be text; got {_short(sampler.get('ops'))}")
    if sampler.get("to_uint8") not in ("round", "truncate"):
        raise ValueError(f"sampler.to_uint8 must be round or truncate; got {_short(sampler.get('to_uint8'))}")
    if manifest["labels"] is not None:
        _check_labels(_section(manifest, "labels"))


def _check_labels(labels: Mapping[str, Any]) -> None:
    rule, classes = labels.get("rule"), labels.get("classes")
    if rule == "all" or classes is not None:
        _whole(labels, "classes", 1, 2**31, "labels.")
    if rule != "all" and not _is_whole(rule, 0, 2**31):
        raise ValueError(f'labels.rule must be "all" or the number of a class; got {_short(rule)}')


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} must be a JSON object; got {_short(section)}")
    return section


def _whole(values: Mapping[str, Any], name: str, least: int, end: int, path: str = "") -> int:
    value = values.get(name)
    if not _is_whole(value, least, end):
        raise ValueError(f"{path}{name} must be a whole number from {least} to {end - 1}; got {_short(value)}")
    return value  # type: ignore[return-value]


def _is_whole(value: Any, least: int, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < end


def classes_of(sampler: Sampler) -> int | None:
    """The number of classes that images can be of: without the one that stands for none."""
    classes = sampler.num_classes
    return classes - 1 if classes is not None and sampler.null_class is not None else classes


def environment(device: torch.device) -> dict[str, str | None]:
    """Versions and device: of two runs that differ here, images may differ in their last bit."""
    gpu = device.type == "cuda"
    return {
        "ddpm_fast": __version__,
        "torch": torch.__version__,
        "triton": _version("triton") if gpu else None,
        "device_name": torch.cuda.get_device_name(device) if gpu else _processor(),
    }


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """["sampler.eta: was 0.0, now 0.5", ...]: what would make the images others. [] if nothing would."""
    was, now = {k: v for k, v in was.items() if k not in _NOT_COMPARED}, _plain(now)
    if "normalisation" not in was["sampler"]:  # written before there was such a field
        was["sampler"] = {"normalisation": now["sampler"].get("normalisation"), **was["sampler"]}
    found = _compare(was, now, "")
    chain = [line for line in found if line.startswith(_CHAIN)]
    table = [line for line in found if line.startswith("sampler.table:")]
    named = [line for line in found if line not in chain and line not in table]
    if not table:  # another spelling of the same chain is no difference
        return named
    return named + chain if named or chain else table


def environment_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What about the machine and its software is not as it was."""
    return _compare(was.get("environment", {}), _plain(now)["environment"], "")


def _plain(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from its file: lists for tuples, and so on."""
    return json.loads(json.dumps(manifest))


def _compare(was: Mapping[str, Any], now: Mapping[str, Any], path: str) -> list[str]:
    found = []
    for key in sorted({*was, *now} - (set(_NOT_COMPARED) if not path else set())):
        name, old, new = path + key, was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _compare(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: was {_short(old)}, now {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
