"""Reads arrays of .npz and .safetensors files in blocks. Nothing is unpickled, and nothing is in memory twice."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.fields import integer, integers, shown, sizes
from gemmascope_fast.files.regular import MAX_JSON, check_regular, open_regular

BLOCK_BYTES = 1 << 20  # a block is in memory several times (raw, cast, finite mask), which is small compared to an SAE
BOMB_BYTES, BOMB_RATIO = 64 << 20, 50
MAX_MEMBERS = 64
MAX_DIRECTORY = 1 << 20  # bytes of a zip file's directory; numpy needs 60 per member
MAX_NPY_HEADER = 1 << 14  # numpy refuses more than 10,000
# safetensors' names of dtypes
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_NUMPY = {"<f4": torch.float32, "<f2": torch.float16, "<f8": torch.float64}
# errors from reading a damaged file: zipfile, zlib, ast (in numpy's headers), json, struct
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, NotImplementedError,
    RuntimeError, SyntaxError, MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

Block = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Entry:
    """One array of a file: C order, little endian; `open` gives a stream at its first byte.

    shape: what the reader of the entry gets.  If the file has something else, `stored` is the file's shape, and
    either `flip` is set (the file has the transpose) or `block` computes the rows [start, start + n) of the array
    from the same rows of the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    open: Callable[[], IO[bytes]]
    stored: tuple[int, ...] | None = None
    flip: bool = False
    block: Block | None = None
    seen: Callable[[int], object] | None = None  # called with the number of bytes read from the file
    at: int | None = None  # position of the array's first byte in the file; None if it is compressed
    checksum: bool = False  # the file has a checksum, which is compared at the end of `open`'s stream

    @property
    def nbytes(self) -> int:
        """Bytes in the file, compressed if the file is."""
        return math.prod(self.stored or self.shape) * self.dtype.itemsize

    def transposed(self) -> Entry:
        """The same array of the file, transposed: for matrices stored the other way round."""
        return replace(self, shape=self.shape[::-1], stored=self.stored or self.shape, flip=not self.flip)

    def mapped(self, block: Block, shape: tuple[int, ...] | None = None) -> Entry:
        """An array whose rows are computed as `block(rows, start)` from this one's, block by block."""
        inner = self.block
        if self.flip:
            raise ValueError("mapped: expected an entry that is not transposed")
        both = block if inner is None else lambda rows, start: block(inner(rows, start), start)
        return replace(self, shape=shape or self.shape, stored=self.stored or self.shape, block=both)

    def scaled(self, factor: float) -> Entry:
        """The array times a number, in fp64, whichever way it is stored."""
        plain = self.transposed() if self.flip else self
        made = plain.mapped(lambda block, start: block.double() * factor)
        return made.transposed() if self.flip else made

    def blocks(self, dtype: torch.dtype, finite: bool = True) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows in `dtype`) of the array as stored; for a flipped array, of its transpose.

        Raises CheckpointError if the file ends early or, with `finite`, a value is not finite before or after the cast.
        """
        stored = self.stored or self.shape
        rows, width = (stored[0] if stored else 1), math.prod(stored[1:])
        row_bytes = width * self.dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        try:
            opened = self.open()
        except _DAMAGE as error:
            raise CheckpointError(f"{self.file}: {self.name}: cannot be read: {error}") from error
        with opened as stream:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                buffer = bytearray(count * row_bytes)
                self._fill(stream, memoryview(buffer))
                yield start, self._made(buffer, (count, *stored[1:]), start, dtype, finite)

    def read(self, device: torch.device, dtype: torch.dtype, transposed: bool = False, finite: bool = True) -> Tensor:
        """The array on `device` in `dtype`; `transposed` [m, n] gives a view of that shape over contiguous [n, m]."""
        shape = self.shape[::-1] if transposed else self.shape
        out = torch.empty(shape, dtype=dtype, device=device)
        target = out.t() if transposed else out
        self.read_into(target, finite)
        return target

    def read_into(self, target: Tensor, finite: bool = True) -> None:
        """Fill `target`, which has this shape and any strides, block by block."""
        rows = target.t() if self.flip else target.reshape(1) if target.dim() == 0 else target
        if self.block is None and rows.dim() == 2 and rows.shape[1] * self.dtype.itemsize > BLOCK_BYTES:
            self._read_wide(rows, finite)
            return
        for start, block in self.blocks(target.dtype, finite):
            part = rows[start : start + block.shape[0]]
            part.copy_(block.reshape(part.shape))

    def _read_wide(self, rows: Tensor, finite: bool) -> None:
        """Fill rows [m, n] of the array as stored, if a row is longer than a block: part of a row at a time."""
        n, flat = rows.shape[1], replace(self, shape=(rows.numel(),), stored=None, flip=False)
        for start, block in flat.blocks(rows.dtype, finite):
            row, column = divmod(start, n)
            first = min(n - column, block.shape[0])
            rows[row, column : column + first].copy_(block[:first])
            if first < block.shape[0]:  # a block is shorter than a row, so it ends in the next row at the latest
                rows[row + 1, : block.shape[0] - first].copy_(block[first:])

    def read_part_into(self, target: Tensor, row: int, column: int, finite: bool = True) -> None:
        """Fill `target` [m, n], with any strides, with the part of a matrix that begins at this row and column.

        Reads only these bytes, unless the array is compressed, or some of the columns go through `block`; then it reads
        all.  It does not compare checksums; `verify` does.
        """
        if self.flip:
            target, row, column = target.t(), column, row
        m, n = target.shape
        for start, block in self._part(row, column, m, n, target.dtype, finite):
            target[start - row : start - row + block.shape[0]].copy_(block)

    def _part(
        self, row: int, column: int, m: int, n: int, dtype: torch.dtype, finite: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (row, values [k, n]) of the array as stored, in blocks."""
        tail = (self.stored or self.shape)[1:]
        width = math.prod(tail)
        whole = (column, n) == (0, self.shape[0 if self.flip else 1])
        if self.at is None or (self.block is not None and not whole):
            for start, block in self.blocks(dtype, finite):
                low, high = max(start, row), min(start + block.shape[0], row + m)
                if low < high:
                    yield low, block[low - start : high - start, column : column + n]
            return
        if not whole:
            tail = (n,)
        size = math.prod(tail) * self.dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, size))
        with open_regular(self.file) as file:
            for start in range(row, row + m, step):
                count = min(step, row + m - start)
                buffer = bytearray(count * size)
                view = memoryview(buffer)
                reads = 1 if whole else count  # whole rows are contiguous
                for i in range(reads):
                    file.seek(self.at + ((start + i) * width + column) * self.dtype.itemsize)
                    self._fill(file, view[i * len(view) // reads : (i + 1) * len(view) // reads])
                yield start, self._made(buffer, (count, *tail), start, dtype, finite)

    def verify(self) -> None:
        """Compare the array's checksum if the file has one (npz); CheckpointError if it differs."""
        if self.checksum:
            for _ in self.blocks(self.dtype, finite=False):
                pass

    def _made(self, buffer: bytearray, shape: tuple[int, ...], start: int, dtype: torch.dtype, finite: bool) -> Tensor:
        """Convert the bytes of the file to the rows from `start` on, in `dtype`."""
        if self.seen is not None:
            self.seen(len(buffer))
        made = torch.frombuffer(buffer, dtype=self.dtype) if buffer else torch.empty(0, dtype=self.dtype)
        made = made.reshape(shape)
        if self.block is not None:
            made = self.block(made, start)
        made = made.to(dtype)
        if finite and not bool(torch.isfinite(made).all()):
            raise CheckpointError(f"{self.file}: {self.name}: expected finite values in {dtype}, got NaN or Inf")
        return made

    def _fill(self, stream: IO[bytes], view: memoryview) -> None:
        got = 0
        try:
            while got < len(view):
                more = stream.read(len(view) - got)
                if not more:
                    raise CheckpointError(f"{self.file}: {self.name}: truncated, {len(view) - got} bytes missing")
                view[got : got + len(more)] = more
                got += len(more)
        except _DAMAGE as error:
            raise CheckpointError(f"{self.file}: {self.name}: cannot be read: {error}") from error


def open_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name, and metadata, of a safetensors file; checks its header against the file's size."""
    size = check_regular(path)
    try:
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", _exactly(file, 8))
            if length > min(MAX_JSON, size - 8):
                raise CheckpointError(f"{path}: {_no_header(length, size)}")
            header = json.loads(_exactly(file, length).decode(), object_pairs_hook=_each_once)
        metadata = header.pop("__metadata__", {})
        found = {name: _safetensors_item(path, name, item) for name, item in header.items()}
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: expected an object of texts, got {shown(metadata)}")
    # arrays are contiguous and fill the file, so an array that is cut off or shares bytes is noticed
    end = 0
    for name, item in sorted(found.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if item.begin != end:
            raise CheckpointError(f"{path}: {name}: expected to begin at byte {end} of the data, got {item.begin}")
        end = item.end
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: truncated or too long: expected {8 + length + end} bytes, got {size}")
    return {name: item.entry(path, name, 8 + length) for name, item in found.items()}, metadata


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise EOFError(f"truncated, {size - len(data)} bytes missing")
        data += more
    return data


def _no_header(length: int, size: int) -> str:
    """Error text for a file whose first 8 bytes cannot be the length of its header."""
    start = struct.pack("<Q", length)
    if start.startswith((b"PK", b"\x80")):  # a zip archive as written by torch.save, or a plain pickle
        return "expected a safetensors file, got an archive or a pickle, which is never loaded"
    if MAX_JSON < length <= size - 8:
        return f"expected a header of at most {MAX_JSON} bytes, got one of {length}"
    return f"truncated, or no safetensors file: a header of {length} bytes in a file of {size}"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()  # fails for half surrogate pairs
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


class _Item(NamedTuple):
    """Position of one array in the data of a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def entry(self, path: Path, name: str, base: int) -> Entry:
        def stream() -> IO[bytes]:
            file = open_regular(path)  # the caller closes it
            file.seek(base + self.begin)
            return file

        return Entry(path, name, self.shape, self.dtype, stream, at=base + self.begin)


def _safetensors_item(path: Path, name: str, item: object) -> _Item:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name}: expected dtype, shape and data_offsets, got {shown(item)}")
    if not isinstance(item["dtype"], str) or item["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {shown(item['dtype'])}")
    dtype, shape = DTYPES[item["dtype"]], sizes(path, f"{name}: shape", item["shape"])
    begin, end = integers(path, f"{name}: data_offsets", item["data_offsets"], 2)
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: {name}: shape {shape} does not fit bytes {begin} to {end}")
    return _Item(dtype, shape, begin, end)


def latents_shape(path: Path, stored: str | None, entries: Mapping[str, Entry]) -> tuple[int, ...]:
    """The shape (…, d_sae) that a file of sparse latents gives as text, checked against its arrays."""
    parts = (stored or "").split(",")
    if not all(re.fullmatch("[0-9]{1,19}", part) for part in parts):
        raise CheckpointError(f"{path}: shape: expected sizes with commas between them, got {shown(stored)}")
    shape = sizes(path, "shape", [int(part) for part in parts])
    integer(path, "shape: d_sae", shape[-1], 0, (1 << 31) - 1)  # features are int32
    nnz = entries["values"].shape
    if len(nnz) != 1 or entries["col_indices"].shape != nnz:
        raise CheckpointError(f"{path}: values and col_indices: expected two vectors of one length, got {nnz}")
    if entries["crow_indices"].shape != (math.prod(shape[:-1]) + 1,):
        raise CheckpointError(
            f"{path}: crow_indices: expected {math.prod(shape[:-1]) + 1} offsets for shape {shape}, got"
            f" {entries['crow_indices'].shape}"
        )
    if not entries["values"].dtype.is_floating_point:
        raise CheckpointError(f"{path}: values: expected a floating dtype, got {entries['values'].dtype}")
    return shape


def open_npz(path: Path) -> dict[str, Entry]:
    """Entries by name of an .npz file; raises for pickled, big-endian and Fortran-ordered arrays."""
    entries: dict[str, Entry] = {}
    check_regular(path)
    try:
        with _SmallReads(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise CheckpointError(f"{path}: expected a few arrays, got {len(members)} members")
            # Trained floats compress by a tenth, by a half at most. What compresses to almost nothing is a bomb.
            there, stored = sum(info.file_size for info in members), sum(info.compress_size for info in members)
            if there > BOMB_BYTES and there > BOMB_RATIO * stored:
                raise CheckpointError(f"{path}: {there} bytes out of {stored}: a zip bomb")
            for info in members:
                name = info.filename.removesuffix(".npy")
                if name in entries:
                    raise CheckpointError(f"{path}: {name:.80}: occurs twice")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise CheckpointError(f"{path}: {name:.80}: expected stored or deflated, as numpy writes")
                with archive.open(info) as member:
                    entries[name] = _npz_entry(path, name, info, member)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: not a readable npz file: {error}") from error
    return entries


class _SmallReads(io.FileIO):
    """A file that refuses large reads, because zipfile reads a whole directory at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_DIRECTORY + 1
        wanted = most if size is None or size < 0 else size
        got = (super().read(wanted) or b"") if wanted <= most else b""
        if wanted > most or len(got) == most:
            raise ValueError(f"a directory of more than {MAX_DIRECTORY} bytes")
        return got


def _npz_entry(path: Path, name: str, info: zipfile.ZipInfo, member: IO[bytes]) -> Entry:
    head = io.BytesIO(member.read(MAX_NPY_HEADER))  # numpy would trust the header's statement of its own length
    version = np.lib.format.read_magic(head)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise CheckpointError(f"{path}: {name}: npy version {version} is not supported")
    shape, fortran, dtype = reader(head)
    if dtype.str not in _NUMPY or fortran:
        raise CheckpointError(
            f"{path}: {name}: expected C-ordered float16, float32 or float64, got {dtype.str}, Fortran {fortran}"
        )
    shape = sizes(path, f"{name}: shape", list(shape))
    start, size = head.tell(), math.prod(shape) * dtype.itemsize
    # A stored size that does not fit the shape, or more than deflate can expand to (1032:1), is a zip bomb.
    if start + size != info.file_size or info.file_size > 1032 * info.compress_size + 1024:
        raise CheckpointError(f"{path}: {name}: shape {shape} does not fit a member of {info.file_size} bytes")

    def stream() -> IO[bytes]:
        check_regular(path)
        archive = zipfile.ZipFile(path)
        file = archive.open(info)
        archive.close()  # the open member keeps the file open
        file.read(start)
        return file

    at = None
    if info.compress_type == zipfile.ZIP_STORED:
        with open_regular(path) as file:  # the member's own header may be longer than the directory says
            file.seek(info.header_offset + 26)
            at = info.header_offset + 30 + sum(struct.unpack("<HH", _exactly(file, 4))) + start
    return Entry(path, name, tuple(shape), _NUMPY[dtype.str], stream, at=at, checksum=True)
