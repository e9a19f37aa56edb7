"""Everything that the package changes on disk: atomic writes of files, journals, folders.

A file is first written next to its place as `.NAME.N.tmp` and renamed when its bytes are on the disk. So a kill at any
time leaves either the old file or the new one.  A temporary file left by a kill is removed by the next write of the
same name.  A lock shows whether its writer is still running: a writer holds a shared lock on the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO

_TEMPORARY = re.compile(r"\..+\.\w+\.tmp")


@contextmanager
def replacing(path: Path, wait: bool = True) -> Iterator[Path]:
    """An empty file to write. It is renamed to `path` if the block succeeds, and removed otherwise.

    When renamed, its bytes are on the disk (unless `wait` is False: then a power cut may lose them, a kill may not),
    and it has the permissions of the umask.  Raises an OSError that names `path`.
    """
    with saying_where(path), _temporary(path, path.parent, _create) as (temporary, mode):
        yield temporary
        os.chmod(temporary, mode)
        if wait:
            sync(temporary)
        os.replace(temporary, path)
        if wait:
            sync(path.parent)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill. It becomes `folder` if the block succeeds, and is removed otherwise.

    If `folder` exists, the new files replace those of the same names, and its other files stay.  Files belong together
    (weights and their configuration). So all old ones are removed before the first new one is moved, the largest first,
    and the largest new one is moved last. A kill in between leaves a folder without weights, never a mixture of two
    checkpoints.
    """
    there = folder.is_dir() and any(not is_temporary(p.name) for p in folder.iterdir())
    if not there:
        make_folder(folder.parent)
    with (
        saying_where(folder),
        _temporary(folder, folder if there else folder.parent, _create_folder) as (temporary, _),
    ):
        yield temporary
        made = sorted(temporary.iterdir(), key=lambda p: (p.stat().st_size, p.name))
        for path in made:
            sync(path)
        if not there:
            clean(folder)
            os.replace(temporary, folder)
            sync(folder.parent)
        elif len(made) == 1:
            os.replace(made[0], folder / made[0].name)
            sync(folder)
        else:
            _exchange(made, folder)


def _exchange(made: list[Path], folder: Path) -> None:
    old = [folder / path.name for path in made if (folder / path.name).exists()]
    for path in sorted(old, key=lambda p: -p.stat().st_size):
        os.unlink(path)
    sync(folder)
    for path in made:
        os.replace(path, folder / path.name)
    sync(folder)


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file and wait until it is on the disk.  Raises an OSError that names `path`."""
    with saying_where(path):
        fresh = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        if fresh:
            sync(path.parent)


def truncate(path: Path, size: int) -> None:
    """Truncate a file to `size` bytes."""
    with saying_where(path):
        os.truncate(path, size)
        sync(path)


def remove(path: Path) -> None:
    """Remove a file, if it exists."""
    if path.exists():
        with saying_where(path):
            os.unlink(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder and everything in it, if it exists."""
    if not folder.is_dir():
        return
    with saying_where(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            else:
                os.unlink(path)
        os.rmdir(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents.  Raises an OSError that names it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with saying_where(folder):
        try:
            os.mkdir(folder)
        except FileExistsError:  # another process was faster
            if not folder.is_dir():
                raise


def lock(path: Path) -> IO[bytes]:
    """A file, created if missing, locked until it is closed.  BlockingIOError if another process has the lock."""
    with saying_where(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "r+b")


def is_temporary(name: str) -> bool:
    """Whether a file or folder with this name is being written, or was left by a kill."""
    return _TEMPORARY.fullmatch(name) is not None


def clean(folder: Path) -> None:
    """Remove what a kill left in a folder.  Nothing is removed while another writer uses the folder."""
    if not folder.is_dir():
        return
    with _writing_in(folder) as handle:
        if handle is not None and _alone(handle):
            for path in [p for p in folder.iterdir() if is_temporary(p.name)]:
                _discard(path)


@contextmanager
def saying_where(path: Path, more: str = "") -> Iterator[None]:
    """An OSError within the block becomes one that says which file was being written, whether the disk is full,
    and `more`."""
    try:
        yield
    except OSError as error:
        if getattr(error, "said", False):  # an inner block has already named the file
            if more:
                raise _told(f"{error}{more}", error) from error
            raise
        if error.filename is not None and not _about(
            str(error.filename), path
        ):  # the error is about reading another file
            raise
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise _told(f"{path}: {why}{more}", error) from error


def sync(path: Path) -> None:
    """Wait until the contents of a file or folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _about(name: str, path: Path) -> bool:
    """Whether a file's name is that of `path`, of its folder, or of its temporary file."""
    return Path(name) in (path, path.parent) or any(is_temporary(part) for part in Path(name).parts)


def _told(text: str, error: OSError) -> OSError:
    told = OSError(text)
    told.errno, told.said = error.errno, True  # type: ignore[attr-defined]
    return told


@contextmanager
def _temporary(path: Path, folder: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """(what `make` created under a temporary name in `folder`, `make`'s result); removed at the end if still there."""
    with _writing_in(folder) as handle:
        temporary, mode = _claimed(path.name, folder, make, handle)
        try:
            yield temporary, mode
        finally:
            _discard(temporary)


def _claimed(name: str, folder: Path, make: Callable[[Path], int], handle: int | None) -> tuple[Path, int]:
    names = (folder / f".{name}.{number}.tmp" for number in count())
    first, second = folder / f".{name}.0.tmp", folder / f".{name}.1.tmp"
    if handle is not None and (os.path.lexists(first) or os.path.lexists(second)) and _alone(handle):
        for path in folder.glob(f".{_escaped(name)}.*.tmp"):
            _discard(path)
        fcntl.flock(handle, fcntl.LOCK_SH)
    for temporary in names:
        try:
            return temporary, make(temporary)
        except FileExistsError:  # another process is writing the same file now
            continue
    raise AssertionError("count() is endless")


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _create(path: Path) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(handle).st_mode & 0o7777
    finally:
        os.close(handle)


def _create_folder(path: Path) -> int:
    os.mkdir(path)
    return 0


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    elif os.path.lexists(path):
        os.unlink(path)


@contextmanager
def _writing_in(folder: Path) -> Iterator[int | None]:
    """A handle with a shared lock on a folder; None if its file system has no locks: then nothing is cleaned up."""
    handle = os.open(folder, os.O_RDONLY)
    locks = True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        locks = False
    try:
        yield handle if locks else None
    finally:
        os.close(handle)


def _alone(handle: int) -> bool:
    """Whether there is no other writer in a folder; if so, the lock becomes exclusive."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(handle, fcntl.LOCK_SH)  # the failed conversion may have lost it
        return False
    return True
