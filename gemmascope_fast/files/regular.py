"""Opens files from untrusted sources: only regular files, and nothing is read before its size is known to be small."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from gemmascope_fast.errors import CheckpointError

MAX_JSON = 1 << 20  # for a header or a config: parsing takes up to 25 times as much memory
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def check_regular(path: Path) -> int:
    """Size in bytes of a regular file, following links.  CheckpointError if it is anything else: opening a FIFO can
    wait forever, and a device has no end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise CheckpointError(f"{path}: expected a regular file, got {kind}")
    return found.st_size


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading, unbuffered.  CheckpointError if it is not a regular file or cannot be opened."""
    check_regular(path)
    try:
        # Non-blocking, in case a FIFO has replaced the file since it was checked.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: expected a regular file")
    return file


def read_small(path: Path, most: int = MAX_JSON) -> bytes:
    """All bytes of a regular file of at most `most` bytes.  CheckpointError if it is larger or not a regular file."""
    with open_regular(path) as file:
        try:
            data = _up_to(file, most + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(data) > most:
        raise CheckpointError(f"{path}: expected at most {most} bytes, got more")
    return data


def _up_to(file: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data
