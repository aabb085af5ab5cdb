"""Reading weight and JSON files that a stranger may have made: bounded, checked, running nothing.

What is detected: git-lfs pointers, truncation, a damaged safetensors header, any damage to a zip-format torch.save
file (its CRCs), and damaged weights in the safetensors files that `save` writes (a CRC in their metadata). The
safetensors format itself has no checksum: in another program's file a flipped bit of a weight goes unseen unless
it makes a NaN or an infinity.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from .formats import foreign_format, foreign_zip
from .pickles import Names, kind_of, names_in, stand_ins

MAX_JSON_BYTES = 4 << 20  # a config is a few KB, an index of 10,000 tensors about 1 MB
MAX_HEADER_BYTES = 16 << 20
CRC_FIELD = "ddpm_fast.payload_crc32"
_LFS = b"version https://git-lfs"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; one line that says which file, what is wrong and what to do."""

    def __init__(self, message: str):
        # names from a foreign file may hold line breaks, terminal escapes or lone surrogates, and be endless
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:2000]))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in path, at most MAX_JSON_BYTES long."""
    _, size = _head(path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} holds {size:,} bytes; a JSON file here has at most {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content


def read_weights(path: Path) -> Any:
    """What a weights file holds: {name: Tensor} of a safetensors file or of a shard index, whatever a torch.save
    file has. Tensors are on the CPU and may lie in a mapping of the file. The format is told by the content.

    Raises CheckpointError.
    """
    head, _ = _head(path)
    is_zip = head.startswith(b"PK\x03\x04")
    kind = foreign_format(path, head)
    if kind is not None:
        raise CheckpointError(f"{path} is {kind}")
    if path.suffix == ".json":
        return read_sharded(path)
    pickled = head[:1] == b"\x80" and head[1:2] <= b"\x05" and head[8:9] != b"{"  # else a header's length
    if path.suffix == ".safetensors" and (is_zip or pickled):
        raise CheckpointError(f"{path} is a torch.save file under a safetensors name; rename it to .bin")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return read_safetensors(path)
    if is_zip or head.startswith(b"\x80"):
        return read_pickle(path)
    raise CheckpointError(
        f"{path} is not a checkpoint: neither a safetensors nor a torch.save file (it begins with {head[:16]!r})"
    )


def first_line(error: BaseException, limit: int = 200) -> str:
    """The error's kind and the first line of its message, for a one-line message of ours."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= limit else lines[0][:limit] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _head(path: Path) -> tuple[bytes, int]:
    """The first bytes and the size of a regular, readable file that is no git-lfs pointer."""
    try:
        if not path.exists():  # raises for a name that no file can have
            raise CheckpointError(f"{path} does not exist")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from None
    if not head:
        raise CheckpointError(f"{path} is empty; the download or the save that made it did not finish")
    if head.startswith(_LFS):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository, or download it"
        )
    return head, path.stat().st_size


# --- safetensors ---


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose header is consistent with its size and, if it has one, its CRC."""
    with open(path, "rb") as stream:
        metadata = _check_header(path, stream)
        if CRC_FIELD in metadata:
            _check_crc(path, stream, metadata[CRC_FIELD])
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None


def _check_header(path: Path, stream: BinaryIO) -> dict[str, Any]:
    """Leaves stream at the first byte of the tensors; returns the file's metadata."""
    size = path.stat().st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(
            f"{path} is damaged or truncated: its header claims {length:,} bytes, there are {max(size - 8, 0):,}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    try:
        header = json.loads(stream.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", None) or {}
        ends = [entry["data_offsets"][1] for entry in header.values()]
        end = max(ends, default=0)
        if not isinstance(metadata, dict) or not isinstance(end, int):
            raise TypeError("metadata must be an object, offsets integers")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is no safetensors header ({first_line(error)})") from None
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path} is damaged or truncated: its header describes {end:,} bytes of tensors, "
            f"the file holds {size - 8 - length:,}"
        )
    return metadata


