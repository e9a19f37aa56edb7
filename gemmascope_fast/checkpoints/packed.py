"""The packed file of an SAE that is larger than memory: its rows one after the other, and their 8-bit screen.

A checkpoint stores W_enc as [d_in, d_sae], so one feature is spread over d_in pages.  The packed file is a safetensors
file with the rows [d_sae, d_in], W_dec, the vectors, the screen, and checksums of all of them.  It is written once, in
bounded memory, panel by panel of features. It has a temporary name until it is complete, and interrupted work resumes.

W_dec is already stored feature by feature in the checkpoint.  If it can be used there (`in_place`), it is mapped from
the checkpoint, and the packed file has only its checksums.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.checkpoints.base import Checkpoint, one_of, read_json
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry, open_safetensors
from gemmascope_fast.files.atomic import replacing
from gemmascope_fast.files.fields import integer, integers, json_object, shown, text
from gemmascope_fast.files.progress import progress_bar
from gemmascope_fast.files.regular import check_regular
from gemmascope_fast.ops.screen_rows import Row, table_stride
from gemmascope_fast.sae.screen import MOST_INPUTS

KEY = "gemmascope_fast_packed"
VERSION = 4
HEADER = 1 << 20  # bytes kept for the header, which is written last; also the alignment of the first rows
# fp32 rows at a time; packing needs about three times as much memory.  With a million features a panel has one in
# nine, and each row of W_enc in the checkpoint gives 466 KB in one read.
PANEL_BYTES = 1 << 30
SPARE_BYTES = 64 << 20
ROWS, TABLE, CODES = "W_enc.rows", "screen.table", ("screen.code", "screen.code2")
PANELLED = (ROWS, "W_dec", *CODES, TABLE)
PACKED_KINDS = ("sae", "transcoder")

Checksums = dict[str, list[int]]  # for each array, the checksums of its pieces
Update = Callable[[int], object]


@dataclass(frozen=True)
class Layout:
    """Positions of the arrays in a packed file, and the pieces of each that have a checksum.

    panel: number of features in a panel, a multiple of 64.  decoder: position of W_dec's first byte in the checkpoint;
    None if the packed file contains it.
    """

    d_in: int
    d_sae: int
    d_out: int
    panel: int
    decoder: int | None = None

    def arrays(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
        """Name → (dtype, shape, first byte)."""
        d, F, out = self.d_in, self.d_sae, self.d_out
        tiles = (-(-F // 4), -(-d // 64), 4, 64)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            ROWS: (torch.float32, (F, d)),
            "W_dec": (torch.float32, (F, out)),
            "screen.code": (torch.uint8, tiles),
            "screen.code2": (torch.uint8, tiles),
            TABLE: (torch.float32, (len(Row), table_stride(F))),
            "screen.centre": (torch.float32, (d,)),
            "b_enc": (torch.float32, (F,)),
            "threshold": (torch.float32, (F,)),
            "b_dec": (torch.float32, (out,)),
        }
        placed, at = {}, HEADER
        for name, (dtype, shape) in shapes.items():
            if name == "W_dec" and self.decoder is not None:
                continue
            placed[name] = (dtype, shape, at)
            at += math.prod(shape) * dtype.itemsize
        return placed

    def checked(self) -> list[str]:
        """The arrays with checksums: those of the file, and W_dec wherever it is stored."""
        return list(dict.fromkeys((*self.arrays(), "W_dec")))

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        dtype, shape, at = self.arrays()["b_dec"]
        return at + math.prod(shape) * dtype.itemsize

    def panels(self) -> list[tuple[int, int]]:
        """Each panel as (first feature, end)."""
        return [(start, min(self.d_sae, start + self.panel)) for start in range(0, self.d_sae, self.panel)]

    def pieces(self, name: str) -> list[tuple[slice, ...]]:
        """Index of each piece of an array: one per panel, or everything if it is not written in panels."""
        if name not in PANELLED:
            return [(slice(None),)]
        if name in CODES:
            return [(slice(start // 4, -(-end // 4)),) for start, end in self.panels()]
        if name == TABLE:  # the last panel also has the columns past d_sae
            return [(slice(None), slice(s, None if e == self.d_sae else e)) for s, e in self.panels()]
        return [(slice(start, end),) for start, end in self.panels()]


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: detects damage, not manipulation. 4 GB/s, where sha256 gave 1.7."""
    return zlib.crc32(_data(tensor))


