"""Where things lie in a diffusers-layout folder: pipeline, root and bare ones, and training folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from .files import CheckpointError, listing, read_json
from .formats import foreign_format
from .schedulers import PIPELINES_BY_SIGMA, by_sigma, check_scheduler

WEIGHTS = "diffusion_pytorch_model"
CONFIG, SCHEDULER, MODEL_INDEX, LABELS = "config.json", "scheduler_config.json", "model_index.json", "labels.json"
UNETS = ("unet_ema", "unet")  # the averaged weights of a training folder are the ones to sample with
# Preferred first. An index wins over a single file, as upstream.
PLAIN = (f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin.index.json", f"{WEIGHTS}.bin")
# The names of accelerate's save_model and save_state, for a folder that has none of those.
ACCELERATE = tuple(
    f"{stem}{end}"
    for stem, kind in (("model", ".safetensors"), ("pytorch_model", ".bin"))
    for end in (f"{kind}.index.json", kind)
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
PIPELINE = "_pipeline"  # the key under which a scheduler's settings tell the class that model_index.json names


class Layout(NamedTuple):
    """The parts of a checkpoint, its small files read."""

    weights: Path  # a file, or the index of its shards
    config: dict[str, Any] | None
    scheduler: dict[str, Any] | None
    labels: list[str] | None
    notes: list[str]
    choice: str | None = None  # which network of the file was asked for, where no folder answers that


def locate(path: Path, choice: str | None = None) -> Layout:
    """The parts of the checkpoint at path, a folder or one weights file. Raises CheckpointError.

    choice: one of the folders of a pipeline ("unet", "unet_ema"), or the name of a network in the file.
    """
    if path.is_dir():
        unet, notes = _unet_folder(path, choice)
        choice = None if unet.name == choice else choice
        weights, note = _choose_weights(unet)
        notes += note
        config = read_json(unet / CONFIG) if (unet / CONFIG).exists() else None
        check_class(config, unet / CONFIG)
    else:
        if path.name in (MODEL_INDEX, CONFIG, SCHEDULER):
            raise CheckpointError(f"{path} is a configuration, not weights; name its folder, {path.parent}")
        unet, weights, notes = path.parent, path, []
        config = read_json(unet / CONFIG) if (unet / CONFIG).exists() else None
        if config is not None and not _describes_unet(config):
            notes.append(f"the {CONFIG} beside the file is not a U-Net's; not used")
            config = None
    root = unet.parent if unet.name in UNETS else unet
    if config is not None or path.is_dir():
        check_pipeline(root)
        scheduler, scheduler_notes = _scheduler(root)
        notes += scheduler_notes
    else:
        scheduler = None
    return Layout(weights, config, scheduler, _labels(root), notes, choice)


def find_weights(folder: Path) -> Path | None:
    """The preferred weights file of a folder under its plain name, or None."""
    return next((folder / name for name in PLAIN if (folder / name).exists()), None)


def check_class(config: dict[str, Any] | None, path: Path) -> None:
    """CheckpointError unless the config is one of a UNet2DModel."""
    name = (config or {}).get("_class_name", "UNet2DModel")
    if config is not None and "_class_name" not in config and "model_type" in config:
        raise CheckpointError(f"{path} is of a model of transformers ({config['model_type']}), no diffusion model")
    if name == "UNet2DConditionModel":
        raise CheckpointError(f"{path} is of a UNet2DConditionModel, guided by text or images; that is not supported")
    if name != "UNet2DModel":
        raise CheckpointError(f"{path} is of a {name}; only the unconditional UNet2DModel is supported")


def check_pipeline(root: Path) -> None:
    """CheckpointError if a model_index.json says that this is not a pixel-space DDPM."""
    path = root / MODEL_INDEX
    if not path.exists():
        return
    index = read_json(path)
    parts = {k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and any(v)}
    extra = sorted(parts - {"unet", "scheduler"})
    name = index.get("_class_name")
    if any(part in ("vae", "vqvae", "text_encoder", "bert") for part in extra):
        raise CheckpointError(
            f"{path} is of a {name} with {listing(extra)}: latent or text-guided diffusion, not a pixel-space DDPM"
        )
    if name in PIPELINES_BY_SIGMA:
        raise CheckpointError(f"{path} is of a {name}, {by_sigma(name)}")
    unet = index.get("unet")
    if isinstance(unet, list):
        check_class({"_class_name": unet[-1]}, path)


def _unet_folder(root: Path, choice: str | None) -> tuple[Path, list[str]]:
    """The folder of the U-Net: a sub-folder if there is one, else the root; else the newest checkpoint-N's."""
    present = [name for name in UNETS if (root / name).is_dir()]
    if choice is not None and (choice in present or len(present) > 1):
        if choice not in present:
            raise CheckpointError(f"{root} has no weights {choice!r}; it has {', '.join(present)}")
        return root / choice, [f"of {' and '.join(present)}, {choice} is used, as asked"] if len(present) > 1 else []
    if present:
        both = "the folder has both unet and unet_ema; the averaged weights, unet_ema, are used (--weights unet: the "
        return root / present[0], [both + "others)"] * (len(present) > 1)
    if not _any_weights(root):
        numbered = {int(p.name[11:]): p for p in root.glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()}
        if numbered and (
            any((numbered[max(numbered)] / name).is_dir() for name in UNETS) or _any_weights(numbered[max(numbered)])
        ):
            newest = numbered[max(numbered)]
            unet, notes = _unet_folder(newest, choice)
            return unet, [f"the newest training checkpoint, {newest.name}, is used", *notes]
    return root, []