def _check_crc(path: Path, stream: BinaryIO, expected: object) -> None:
    crc = 0
    while chunk := stream.read(1 << 20):
        crc = zlib.crc32(chunk, crc)
    if f"{crc:08x}" != expected:
        raise CheckpointError(
            f"{path} is damaged: its weights have CRC-32 {crc:08x}, its metadata says {expected} "
            f"(if another program changed the weights on purpose, remove the metadata field {CRC_FIELD})"
        )


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file of contiguous CPU tensors, with the CRC-32 of its weights in the metadata."""
    from safetensors.torch import save

    plain = save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    payload = memoryview(plain)[start:]
    header = json.loads(plain[8:start])
    header["__metadata__"] = {"format": "pt", CRC_FIELD: f"{zlib.crc32(payload):08x}"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the weights aligned to 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, payload))


# --- torch.save ---


def read_pickle(path: Path) -> Any:
    """The content of a torch.save file, loaded with weights_only=True and never otherwise."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < (2, 10):
        raise CheckpointError(
            f"{path} is a torch.save file, which only torch >= 2.10 reads safely (CVE-2025-32434, CVE-2026-24747); "
            f"this is {torch.__version__}: upgrade torch, or convert the file to safetensors"
        )
    with open(path, "rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"
    if is_zip:
        _check_zip(path)
    names = None if is_zip else _names(path, is_zip)
    if names is not None and not names.by_torch and (kind := kind_of(names)) is not None:
        raise CheckpointError(f"{path} is refused: it is {kind}; nothing in it was run")
    try:
        try:
            return _load(path, is_zip)
        except pickle.UnpicklingError as error:
            inert = stand_ins(_names(path, is_zip).imports)
            if not inert:
                raise
            try:
                with torch.serialization.safe_globals(inert):
                    return _load(path, is_zip)
            except pickle.UnpicklingError as second:
                raise (second if "GLOBAL" in str(second) else error) from None
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise CheckpointError(f"{path} is damaged: it claims more memory than there is") from None
        raise CheckpointError(_refusal(path, error)) from None


def _load(path: Path, is_zip: bool) -> Any:
    if is_zip:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with _Bounded(io.FileIO(path)) as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


def _names(path: Path, is_zip: bool) -> Names:
    """The names in a pickle, or in the one that is inside a zip file."""
    if not is_zip:
        with _Bounded(io.FileIO(path)) as stream:
            return names_in(stream)
    with zipfile.ZipFile(path) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return names_in(io.BytesIO(archive.read(member)))


class _Bounded(io.BufferedReader):
    """A file of which no more is asked than it has: a length in a pickle is believed before it is read."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(-1 if size is None or size < 0 else min(size, max(self._size - self.tell(), 0)))


def _refusal(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        # torch's own text goes on to recommend the unsafe way, so only the unpickler's word is passed on
        inner = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
        why = inner[1] if inner else type(error).__name__ if "weights_only" in str(error) else first_line(error)
        return f"{path} is damaged, or not a state dict of plain tensors: {why}"
    name = found[1].rstrip(".,`'\"")
    if "persistence" in name and (kind := kind_of(_names(path, zipfile.is_zipfile(path)))) is not None:
        return f"{path} is refused: it is {kind}; nothing in it was run"
    advice = "where you trust it, load it in the program that wrote it and save its state_dict() as safetensors"
    return f"{path} is refused: unpickling it would run {name}, which is not plain tensors; nothing was run; {advice}"


def _check_zip(path: Path) -> None:
    """CRCs, and that it is what torch.save writes: stored, not compressed, members that fit into the file."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            kind = foreign_zip([entry.filename for entry in entries])
            if kind is not None:
                raise CheckpointError(f"{path} is {kind}")
            if any("/code/" in entry.filename for entry in entries):
                raise CheckpointError(f"{path} is a TorchScript archive, a program and not a state dict")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is a compressed zip; torch.save never compresses, so it is not read")
            if sum(entry.file_size for entry in entries) > size:
                raise CheckpointError(f"{path} is damaged: its members claim more than the {size:,} bytes it has")
            if not any(entry.filename.endswith("/data.pkl") for entry in entries):
                raise CheckpointError(f"{path} is a zip file, but not one that torch.save wrote (no data.pkl)")
            broken = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or truncated: {first_line(error)}") from None
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its member {broken} is wrong")


# --- shards ---


def read_sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all the files that a shard index names, each where the index says it is."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no shard index: it has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    paths = {name: shard_path(index, name) for name in sorted(set(weight_map.values()))}
    tensors: dict[str, Tensor] = {}
    for name, path in paths.items():
        shard = read_weights(path)
        expected = {key for key, file in weight_map.items() if file == name}
        if not isinstance(shard, dict) or set(shard) != expected:
            keys = set(shard) if isinstance(shard, dict) else set()
            odd = sorted(map(str, expected ^ keys))
            raise CheckpointError(f"{path} and its index {index.name} differ in: {listing(odd)}")
        tensors.update(shard)
    return tensors


def shard_path(index: Path, name: str) -> Path:
    """The file that an index names: beneath the index's folder, or in the blobs of the same hub cache."""
    parts = PurePosixPath(name).parts
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name or "\0" in name
    if outside or not parts or ".." in parts or name.endswith(".json"):
        raise CheckpointError(f"{index} names {name!r}; a shard must be a weights file beneath the index's folder")
    folder, path = index.parent.resolve(), index.parent / name
    roots = [folder] + [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links, a name that no file can have
        raise CheckpointError(f"{index} names {name!r}, which cannot be found: {first_line(error)}") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{index} names {name!r}, a link that leads out of its folder")
    return path


def listing(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
