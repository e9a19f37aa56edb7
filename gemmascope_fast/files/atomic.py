"""Files that appear whole: written beside their place under another name, and renamed once they are on the disk."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file to write, which gets the name `path` when the block ends well and is removed otherwise.

    By then its bytes are on the disk, and its permissions are those of the umask, however the block wrote it: one
    that writes by way of a temporary file of its own (safetensors) would leave it readable by its owner alone.  A kill
    leaves `path` as it was, and at most the other file, `.NAME.….tmp`, beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = os.fstat(handle).st_mode & 0o7777
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def saying_where(path: Path, more: str = "") -> Iterator[None]:
    """An OSError from within becomes one that says which file was being written, that the disk is full where that is
    why, and `more`."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise OSError(f"{path}: {why}{more}") from error


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
