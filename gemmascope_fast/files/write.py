"""Writes checkpoints in blocks; the file gets its final name only when complete, with the umask's permissions."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.files.arrays import BLOCK_BYTES, DTYPES, Entry
from gemmascope_fast.files.atomic import replacing

Source = Tensor | Entry
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file. It is renamed to `path` if the block succeeds; otherwise nothing is left."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_safetensors(
    path: Path,
    arrays: Mapping[str, Source],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    only_matrices: bool = False,
) -> None:
    """Write a safetensors file from tensors or another file's entries, without a copy of a whole tensor.

    dtype: cast floating arrays (only_matrices: only those of two dimensions); None keeps each dtype.
    """

    def stored(source: Source) -> torch.dtype:
        cast = source.dtype.is_floating_point and (len(source.shape) > 1 or not only_matrices)
        return dtype if dtype is not None and cast else source.dtype

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, source in arrays.items():
        to = stored(source)
        size = math.prod(source.shape) * to.itemsize
        header[name] = {"dtype": _NAMES[to], "shape": list(source.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    with atomic(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for source in arrays.values():
            for block in _blocks(source, stored(source)):
                file.write(_bytes(block))


def write_npz(path: Path, arrays: Mapping[str, Source]) -> None:
    """Write an uncompressed .npz of float32 arrays, like Gemma Scope's params.npz."""
    with atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, source in arrays.items():
            head = io.BytesIO()
            shape = {"descr": "<f4", "fortran_order": False, "shape": tuple(source.shape)}
            np.lib.format.write_array_header_1_0(head, shape)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(head.getvalue())
                for block in _blocks(source, torch.float32):
                    member.write(_bytes(block))


def _blocks(source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
    if isinstance(source, Entry) and not source.flip:
        yield from (block for _, block in source.blocks(dtype))
        return
    tensor = source.read(torch.device("cpu"), dtype) if isinstance(source, Entry) else source.detach()
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    step = max(1, BLOCK_BYTES // max(1, math.prod(tensor.shape[1:]) * tensor.element_size()))
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step].to("cpu", dtype)


def _bytes(block: Tensor) -> memoryview:
    flat = block.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