def _any_weights(folder: Path) -> list[Path]:
    """Weights under the layout's name, any variant, or else under accelerate's; neither shards nor stray files."""
    found = folder.glob(f"{WEIGHTS}.*")
    weights = (p for p in found if re.search(r"\.(safetensors|bin)(\.index(\.\w+)?\.json)?$", p.name))
    return sorted(p for p in weights if not _SHARD.search(p.name)) or [
        folder / name for name in ACCELERATE if (folder / name).exists()
    ]


def _choose_weights(folder: Path) -> tuple[Path, list[str]]:
    plain = find_weights(folder)
    if plain is not None:
        return plain, []
    present = _any_weights(folder)
    if present and present[0].name in ACCELERATE:
        others = listing([path.name for path in present[1:]])
        return present[0], [f"{present[0].name} is used, and not {others} beside it"] if others else []
    variants: dict[str, Path] = {}
    for path in sorted(present, key=lambda p: (".safetensors" not in p.name, ".index" not in p.name)):
        rest = path.name.removeprefix(WEIGHTS + ".")
        variant = re.sub(r"\.?(safetensors|bin|index|json)\b", "", rest).strip(".")
        variants.setdefault(variant, path)
    if len(variants) == 1:
        variant, path = variants.popitem()
        return path, [f"only the variant {variant!r} is there; it is used"]
    if variants:
        names = listing([p.name for p in variants.values()])
        raise CheckpointError(f"{folder} has several variants of the weights ({names}); name one of the files")
    raise CheckpointError(f"{folder} {_without_weights(folder)}")


def _without_weights(folder: Path) -> str:
    """Why a folder has nothing to load, and what to do."""
    names = sorted(p.name for p in folder.iterdir())
    others = [name for name in names if Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl")]
    if any(_SHARD.search(name) for name in others):
        return f"holds shards of weights ({listing(others)}) without their index.json"
    if any(name.endswith(".distcp") for name in names):
        return (
            "is a checkpoint of torch.distributed, spread over files; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
        )
    if "zero_to_fp32.py" in names:
        return "is a checkpoint of DeepSpeed, spread over files; make one file of it with the zero_to_fp32.py in it"
    foreign = [(name, kind) for name in names if (kind := foreign_format(Path(name), b"x")) is not None]
    if not others and foreign:
        return f"has no weights that can be read: its {foreign[0][0]} is {foreign[0][1]}"
    hint = f"; it holds {listing(others)}: to load one of them, name the file" if others else ""
    return f"has no weights ({WEIGHTS}.safetensors or .bin){hint}"


def _describes_unet(config: dict[str, Any]) -> bool:
    return str(config.get("_class_name", "")).startswith("UNet2D") or "block_out_channels" in config


def _scheduler(root: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The scheduler's file, its class checked; a training checkpoint has it in the run's folder above."""
    roots = [root] + ([root.parent] if re.fullmatch(r"checkpoint-\d+", root.name) else [])
    for place in roots:
        folder = place / "scheduler" if (place / "scheduler").is_dir() else place
        path = folder / SCHEDULER
        config = read_json(path) if path.exists() else None
        index = read_json(place / MODEL_INDEX) if (place / MODEL_INDEX).exists() else {}
        entry = index.get("scheduler")
        named = entry[-1] if isinstance(entry, list) and entry else None
        check_scheduler(named, place / MODEL_INDEX)
        if config is not None:
            check_scheduler(config.get("_class_name"), path)
            if named is not None:  # as upstream: the index has the last word
                config["_class_name"] = named
            config[PIPELINE] = index.get("_class_name")
            return config, [] if place == root else [f"the schedule is that of {place.name}, the folder above"]
    return None, []


def _labels(root: Path) -> list[str] | None:
    path = root / LABELS
    if not path.exists():
        return None
    labels = read_json(path).get("labels")
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise CheckpointError(f"{path} must hold {{'labels': [names of the classes]}}")
    return labels