def open_layout(path: Path) -> tuple[Layout, dict[str, Any]]:
    """Layout and header of a complete packed file; CheckpointError if it is truncated or not a packed file."""
    entries, about = _header(path)
    d_in = integer(path, "d_in", about.get("d_in"), 1, MOST_INPUTS)
    d_sae, d_out, panel = (integer(path, name, about.get(name)) for name in ("d_sae", "d_out", "panel"))
    if panel % 64:
        raise CheckpointError(f"{path}: panel: expected a multiple of 64, got {panel}")
    decoder = about.get("decoder")
    layout = Layout(d_in, d_sae, d_out, panel, None if decoder is None else integer(path, "decoder", decoder))
    one_of(path, "kind", about.get("kind"), PACKED_KINDS)
    file = text(path, "file", about.get("file"))
    if file in (None, "..") or Path(file).name != file:
        raise CheckpointError(f"{path}: file: expected the name of a file in the same folder, got {shown(file)}")
    there = {name: (entry.dtype, entry.shape, entry.at) for name, entry in entries.items()}
    if there != layout.arrays():  # otherwise the sizes could exceed the file
        raise CheckpointError(f"{path}: metadata {KEY!r}: does not fit the arrays")
    sums = about.get("checksums")
    if not isinstance(sums, dict) or set(sums) != set(layout.checked()):
        raise CheckpointError(f"{path}: checksums: expected those of {layout.checked()}, got {shown(sums)}")
    for name in layout.checked():
        integers(path, f"checksums: {name}", sums[name], len(layout.pieces(name)), (1 << 32) - 1)
    return layout, about


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The arrays of a packed file and its header, checked to be one."""
    entries, metadata = open_safetensors(path)
    if KEY not in metadata:
        raise CheckpointError(f"{path}: metadata {KEY!r}: not a packed file")
    about = json_object(path, f"metadata {KEY!r}", metadata[KEY])
    if text(path, "source", about.get("source")) is None:
        raise CheckpointError(f"{path}: source: expected what the file was packed from, got none")
    return entries, about


def pack(checkpoint: Checkpoint, path: Path, centre: Tensor | None = None, progress: bool | None = False) -> Path:
    """Write the packed file of a checkpoint of kind "sae" or "transcoder", unless a complete one exists.

    centre [d_in]: that of the screen; default b_dec for an SAE.  progress: show a bar on stderr, as in
    `from_pretrained`.  Needs about three gigabytes of memory at any width. Each byte of an uncompressed checkpoint is
    read once, of npz twice (its checksums); a compressed one is read and decompressed once per panel.  Raises
    CheckpointError for another kind, damaged arrays, or a disk with too little space.
    """
    if checkpoint.kind not in PACKED_KINDS or checkpoint.subtracts_b_dec or checkpoint.normalisation != "none":
        raise CheckpointError(f"{checkpoint.path}: rows='mmap': expected a plain SAE or transcoder")
    (d_in, d_sae), d_out = checkpoint.arrays["W_enc"].shape, checkpoint.arrays["W_dec"].shape[1]
    if d_in > MOST_INPUTS:
        raise CheckpointError(f"{checkpoint.path}: rows='mmap': expected d_in up to {MOST_INPUTS}, got {d_in}")
    decoder = checkpoint.arrays["W_dec"].at if in_place(checkpoint, path) else None
    layout = Layout(d_in, d_sae, d_out, max(64, PANEL_BYTES // (4 * d_in) // 64 * 64), decoder)
    source = source_of(checkpoint.path)
    if _is_of(path, source):
        return path
    vectors = {n: e.read(torch.device("cpu"), torch.float32) for n, e in checkpoint.arrays.items() if len(e.shape) == 1}
    if "threshold" not in vectors:
        vectors["threshold"] = torch.full((d_sae,), float(checkpoint.threshold_value or 0.0))
    if centre is None:
        centre = vectors["b_dec"] if checkpoint.kind == "sae" else torch.zeros(d_in)
    vectors["screen.centre"] = centre
    partial = path.with_name(f".{path.name}.partial")
    with _locked(partial) as file, progress_bar(layout.size - HEADER, path.name, progress) as update:
        if _is_of(path, source):  # another process was quicker
            partial.unlink()
            return path
        _make_room(path, file, layout.size)
        done = _progress(partial, source, layout)
        if not done:
            file.truncate(layout.size)
            for name in ("W_enc", "W_dec"):
                checkpoint.arrays[name].verify()
        record = functools.partial(_record, partial, source, layout)
        sums = _fill(checkpoint, file, layout, vectors, done, record, update)
        for name, tensor in vectors.items():
            _write(file, layout.arrays()[name][2], tensor, update)
            sums[name] = [checksum(tensor)]
        _write_header(file, layout, checkpoint, source, sums)
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, path)
    _record_of(partial).unlink(missing_ok=True)
    return path


def in_place(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether W_dec can be mapped from the checkpoint: it must be float32, unchanged, not compressed, at a multiple of
    four bytes (members of an npz begin anywhere), in a file next to the packed one.  Otherwise it is copied."""
    entry = checkpoint.arrays["W_dec"]
    plain = entry.dtype == torch.float32 and not entry.flip and entry.block is None
    beside = entry.file == checkpoint.path and path.parent == checkpoint.path.parent
    return plain and beside and entry.at is not None and entry.at % 4 == 0


