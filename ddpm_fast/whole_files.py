"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EINVAL, errno.EACCES}


@contextmanager
def whole_file(path: str | Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name ``path`` when the block ends, and goes if it fails.

    It is on the disk before it has its name, and so is the name when this returns. A symbolic link keeps its place:
    the file that it points to is replaced. A device or a pipe is written to as it is. temporary: what it is called
    until then, on the same file system, its folder and that of ``path`` being there; default: a random name beside
    ``path``, whose folder is made.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    if _is_special(path):
        with open(path, "wb") as file:
            yield file
        return
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


def write_once(path: Path, content: bytes) -> bool:
    """Write ``path`` unless it is there already; whether this call wrote it. Of several processes one does."""
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with whole_file(own) as file:
            file.write(content)
        os.link(own, path)  # unlike a rename, this fails where the name is taken
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS or not own.exists():
            raise
        if path.exists():
            return False
        os.replace(own, path)  # a file system without hard links: FAT, some network ones
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def check_file(path: str | Path, option: str = "") -> None:
    """Make sure, before the work begins, that a file can be written at ``path``; its folder is made.

    Args:
        path: the file that is to be written or replaced.
        option: the command line's name for it, for the message.

    Raises:
        OSError: with one line that names ``path`` and what is wrong: it is a folder, it is read-only, a file stands
            where its folder should be, or nothing can be created there.
    """
    path, name = Path(path), f"{option} {path}".strip()
    with _refused(name):
        if path.is_dir():
            raise IsADirectoryError(f"{name} is a folder; give a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{name} cannot be written to: it is read-only")
        if _is_special(path):
            return
        real = Path(os.path.realpath(path))
        make_folder(real.parent)
        _try(real.parent, real.name)


def check_folder(path: str | Path, option: str = "", make: bool = True) -> None:
    """Make sure, before the work begins, that files can be written in the folder ``path``.

    Args and Raises are those of `check_file`. make: keep the folder that was made for the trial; otherwise it is
    removed again, so that a command that is refused leaves nothing.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with _refused(f"{option} {path}".strip()):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} cannot be a folder: a file is in its way")
        try:
            make_folder(path)
            _try(path, "")
        finally:
            for folder in () if make else missing:
                with suppress(OSError):  # not made, or another process writes there by now
                    folder.rmdir()


def check_names(folder: Path, files: Collection[str], folders: Collection[str]) -> None:
    """Make sure that no folder is in the way of ``files`` in a folder, and no file in that of ``folders``.

    Raises:
        OSError: with one line that names what is in the way.
    """
    for name in files:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} must be a file, and a folder is in its way")
    for name in folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise NotADirectoryError(f"{folder / name} cannot be a folder: a file is in its way")


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Says of the system's errors what they are about."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of ours
            raise
        raise type(error)(f"{name} cannot be written: {error.strerror}") from None


def _try(folder: Path, name: str) -> None:
    """Write a file as `whole_file` would, and remove it. os.access knows nothing of /proc, long names, full disks."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    try:
        os.write(handle, b"0")
    finally:
        os.close(handle)
        os.unlink(temporary)


def _is_special(path: Path) -> bool:
    """Whether it is there and neither a file nor a folder: a device, a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


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
