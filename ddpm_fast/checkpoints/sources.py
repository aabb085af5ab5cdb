"""Where a checkpoint comes from: a path, a place on the Hugging Face hub, or a DDUF file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from .files import CheckpointError, first_line, listing
from .layout import ACCELERATE, CONFIG, LABELS, MODEL_INDEX, PLAIN, SCHEDULER, UNETS, WEIGHTS

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(/(?P<inside>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
_REFS = re.compile(r"(refs/(?:pr|convert)/[^/]+)(?:/(.*))?")  # a revision that has slashes itself
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".dduf")
MAX_MEMBERS = 10_000


class HubPlace(NamedTuple):
    """A repository, a revision of it, and a folder or file inside."""

    repo: str
    revision: str | None
    inside: str  # "" for the whole

    def __str__(self) -> str:
        return self.repo + (f"/{self.inside}" if self.inside else "") + (f"@{self.revision}" if self.revision else "")


@contextmanager
def opened(source: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder or file of a source, for the time of the block: a DDUF file is unpacked for that long.

    Raises CheckpointError for what is not there.
    """
    path = _local(source)
    if path.suffix.lower() != ".dduf" or not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ddpm_fast-") as folder:
        try:
            _unpack(path, Path(folder))
            yield Path(folder)
        except CheckpointError as error:  # its message names files of the folder
            raise CheckpointError(str(error).replace(folder, str(path))) from None


def _local(source: str | os.PathLike[str]) -> Path:
    text = os.fspath(source)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise CheckpointError(f"{text} cannot be found: {first_line(error)}") from None
    if path.exists():
        return path
    place = hub_place(text) if isinstance(source, str) else None
    if place is not None:
        return download(place)
    raise CheckpointError(f"{path} does not exist, neither as a folder nor as a file")


# --- the hub ---


def hub_place(text: str) -> HubPlace | None:
    """org/name[/folder][@revision], hf://org/name[@revision][/folder], or the address of a page on the hub.

    None for what is no place on the hub, or rather a local path: a file's name, or below a folder that is there.
    Raises CheckpointError for other addresses.
    """
    if text.startswith(tuple(f"{host}/" for host in _HOSTS)):
        text = f"https://{text}"
    scheme, separator, rest = text.partition("://")
    if not separator:
        match = _HUB_ID.fullmatch(text)
        if match is None or ".." in text:
            return None
        if match["inside"] and (text.lower().endswith(_SUFFIXES) or Path(text.partition("/")[0]).is_dir()):
            return None
        return HubPlace(match["repo"], match["revision"], (match["inside"] or "").strip("/"))
    parts: list[str]
    if scheme == "hf":
        parts = [part for part in rest.removeprefix("models/").split("/") if part]
        if len(parts) > 1 and "@" in parts[1]:
            parts[1], _, revision = parts[1].partition("@")
            parts[2:2] = ["tree", *unquote(revision).split("/")]
        elif len(parts) > 2:
            parts.insert(2, "tree")
            parts.insert(3, "")
    else:
        address = urlsplit(text)
        if scheme not in ("http", "https") or (address.hostname or "") not in _HOSTS:
            raise CheckpointError(
                f"{text} is not fetched: addresses are of huggingface.co (https://huggingface.co/org/name); download "
                "the file and name it"
            )
        parts = [part for part in unquote(address.path).split("/") if part]
    if parts[:1] in (["datasets"], ["spaces"]):
        raise CheckpointError(f"{text} is of one of the hub's {parts[0]}, not of a model")
    named = len(parts) >= 2 and all(re.fullmatch(_NAME, part) for part in parts[:2])
    if not named or ".." in parts or (len(parts) > 2 and parts[2] not in ("tree", "blob", "resolve")):
        raise CheckpointError(f"{text} is not the address of a model on the hub, as https://huggingface.co/org/name is")
    behind = "/".join(parts[3:])
    refs = _REFS.fullmatch(behind)
    revision, inside = (refs[1], refs[2] or "") if refs else (behind.partition("/")[0], behind.partition("/")[2])
    return HubPlace("/".join(parts[:2]), None if revision in ("", "main") else revision, inside)


def download(place: HubPlace) -> Path:
    """A snapshot of the small JSON files and the preferred weights alone. Code in a repository is never fetched."""
    import huggingface_hub  # here: loading a local file must not need it

    inside = place.inside.strip("/")
    a_file = inside.lower().endswith(_SUFFIXES)
    name = inside.rpartition("/")[2] if a_file else ""
    base = inside.removesuffix(name).strip("/")
    base = f"{base}/" if base else ""
    above = base[: base.rstrip("/").rfind("/") + 1]  # of a U-Net's folder: the pipeline's
    places = (base, *(f"{base}{unet}/" for unet in UNETS))
    small = [f"{p}{file}" for p in dict.fromkeys((base, above)) for file in (MODEL_INDEX, SCHEDULER, LABELS)]
    small += [f"{p}scheduler/{SCHEDULER}" for p in dict.fromkeys((base, above))]
    small += [f"{p}{CONFIG}" for p in places]
    kinds: list[list[str]] = [
        [f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*-of-*.safetensors"],
        [f"{WEIGHTS}.bin", f"{WEIGHTS}.bin.index.json", f"{WEIGHTS}-*-of-*.bin"],
        [f"{WEIGHTS}.*"],  # variants
        [*ACCELERATE, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"],
    ]
    if a_file:
        kinds, places = [[name]], (base,)
    folder = None
    for wanted in kinds:
        patterns = small + [f"{p}{kind}" for p in places for kind in wanted]
        try:
            folder = Path(
                huggingface_hub.snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns)
            )
        except Exception as error:
            raise CheckpointError(
                f"{place} is neither a local path nor could it be had from the hub ({first_line(error)})"
            ) from None
        if a_file and (folder / inside).exists():
            return folder / inside
        if not a_file and any((folder / p / file).exists() for p in places for file in (*PLAIN, *ACCELERATE)):
            break
    if folder is None or a_file or not (folder / inside).is_dir():
        raise CheckpointError(f"{place} has none of the files of a diffusers checkpoint")
    return folder / inside


# --- DDUF: a pipeline of diffusers as one uncompressed zip ---


def _unpack(path: Path, folder: Path) -> None:
    """The members that a checkpoint of a U-Net has, under their own names."""
    places = ("", *(f"{name}/" for name in UNETS))
    small = {MODEL_INDEX, LABELS, SCHEDULER, f"scheduler/{SCHEDULER}", *(f"{p}{CONFIG}" for p in places)}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(entries) > MAX_MEMBERS or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is no DDUF file: its members are too many, or compressed")
            if MODEL_INDEX not in names:
                raise CheckpointError(f"{path} is no DDUF file: it has no {MODEL_INDEX}; it has {listing(names)}")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path} is damaged: its members claim more bytes than it has")
            for entry in entries:
                home, _, file = entry.filename.rpartition("/")
                weights = (home in ("", *UNETS) and file.startswith(f"{WEIGHTS}.")) or file.startswith(f"{WEIGHTS}-")
                if entry.filename in small or (weights and home in ("", *UNETS) and "\\" not in file):
                    target = folder / home / file
                    target.parent.mkdir(exist_ok=True)
                    with archive.open(entry) as stream, open(target, "wb") as out:
                        shutil.copyfileobj(stream, out, 1 << 20)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or truncated: {first_line(error)}") from None