def _fill(
    checkpoint: Checkpoint,
    file: IO[bytes],
    layout: Layout,
    vectors: dict[str, Tensor],
    done: Checksums,
    record: Callable[[Checksums], None],
    update: Update,
) -> Checksums:
    """Write the panels that are missing; returns the checksums of all."""
    sums = {name: list(done.get(name, [])) for name in PANELLED}
    for number, (start, end) in enumerate(layout.panels()):
        if number < len(sums[ROWS]):
            update(sum(_piece_bytes(layout, name, number) for name in PANELLED if name in layout.arrays()))
            continue
        parts = _panel(checkpoint, start, end, vectors)
        placed = layout.arrays()
        for name, part in parts.items():
            sums[name].append(checksum(part))
            if name not in placed:
                continue
            _, shape, at = placed[name]
            if name == TABLE:
                stride = shape[1]
                for row, values in enumerate(part):
                    _write(file, at + 4 * (row * stride + start), values, update)
            else:
                _write(file, at + layout.pieces(name)[number][0].start * part[0].nbytes, part, update)
        file.flush()
        os.fsync(file.fileno())  # a panel counts as done only once it is on the disk
        record(sums)
    return sums


def _panel(checkpoint: Checkpoint, start: int, end: int, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features [start, end) of every array that is written in panels."""
    W_enc, W_dec = checkpoint.arrays["W_enc"], checkpoint.arrays["W_dec"]
    rows, decoder = torch.empty(end - start, W_enc.shape[0]), torch.empty(end - start, W_dec.shape[1])
    W_enc.read_part_into(rows.t(), 0, start)
    W_dec.read_part_into(decoder, start, 0)
    b, theta = vectors["b_enc"][start:end], vectors["threshold"][start:end]
    code, code2, table = ops.screen_rows(rows.t(), b, theta, vectors["screen.centre"], True)
    table = table[:, : end - start]
    if end == W_enc.shape[1]:  # also the columns past d_sae, which the screen discards for every token
        beyond = torch.zeros(len(Row), table_stride(end) - end)
        beyond[Row.START] = -math.inf
        table = torch.cat([table, beyond], 1)
    return {ROWS: rows, "W_dec": decoder, "screen.code": code, "screen.code2": code2, TABLE: table}


def _piece_bytes(layout: Layout, name: str, number: int) -> int:
    dtype, shape, _ = layout.arrays()[name]
    index = layout.pieces(name)[number]
    sizes = [len(range(n)[part]) for n, part in zip(shape, index, strict=False)]
    return math.prod((*sizes, *shape[len(index) :])) * dtype.itemsize


# ---- the file -----------------------------------------------------------------------------------------


def source_of(path: Path) -> str:
    """Identifies the source of a packed file: the checkpoint's file name, size and time."""
    stat = path.stat()
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns} {VERSION}"


def _is_of(path: Path, source: str) -> bool:
    """Whether a complete packed file of this source exists; CheckpointError if the file is of another kind."""
    if not path.exists():
        return False
    return bool(_header(path)[1]["source"] == source)


def _write_header(file: IO[bytes], layout: Layout, checkpoint: Checkpoint, source: str, sums: Checksums) -> None:
    names = {torch.float32: "F32", torch.uint8: "U8"}
    site, out = checkpoint.site, checkpoint.site_out or checkpoint.site
    about = {
        "source": source,
        "kind": checkpoint.kind,
        "d_in": layout.d_in,
        "d_sae": layout.d_sae,
        "d_out": layout.d_out,
        "panel": layout.panel,
        "decoder": layout.decoder,
        "file": checkpoint.path.name,
        "hook_name": site.hook_name if site else None,
        "hook_name_out": out.hook_name if out else None,
        "checksums": sums,
    }
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(about)}}
    for name, (dtype, shape, at) in layout.arrays().items():
        begin = at - HEADER
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    if len(text) > HEADER - 8:
        raise CheckpointError(f"{checkpoint.path}: rows='mmap': a header of {len(text)} bytes")
    file.seek(0)
    file.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))


def _data(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _write(file: IO[bytes], at: int, tensor: Tensor, update: Update) -> None:
    file.seek(at)
    file.write(_data(tensor))
    update(tensor.nbytes)


def _make_room(path: Path, file: IO[bytes], size: int) -> None:
    needed = size - min(size, 512 * os.fstat(file.fileno()).st_blocks)  # part of it may be written already
    free = shutil.disk_usage(path.parent).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(f"{path}: rows='mmap': needs {needed + SPARE_BYTES} bytes, the disk has {free}")


@contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    """The partial file, opened by one writer at a time."""
    import fcntl

    while True:
        if partial.exists():
            check_regular(partial)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"{partial}: another process is packing this checkpoint") from error
            # if another writer finished in between, this file has its final name: do not write to it
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                yield file
                return


def _record_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _progress(partial: Path, source: str, layout: Layout) -> Checksums:
    """Checksums of the panels that an interrupted packing of the same source finished."""
    record = _record_of(partial)
    try:
        kept = read_json(record)
        if kept.get("source") != f"{source} {layout.panel}" or not isinstance(kept.get("checksums"), dict):
            return {}
        sums = {name: integers(record, name, kept["checksums"].get(name)) for name in PANELLED}
    except CheckpointError:  # missing, or of another source: write all panels
        return {}
    return sums if len({len(each) for each in sums.values()}) == 1 else {}


def _record(partial: Path, source: str, layout: Layout, sums: Checksums) -> None:
    with replacing(_record_of(partial)) as fresh:
        fresh.write_text(json.dumps({"source": f"{source} {layout.panel}", "checksums": sums}))
