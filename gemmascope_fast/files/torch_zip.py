"""Reads tensors from a file written by `torch.save` (`.pt`, `.pth`), in blocks; nothing is unpickled.

Such a file is a zip archive. It has the numbers of each tensor, uncompressed, and a small pickle that describes them.
That pickle is interpreted here by a reader that knows dicts, texts, numbers and tensors, and calls nothing. Of these
it accepts what `torch.load(weights_only=True)` accepts, and it raises an error for everything else.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import _DAMAGE, MAX_MEMBERS, Entry, _exactly, _SmallReads
from gemmascope_fast.files.fields import MAX_DIMENSIONS, MOST, integer, integers, shown
from gemmascope_fast.files.regular import check_regular, open_regular

MAX_PICKLE = 1 << 16  # bytes of the pickle; torch writes about 150 per tensor
_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MARK = object()
_DTYPES = {"float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool"}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_EMPTY: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK}
_MEMO = {"BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"}
_ITEMS = {"TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS"}
_CALLS = {"GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Global:
    """A name in the pickle; only those known to `_call` are used."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Held:
    """A tensor: part of a storage, measured in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def open_torch(path: Path) -> dict[str, Any]:
    """The contents of a file of `torch.save`, a dict by name: tensors as Entries, and texts, numbers and dicts.

    CheckpointError if the file is damaged, contains anything but tensors and such values (it would need
    `weights_only=False`), or was written by torch.save before version 1.6.
    """
    size = check_regular(path)
    try:
        with open_regular(path) as start:
            if start.read(1) == b"\x80":
                raise CheckpointError(
                    f"{path}: expected a zip archive, as torch.save writes since version 1.6, got a bare pickle, which"
                    " is never loaded: torch.load it with weights_only=True and save it again"
                )
        with _SmallReads(path, "rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise CheckpointError(f"{path}: expected a few tensors, got {len(members)} members")
            by_name = {info.filename: info for info in members}
            if len(by_name) != len(members):
                raise CheckpointError(f"{path}: a member occurs twice")
            root = next((name.removesuffix("data.pkl") for name in by_name if name.endswith("/data.pkl")), None)
            if root is None:
                raise CheckpointError(f"{path}: expected a file of torch.save, got a zip archive without data.pkl")
            about = _small(path, archive, by_name[root + "data.pkl"])
            order = by_name.get(root + "byteorder")
            if order is not None and _small(path, archive, order).strip() != b"little":
                raise CheckpointError(f"{path}: byteorder: expected little")
            data = {n.removeprefix(root + "data/"): i for n, i in by_name.items() if n.startswith(root + "data/")}
        held = _Reader(path).read(about)
        if not isinstance(held, dict):
            raise CheckpointError(f"{path}: expected a dict of tensors, got {type(held).__name__}")
        return _entries(path, held, data, size, {})
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: not a readable file of torch.save: {error}") from error


def _small(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_PICKLE or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            f"{path}: {info.filename:.80}: expected at most {MAX_PICKLE} bytes, not compressed, got {info.file_size}"
        )
    # not through zipfile, because torch.save may omit its checksum
    return _bytes(path, _start(path, info), info.file_size)


def _bytes(path: Path, at: int, size: int) -> bytes:
    with open_regular(path) as file:
        file.seek(at)
        return _exactly(file, size)


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Position of a member's first byte: its own header may be longer than the directory says."""
    name, extra = struct.unpack("<HH", _bytes(path, info.header_offset + 26, 4))
    return int(info.header_offset + 30 + name + extra)


