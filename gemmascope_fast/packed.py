"""SAEs wider than memory: rows mapped from a packed file, their 8-bit screen alone resident.

A checkpoint holds W_enc as [d_in, d_sae], where one feature touches d_in pages.  The packed file is a safetensors file
with the rows [d_sae, d_in] one after the other, W_dec, the vectors, and the screen.  It is written once, panel by panel
of features, in bounded memory: under a name of its own until it is complete, and resumed where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast import backends, ops
from gemmascope_fast.checkpoints.arrays import Entry, open_safetensors
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops.screen_rows import Row, table_stride
from gemmascope_fast.sae import JumpReLUSAE, SAEConfig, SAEMetadata
from gemmascope_fast.screen import MOST_INPUTS, Screen
from gemmascope_fast.sites import Site

KEY = "gemmascope_fast_packed"
VERSION = 2
HEADER = 1 << 20  # bytes kept for the header, which is written last; also the alignment of the first rows
# fp32 rows at a time.  Packing holds about three times as much, and reads W_enc once a panel, since a checkpoint has
# it column by column: ten times for a million features of 2,304.
PANEL_BYTES = 1 << 30
SPARE_BYTES = 64 << 20
ROWS = "W_enc.rows"


@dataclass(frozen=True)
class _Layout:
    """Where each tensor of the packed file lies: name → (dtype, shape, first byte)."""

    d_in: int
    d_sae: int
    d_out: int

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
        d, F, out = self.d_in, self.d_sae, self.d_out
        tiles = (-(-F // 4), -(-d // 64), 4, 64)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            ROWS: (torch.float32, (F, d)),
            "W_dec": (torch.float32, (F, out)),
            "screen.code": (torch.uint8, tiles),
            "screen.code2": (torch.uint8, tiles),
            "screen.table": (torch.float32, (len(Row), table_stride(F))),
            "screen.centre": (torch.float32, (d,)),
            "b_enc": (torch.float32, (F,)),
            "threshold": (torch.float32, (F,)),
            "b_dec": (torch.float32, (out,)),
        }
        placed, at = {}, HEADER
        for name, (dtype, shape) in shapes.items():
            placed[name] = (dtype, shape, at)
            at += int(np.prod(shape)) * dtype.itemsize
        placed[""] = (torch.uint8, (), at)
        return placed

    @property
    def size(self) -> int:
        return self.tensors()[""][2]


def pack(checkpoint: Checkpoint, path: Path, centre: Tensor | None = None) -> Path:
    """Write the packed file of a checkpoint of kind "sae", "transcoder" unless a complete one of it is there.

    centre [d_in]: of the screen; default b_dec for an SAE.  Holds about three gigabytes whatever the width.  Raises
    CheckpointError for another kind, damaged arrays, or a disk with too little room.
    """
    if checkpoint.kind not in ("sae", "transcoder") or checkpoint.subtracts_b_dec or checkpoint.normalisation != "none":
        raise CheckpointError(f"{checkpoint.path}: rows='mmap': expected a plain SAE or transcoder")
    (d_in, d_sae), d_out = checkpoint.arrays["W_enc"].shape, checkpoint.arrays["W_dec"].shape[1]
    if d_in > MOST_INPUTS:
        raise CheckpointError(f"{checkpoint.path}: rows='mmap': expected d_in up to {MOST_INPUTS}, got {d_in}")
    layout, source = _Layout(d_in, d_sae, d_out), _source(checkpoint)
    if path.exists() and _about(path).get("source") == source:
        return path
    vectors = {n: e.read(torch.device("cpu"), torch.float32) for n, e in checkpoint.arrays.items() if len(e.shape) == 1}
    if "threshold" not in vectors:
        vectors["threshold"] = torch.full((d_sae,), float(checkpoint.threshold_value or 0.0))
    if centre is None:
        centre = vectors["b_dec"] if checkpoint.kind == "sae" else torch.zeros(d_in)
    partial = path.with_name(f".{path.name}.partial")
    with _locked(partial) as file:
        done = _progress(partial, source)
        if not done:
            _make_room(path, layout.size)
            file.truncate(layout.size)
        _fill(checkpoint, file, layout, vectors, centre, partial, source, done)
        for name, tensor in (*vectors.items(), ("screen.centre", centre)):
            _write(file, layout.tensors()[name][2], tensor)
        _write_header(file, layout, checkpoint, source, _progress(partial, source))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    partial.with_suffix(".json").unlink(missing_ok=True)
    return path


def _fill(
    checkpoint: Checkpoint,
    file: IO[bytes],
    layout: _Layout,
    vectors: dict[str, Tensor],
    centre: Tensor,
    partial: Path,
    source: str,
    done: list[str],
) -> None:
    d, F = layout.d_in, layout.d_sae
    step = max(64, PANEL_BYTES // (4 * d) // 64 * 64)
    places, stride = layout.tensors(), table_stride(F)
    for panel, start in enumerate(range(0, F, step)):
        if panel < len(done):
            continue
        end = min(F, start + step)
        rows = _columns(checkpoint.arrays["W_enc"], start, end)
        decoder = _rows(checkpoint.arrays["W_dec"], start, end)
        b, theta = vectors["b_enc"][start:end], vectors["threshold"][start:end]
        code, code2, table = ops.screen_rows(rows.t(), b, theta, centre, True)
        digest = hashlib.sha256()
        for name, tensor, offset in (
            (ROWS, rows, start * d * 4),
            ("W_dec", decoder, start * layout.d_out * 4),
            ("screen.code", code, start * code.shape[1] * 64),
            ("screen.code2", code2, start * code.shape[1] * 64),
        ):
            _write(file, places[name][2] + offset, tensor)
            digest.update(_data(tensor))
        for row in range(len(Row)):
            part = table[row, : end - start]
            if end == F:  # and the columns past d_sae, which are discarded whatever the token
                beyond = torch.full((stride - F,), -math.inf if row == Row.START else 0.0)
                part = torch.cat([part, beyond])
            _write(file, places["screen.table"][2] + 4 * (row * stride + start), part)
            digest.update(_data(part))
        file.flush()
        os.fsync(file.fileno())  # a panel counts as done only when it is on the disk
        done.append(digest.hexdigest())
        _record(partial, source, done)


def open_packed(path: Path, checkpoint: Checkpoint) -> JumpReLUSAE:
    """The SAE of a packed file: rows and decoder mapped, codes, bounds and vectors resident.

    Answers are those of the resident SAE, byte for byte.  Raises CheckpointError for a damaged or truncated file; a
    file that is truncated later raises at the next call.
    """
    about = _about(path)
    layout = _Layout(about["d_in"], about["d_sae"], about["d_out"])
    mapped = Mapped(path, layout.size)
    places = layout.tensors()

    def view(name: str) -> Tensor:
        dtype, shape, at = places[name]
        return torch.frombuffer(mapped.buffer, dtype=dtype, count=int(np.prod(shape)), offset=at).reshape(shape)

    def resident(name: str) -> Tensor:
        dtype, shape, at = places[name]
        tensor = torch.empty(shape, dtype=dtype)
        backends.advise_large_pages(tensor)
        with open(path, "rb") as file:
            file.seek(at)
            if file.readinto(memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)) != tensor.nbytes:
                raise CheckpointError(f"{path}: {name}: truncated")
        return tensor

    extra: dict[str, Any] = {"figures": checkpoint.figures} if checkpoint.figures else {}
    metadata = SAEMetadata(checkpoint.model_name, checkpoint.extra.get("neuronpedia_id"), extra)
    site, out = (None if n is None else Site.from_hook_name(n) for n in (about["hook_name"], about["hook_name_out"]))
    cfg = SAEConfig(layout.d_in, layout.d_sae, layout.d_out, site, out, metadata)
    from gemmascope_fast.loading import _CLASSES

    vectors = {name: resident(name) for name in ("b_enc", "b_dec", "threshold")}
    sae = _CLASSES[about["kind"]](W_enc=view(ROWS).t(), W_dec=view("W_dec"), cfg=cfg, **vectors)
    sae.requires_grad_(False)
    screen = Screen(*(resident(f"screen.{n}") for n in ("code", "code2", "table", "centre")))
    sae._prepared.adopt(sae, screen)
    sae._mapped = mapped
    return sae


class Mapped:
    """A mapped file and its length: reading past the end of a file that shrank would end the process."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._file = open(path, "rb")  # noqa: SIM115  (as long as the mapping)
        self.check()
        # private: an edit of the weights stays in this process
        self.buffer = mmap.mmap(
            self._file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )

    def check(self) -> None:
        """CheckpointError where the file is shorter than what was mapped."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self.size:
            raise CheckpointError(f"{self.path}: truncated to {size} bytes of {self.size}")


# ---- reading panels -----------------------------------------------------------------------------------


def _columns(entry: Entry, start: int, end: int) -> Tensor:
    """Rows [end - start, d_in] of W_enc [d_in, d_sae], as fp32, read in blocks."""
    out = torch.empty(end - start, entry.shape[0])
    if entry.flip:  # the file holds the rows as they are wanted
        return _rows(entry.transposed(), start, end)
    for first, block in entry.blocks(torch.float32):
        out[:, first : first + block.shape[0]] = block[:, start:end].t()
    return out


def _rows(entry: Entry, start: int, end: int) -> Tensor:
    out = torch.empty(end - start, *entry.shape[1:])
    for first, block in entry.blocks(torch.float32):
        low, high = max(start, first), min(end, first + block.shape[0])
        if low < high:
            out[low - start : high - start] = block[low - first : high - first]
        if first >= end:
            break
    return out


# ---- the file -----------------------------------------------------------------------------------------


def _source(checkpoint: Checkpoint) -> str:
    """What a packed file belongs to: the checkpoint's file, its size and time."""
    stat = checkpoint.path.stat()
    return f"{checkpoint.path.name} {stat.st_size} {stat.st_mtime_ns} {VERSION}"


