"""A replacement for the disk operations of `gemmascope_fast.files.atomic`, which fails at a chosen operation.

Every write of the jobs goes through that module, so its operations are all the points at which a job can stop.
"""

import os
from pathlib import Path

import torch


class Killed(BaseException):
    """The process is gone: what would run after this does not touch the disk either."""


class Disk:
    """Stands for `os`.  at: the number of the operation that fails (None: none does, they are counted).

    error: the errno that it fails with; None for a kill, in the middle of the operation, after which nothing reaches
    the disk any more.  only: names of the operations counted; of `open` those that make a file.
    """

    KILLED = ("open", "write", "chmod", "replace", "unlink", "mkdir", "rmdir", "truncate")
    FULL = ("open", "write", "fsync", "mkdir")
    FORBIDDEN = ("open", "mkdir", "replace", "unlink")

    def __init__(self, at=None, error=None, only=KILLED):
        self.at, self.error, self.only = at, error, only
        self.count, self.dead, self.names = 0, False, []

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in Disk.KILLED and name not in self.only:
            return real

        def call(*args, **options):
            if self.dead:
                raise Killed
            if name not in self.only or (name == "open" and not args[1] & os.O_CREAT):
                return real(*args, **options)
            self.count += 1
            self.names.append(f"{name} {args[0]}")
            if self.count != self.at:
                return real(*args, **options)
            if self.error is not None:
                raise OSError(self.error, os.strerror(self.error), *[a for a in args[:1] if not isinstance(a, int)])
            self.dead = True
            self._half(name, args, real)
            raise Killed

        return call

    def _half(self, name, args, real):
        """What the kill leaves of a write: half of it.  `chmod` is the first call after a file was written."""
        if name == "write":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        if name == "chmod":
            os.truncate(args[0], Path(args[0]).stat().st_size // 2)


def tree(folder, left_out=(".lock",)):
    """Every file's bytes and every folder, by path.  Of what torch.save wrote, the values: its pickle remembers which
    of them were one object."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name not in left_out:
            data = None if path.is_dir() else path.read_bytes()
            found[path.relative_to(folder).as_posix()] = _values(torch.load(path)) if path.suffix == ".pt" else data
    return found


def _values(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: _values(each) for key, each in value.items()}
    return [_values(each) for each in value] if isinstance(value, (list, tuple)) else value