def _entries(
    path: Path, held: dict[Any, Any], data: dict[str, zipfile.ZipInfo], size: int, done: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """`held` with an Entry for each tensor; done: the dicts seen so far by id, since one may occur many times."""
    if id(held) in done:
        return done[id(held)]
    made: dict[str, Any] = {}
    if len(done) > MAX_MEMBERS:
        raise CheckpointError(f"{path}: data.pkl: expected a few dicts, got more than {MAX_MEMBERS}")
    done[id(held)] = made
    for name, value in held.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: expected names that are text, got {shown(name)}")
        if isinstance(value, _Held):
            made[name] = _entry(path, name, value, data, size)
        elif isinstance(value, dict):
            made[name] = _entries(path, value, data, size, done)
        else:
            made[name] = value
    return made


def _entry(path: Path, name: str, held: _Held, data: dict[str, zipfile.ZipInfo], size: int) -> Entry:
    info, item = data.get(held.storage.key), held.storage.dtype.itemsize
    if info is None:
        raise CheckpointError(f"{path}: {name:.80}: its numbers are missing from the file")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != held.storage.numel * item:
        raise CheckpointError(
            f"{path}: {name:.80}: {held.storage.numel} numbers of {held.storage.dtype} do not fit"
            f" {info.file_size} bytes"
        )
    count = math.prod(held.shape)
    if held.offset + count > held.storage.numel:
        raise CheckpointError(f"{path}: {name:.80}: shape {held.shape} does not fit {held.storage.numel} numbers")
    flip = len(held.shape) == 2 and not _contiguous(held.shape, held.stride)
    if not _contiguous(held.shape[::-1] if flip else held.shape, held.stride[::-1] if flip else held.stride):
        raise CheckpointError(
            f"{path}: {name:.80}: expected rows one after the other, or columns, got strides {held.stride} of shape"
            f" {held.shape}"
        )
    at = _start(path, info) + held.offset * item
    if at + count * item > size:
        raise CheckpointError(f"{path}: {name:.80}: truncated")

    def stream() -> IO[bytes]:
        file = open_regular(path)  # the caller closes it
        file.seek(at)
        return file

    shape = held.shape[::-1] if flip else held.shape
    entry = Entry(path, name, shape, held.storage.dtype, stream, at=at)
    return entry.transposed() if flip else entry


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for length, found in zip(reversed(shape), reversed(stride), strict=True):
        if length > 1 and found != step:
            return False
        step *= max(1, length)
    return True


class _Reader:
    """Interprets the pickle of a file of torch.save. It creates only dicts, tuples, texts, numbers and `_Held`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """The pickled value."""
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, argument)
        except CheckpointError:
            raise
        except (*_DAMAGE, RecursionError) as error:
            raise CheckpointError(f"{self.path}: data.pkl: not readable: {error}") from error
        raise CheckpointError(f"{self.path}: data.pkl: truncated")

    def _step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _VALUES:
            self.stack.append(_VALUES[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop() for _ in range(_TUPLES[name]))[::-1])
        elif name in _MEMO:
            self._remember(name, argument)
        elif name in _ITEMS:
            self._fill(name)
        elif name in _CALLS:
            self._named(name, argument)
        elif name not in ("PROTO", "FRAME"):
            raise self._refused(f"the instruction {name}")

    def _remember(self, name: str, argument: Any) -> None:
        if name.endswith("GET"):
            self.stack.append(self.memo[argument])
        else:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]

    def _fill(self, name: str) -> None:
        single = {"SETITEM": 2, "APPEND": 1}.get(name)
        parts = self._to_mark() if single is None else [self._pop() for _ in range(single)][::-1]
        if name == "TUPLE":
            self.stack.append(tuple(parts))
        elif name.startswith("SET"):
            self._set(parts)
        elif isinstance(self.stack[-1], list):
            self.stack[-1].extend(parts)
        else:
            raise ValueError("items without a list")

    def _named(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            self.stack.append(_Global(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            self.stack.append(_Global(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            self.stack.append(self._storage(self._pop()))
        elif name == "REDUCE":
            arguments, called = self._pop(), self._pop()
            self.stack.append(self._call(called, arguments))
        else:
            self._pop()  # BUILD of a state dict: its `_metadata`
            if not isinstance(self.stack[-1], dict):
                raise self._refused(f"an object of {shown(self.stack[-1])}")

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: data.pkl: expected tensors, numbers, texts and dicts, which torch.load(weights_only=True)"
            f" reads, got {what}: it is not loaded, since that could run code"
        )

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def _to_mark(self) -> list[Any]:
        parts: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            parts.append(value)
        return parts[::-1]

    def _set(self, parts: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(parts) % 2:
            raise ValueError("items without a dict")
        for name, value in zip(parts[::2], parts[1::2], strict=True):
            if not isinstance(name, str | int):
                raise self._refused(f"a key {shown(name)}")
            is_dtype = isinstance(value, _Global) and value.name.removeprefix("torch.") in _DTYPES
            if isinstance(value, _Global | _Storage) and not is_dtype:
                raise self._refused(f"{shown(value)} under {shown(name)}")
            target[name] = value.name if is_dtype else value

    def _storage(self, about: Any) -> _Storage:
        if not isinstance(about, tuple) or len(about) != 5 or about[0] != "storage":
            raise self._refused(f"the reference {shown(about)}")
        _, kind, key, _, numel = about
        dtype = None
        if isinstance(kind, _Global) and kind.name.startswith("torch."):
            dtype = _STORAGES.get(kind.name.removeprefix("torch."))
        if dtype is None or not isinstance(key, str):
            raise self._refused(f"a storage of {shown(kind)}")
        return _Storage(dtype, key, integer(self.path, "data.pkl: numbers of a storage", numel, 0))

    def _call(self, called: Any, arguments: Any) -> Any:
        name = called.name if isinstance(called, _Global) else ""
        if name == "collections.OrderedDict" and arguments == ():
            return {}
        if name == "torch.device" and isinstance(arguments, tuple) and all(isinstance(a, str | int) for a in arguments):
            return ":".join(map(str, arguments))
        if name == "torch._utils._rebuild_tensor_v2" and isinstance(arguments, tuple) and len(arguments) in (6, 7):
            return self._tensor(arguments)
        parameter = name == "torch._utils._rebuild_parameter" and isinstance(arguments, tuple)
        if parameter and len(arguments) == 3 and isinstance(arguments[0], _Held):
            return arguments[0]
        raise self._refused(f"a call of {name or shown(called)}")

    def _tensor(self, arguments: tuple[Any, ...]) -> _Held:
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise self._refused(f"a tensor of {shown(arguments)}")
        if len(shape) > MAX_DIMENSIONS or len(stride) != len(shape):
            raise self._refused(f"a tensor of shape {shown(shape)} and strides {shown(stride)}")
        what = "data.pkl: a tensor"
        offset = integer(self.path, f"{what}: storage_offset", offset, 0)
        shape, stride = (tuple(integers(self.path, what, list(given), None, MOST)) for given in (shape, stride))
        return _Held(storage, offset, shape, stride)