def _about(path: Path) -> dict[str, Any]:
    _entries, metadata = open_safetensors(path)
    try:
        about = json.loads(metadata[KEY])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: metadata {KEY!r}: not a packed file: {error}") from error
    return about


def _write_header(file: IO[bytes], layout: _Layout, checkpoint: Checkpoint, source: str, digests: list[str]) -> None:
    names = {torch.float32: "F32", torch.uint8: "U8"}
    site, out = checkpoint.site, checkpoint.site_out or checkpoint.site
    about = {
        "source": source,
        "kind": checkpoint.kind,
        "d_in": layout.d_in,
        "d_sae": layout.d_sae,
        "d_out": layout.d_out,
        "hook_name": site.hook_name if site else None,
        "hook_name_out": out.hook_name if out else None,
        "panels": digests,
    }
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(about)}}
    for name, (dtype, shape, at) in layout.tensors().items():
        if name:
            size = int(np.prod(shape)) * dtype.itemsize
            header[name] = {
                "dtype": names[dtype],
                "shape": list(shape),
                "data_offsets": [at - HEADER, at - HEADER + size],
            }
    text = json.dumps(header).encode()
    if len(text) > HEADER - 8:
        raise CheckpointError(f"{checkpoint.path}: rows='mmap': a header of {len(text)} bytes")
    file.seek(0)
    file.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))


def _data(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _write(file: IO[bytes], at: int, tensor: Tensor) -> None:
    file.seek(at)
    file.write(_data(tensor))


def _make_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size + SPARE_BYTES:
        raise CheckpointError(f"{path}: rows='mmap': needs {size} bytes, the disk has {free}")


@contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    """The partial file, open to one writer at a time."""
    import fcntl

    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{partial}: another process is packing this checkpoint") from error
        yield file


def _progress(partial: Path, source: str) -> list[str]:
    """Digests of the panels that an interrupted packing of the same source finished."""
    try:
        kept = json.loads(partial.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return []
    return list(kept["panels"]) if kept.get("source") == source else []


def _record(partial: Path, source: str, done: list[str]) -> None:
    record = partial.with_suffix(".json")
    fresh = record.with_suffix(".new")
    fresh.write_text(json.dumps({"source": source, "panels": done}))
    os.replace(fresh, record)
