"""Writes a dict of tensors with `torch.save`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.write import Source


def tensor_of(source: Source, dtype: torch.dtype | None) -> Tensor:
    """The array in memory, contiguous, on the CPU, in `dtype` (None: unchanged)."""
    wanted = dtype or source.dtype
    if isinstance(source, Entry):
        return source.read(torch.device("cpu"), wanted)
    return source.detach().to("cpu", wanted)


def save_torch(
    path: Path,
    arrays: Mapping[str, Source],
    stored: Mapping[str, tuple[str, bool]],
    dtype: torch.dtype | None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write a dict with torch.save.  stored: name in the file → (our name, whether the file has it transposed).

    The arrays are in memory once during the write.
    """
    held: dict[str, Any] = {}
    for name, (ours, transposed) in stored.items():
        tensor = tensor_of(arrays[ours], dtype)
        held[name] = (tensor.t() if transposed else tensor).contiguous()
    torch.save(held | dict(values or {}), path)


def check_relu(folder: Path, what: str, arrays: Mapping[str, Source]) -> None:
    """CheckpointError if a threshold is above 0, because the format supports only ReLU."""
    threshold = arrays.get("threshold")
    if threshold is not None and bool((tensor_of(threshold, torch.float64) > 0).any()):
        raise CheckpointError(f"{folder}: {what} has no thresholds, and some of this SAE's are above 0")
