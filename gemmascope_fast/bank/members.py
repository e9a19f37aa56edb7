"""The contents of a bank as names and headers: which checkpoints there are, and how many bytes each needs."""

from __future__ import annotations

import fnmatch
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from gemmascope_fast.bank.screens import build_screens
from gemmascope_fast.checkpoints import names
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.checkpoints.loading import build, config_of, find_checkpoint, take_screen
from gemmascope_fast.checkpoints.repository import checkpoints_among, id_of, repository_files
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.sae.config import SAEConfig
from gemmascope_fast.sae.screen import most_bytes

Stamp = tuple[tuple[str, int, int, int], ...]


class Member:
    """One checkpoint of a bank.  Its header is read (of a repository, its file is downloaded) when first needed.

    name: its key in the bank.  model: the name given to the bank, or None to use the checkpoint's.
    """

    def __init__(self, name: str, model: str | None, source: str | Path, sae_id: str | None, revision: str | None):
        self.name, self.told_model = name, model
        self._where = (source, sae_id, revision)
        self._opened: tuple[Checkpoint, Stamp] | None = None
        self._lock = threading.Lock()

    @property
    def sae_id(self) -> str:
        return self._where[1] or Path(self._where[0]).name

    @property
    def checkpoint(self) -> Checkpoint:
        return self._open()[0]

    def _open(self) -> tuple[Checkpoint, Stamp]:
        with self._lock:
            if self._opened is None:
                found = find_checkpoint(*self._where)
                self._opened = found, _stamp(found)
            return self._opened

    @property
    def kind(self) -> str:
        return self.checkpoint.kind

    @property
    def cfg(self) -> SAEConfig:
        """Raise CheckpointError if the checkpoint has several sites."""
        found = self.checkpoint
        if found.layers:
            raise CheckpointError(f"{found.path}: expected a checkpoint of one site, got a {found.kind}")
        return config_of(found)

    @property
    def model_name(self) -> str | None:
        return self.told_model if self.told_model is not None else self.checkpoint.model_name

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of its parameters in `dtype`."""
        return _elements(self.checkpoint) * dtype.itemsize

    def packed_bytes(self) -> int:
        """The most bytes that its screen may need in addition."""
        found = self.checkpoint
        if found.extra.get("shared"):
            return most_bytes(len(found.layers) * found.d_in, found.d_sae)
        return sum(most_bytes(part.d_in, part.d_sae) for part in found.layers or (found,))

    def load(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Load the module; its parameters do not require gradients.

        Raises CheckpointError if a file is not the one whose header was read, because a bank may read an SAE many times
        and must get the same weights each time.
        """
        checkpoint, stamp = self._open()
        # inference mode would make tensors that autograd graphs cannot use later
        with torch.inference_mode(False), torch.no_grad():
            self._check(checkpoint, stamp)
            made = build(checkpoint, device, dtype)
            self._check(checkpoint, stamp)
        return made.requires_grad_(False).eval()

    def build_screen(self, module: torch.nn.Module) -> None:
        """Its screen: the one stored with the weights, or a new one."""
        with torch.inference_mode(False), torch.no_grad():
            take_screen(module, self.checkpoint)
            build_screens(module)

    @staticmethod
    def _check(checkpoint: Checkpoint, stamp: Stamp) -> None:
        now = _stamp(checkpoint)
        for before, after in zip(stamp, now, strict=True):
            if before != after:
                raise CheckpointError(
                    f"{before[0]}: changed on disk since the bank read its header; create the bank again"
                )


def find(source: str | Path, revision: str | None = None) -> Iterator[tuple[str | Path, str | None, str]]:
    """(source, sae_id, name) of every checkpoint in a file, a folder, a repository or a SAELens release.

    Of a repository only the listing is read.  CheckpointError if there is no checkpoint.
    """
    root = Path(source)
    if root.is_file():
        yield root, None, root.name
        return
    if root.is_dir():
        listed: Iterable[str] = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        ids = [id_of(path) for path in checkpoints_among(listed)]
    elif str(source) in names.releases():
        ids = names.ids(str(source))
    else:
        ids = [id_of(path) for path in checkpoints_among(repository_files(str(source), revision))]
    if not ids:
        raise CheckpointError(f"{source}: no checkpoint in a known format")
    for sae_id in ids:
        yield source, sae_id, sae_id


def matching(members: Iterable[Member], patterns: Sequence[str]) -> list[Member]:
    """Those whose sae_id matches one of the patterns (`*`, `?`, `[…]`; `*` also matches `/`)."""
    return [m for m in members if any(fnmatch.fnmatchcase(m.sae_id, pattern) for pattern in patterns)]


def _elements(checkpoint: Checkpoint) -> int:
    own = {name: math.prod(entry.shape) for name, entry in checkpoint.arrays.items()}
    if checkpoint.layers:
        each = [_elements(layer) for layer in checkpoint.layers]
        # each file of one set of latents has its bias and thresholds; the crosscoder keeps them once
        twice = 2 * checkpoint.d_sae * (len(each) - 1) if checkpoint.extra.get("shared") else 0
        return sum(own.values()) + sum(each) - twice
    return sum(own.values()) + (0 if "threshold" in own else checkpoint.d_sae)


def _stamp(checkpoint: Checkpoint) -> Stamp:
    parts = (checkpoint, *checkpoint.layers)
    files = sorted({str(entry.file) for part in parts for entry in part.arrays.values()})
    found = []
    for file in files:
        try:
            stat = os.stat(file)
        except OSError as error:
            raise CheckpointError(f"{file}: no longer exists: {error}") from error
        found.append((file, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)
