"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: str | Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name ``path`` when the block ends, and goes if it fails.

    It is on the disk before it has its name, and so is the name when this returns. temporary: what it is called
    until then, on the same file system, its folder and that of ``path`` being there; default: a random name beside
    ``path``, whose folder is made.
    """
    path = Path(path)
    if temporary is None:
        make_folder(path.parent)
    try:
        if temporary is None:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            file, temporary = os.fdopen(handle, "wb"), Path(name)
        else:
            file = open(temporary, "wb")  # noqa: SIM115
    except OSError as error:
        raise _of(path, error) from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):  # of a full disk, it has no name
            raise _of(path, error) from None
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes beside ``path``, flushes to the disk, and renames: ``path`` is whole or not there.

    The temporary name is always the same, so a run that is killed again and again leaves one such file at most.
    """
    with whole_file(path, path.with_name(path.name + ".tmp")) as stream:
        write(stream)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk: a rename lives in the folder, not in the file."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: str | Path) -> None:
    """Make a folder, or OSError (one line) if it cannot be made or written to."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder} cannot be a folder: a file is in its way") from None
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")


def _of(path: Path, error: OSError) -> OSError:
    """The error with the name that the user knows."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
