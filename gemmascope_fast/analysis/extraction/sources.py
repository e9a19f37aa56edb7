"""Reads texts from files, JSON lines, Parquet and Hugging Face datasets, one document at a time."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from gemmascope_fast.checkpoints.bundled import EXAMPLES
from gemmascope_fast.errors import require
from gemmascope_fast.training.text import NAMED

CHUNK = 1 << 20  # bytes of a text file decoded at a time
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
SPLITS = ("file", "paragraph", "line")
BUNDLED = {"demo:past": EXAMPLES / "past.txt", "demo:present": EXAMPLES / "present.txt"}


@dataclass(frozen=True)
class Document:
    """One text, in parts that are read on demand.

    source, record: its position: a file and its line (from 1); for a Parquet file or dataset, its row.
    done: bytes of all sources read so far.  about: the record's other fields, such as label, group or role.
    """

    parts: Iterable[str]
    source: str
    record: int
    done: Callable[[], int]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A resolved name from --text: `read(column, split)` returns its documents; size in bytes, None if unknown."""

    name: str
    size: int | None
    read: Callable[[str, str], Iterator[Document]]


def resolve(names: Sequence[str]) -> list[Source]:
    """Each of `names`: a file (.txt, .jsonl, .ndjson, each also .gz; .parquet), a folder of those, 'pydoc', 'stdlib',
    '-' for standard input (as a .txt), 'demo:past', 'demo:present', or hf:DATASET[:CONFIG][@SPLIT].  ValueError for
    anything else, before a file is read.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if name == "-":
            found.append(_standard_input())
        elif name in NAMED:
            found.append(_builtin(name))
        elif name in BUNDLED:
            found.append(_file(BUNDLED[name]))
        elif name.startswith("hf:"):
            found.append(_dataset(name))
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in SUFFIXES)
            if not inside:
                raise ValueError(f"--text {name}: expected a folder with files of {', '.join(SUFFIXES)}, got none")
            found += [_file(p) for p in inside]
        elif path.is_file():
            found.append(_file(path))
        else:
            raise ValueError(f"--text: expected a file, a folder, 'pydoc', 'stdlib' or hf:DATASET, got {name!r}")
    return found


def documents(sources: Sequence[Source], column: str = "text", split: str = "file") -> Iterator[Document]:
    """All documents in order, without the white space at their ends: one text is the same from every kind of source.

    column: the key of the text in JSON lines, Parquet and datasets.  split: whether a text file is one document, or
    each paragraph (separated by blank lines) or line is one.

    ValueError if a record cannot be read; the message has file and line.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: expected one of {', '.join(SPLITS)}, got {split!r}")
    before = 0
    for source in sources:
        for document in source.read(column, split):
            yield replace(document, parts=stripped(document.parts), done=partial(_sum, before, document.done))
        before += source.size or 0


def stripped(parts: Iterable[str]) -> Iterator[str]:
    """`str.strip` of a text in parts."""
    begun, spaces = False, ""
    for part in parts:
        rest = part if begun else part.lstrip()
        body = rest.rstrip()
        if body:
            yield spaces + body
            begun, spaces = True, ""
        spaces += rest[len(body) :]


def _sum(before: int, done: Callable[[], int]) -> int:
    return before + done()


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _file(path: Path) -> Source:
    kind = _kind(path)
    if kind not in SUFFIXES:
        raise ValueError(f"--text {path}: expected a name ending in {', '.join(SUFFIXES)}")
    readers: dict[str, Any] = {".txt": _text, ".parquet": _parquet}
    if kind == ".parquet":
        require("pyarrow", "analysis", f"--text {path}")
    read = readers.get(kind, _json_lines)
    return Source(str(path), path.stat().st_size, lambda column, split: read(path, column, split))


class _Gzip(gzip.GzipFile):
    """Reads like its base class; damage is a ValueError that names the file."""

    def read(self, size: int | None = -1) -> bytes:
        with _naming(self.name):
            return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        with _naming(self.name):
            return super().readline(size)


@contextmanager
def _naming(path: object) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file: {error}") from error


def _open(path: Path) -> tuple[IO[bytes], Callable[[], int]]:
    """(the file's bytes, decompressed if it is .gz; a function that returns how many bytes of the file were read)."""
    if path.suffix == ".gz":
        packed = _Gzip(path, "rb")
        return packed, packed.fileobj.tell  # type: ignore[return-value,union-attr,attr-defined]
    file = open(path, "rb")  # noqa: SIM115
    return file, file.tell


def _standard_input() -> Source:
    data = NAMED["-"]().encode()  # held: a job may read its texts more than once

    def read(column: str, split: str) -> Iterator[Document]:
        file = io.BytesIO(data)
        return _text(Path("-"), column, split, (file, file.tell))

    return Source("-", len(data), read)


def _text(path: Path, _column: str, split: str, opened: Any = None) -> Iterator[Document]:
    file, done = opened or _open(path)
    with file:
        if split == "file":
            yield Document(_decoded(path, file), str(path), 1, done)
            return
        held: list[str] = []
        first = 1
        for number, line in _lines(path, file):
            if split == "line":
                if line.strip():
                    yield Document([line], str(path), number, done)
            elif line.strip():
                first = first if held else number
                held.append(line)
            elif held:
                yield Document(["".join(held)], str(path), first, done)
                held = []
        if held:
            yield Document(["".join(held)], str(path), first, done)


def _decoded(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Yield a file of any size, with or without line breaks, in bounded parts; line ends become \\n."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    at, held = 0, ""
    while True:
        block = file.read(CHUNK)
        try:
            text = held + decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8, got {error.reason} near byte {at + error.start}") from error
        at += len(block)
        # a \r at the end may be the first half of a \r\n
        held = "\r" if block and text.endswith("\r") else ""
        text = text[: len(text) - len(held)].replace("\r\n", "\n").replace("\r", "\n")
        if text:
            yield text
        if not block:
            return


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its \\n)."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected UTF-8, got {error.reason}") from error
        yield number, text.replace("\r\n", "\n")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSON lines file, without blank lines.  ValueError names the line."""
    file, _ = _open(path)
    with file:
        yield from _objects(path, file)


def _objects(path: Path, file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: expected one JSON object, got {line[:60]!r}: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:60]}")
        yield number, value


def _json_lines(path: Path, column: str, _split: str) -> Iterator[Document]:
    file, done = _open(path)
    with file:
        for number, value in _objects(path, file):
            yield Document(
                [string(value, column, f"{path}, line {number}")], str(path), number, done, _rest(value, column)
            )


def _rest(value: Mapping[str, Any], column: str) -> dict[str, Any]:
    return {name: other for name, other in value.items() if name != column}


def text(value: dict[str, Any], key: str, where: str) -> str:
    """The text under a key, without the white space at its ends, as `documents` gives it; errors as in `string`."""
    return string(value, key, where).strip()


def string(value: dict[str, Any], key: str, where: str) -> str:
    """value[key], which must be a string; ValueError says where it is."""
    found = value.get(key)
    if not isinstance(found, str):
        raise ValueError(f"{where}: expected a string under {key!r}, got {found!r:.60}; it has {', '.join(value)}")
    if not found.isascii() and any("\ud800" <= c <= "\udfff" for c in found):
        # JSON can contain half of a surrogate pair, which no tokenizer accepts
        raise ValueError(f"{where}: expected text under {key!r}, got half of a surrogate pair in it")
    return found


def _parquet(path: Path, column: str, _split: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a Parquet file: {error}") from error
    with file:
        if column not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path}: expected a column {column!r} (--column), got {names}")
        rows, size = max(file.metadata.num_rows, 1), path.stat().st_size
        row = 0
        batches = file.iter_batches(batch_size=256)
        while (batch := _next_batch(path, batches)) is not None:
            for value in batch.to_pylist():
                row += 1
                own = string(value, column, f"{path}, row {row}")
                done = partial(_share, size, row, rows)
                yield Document([own], str(path), row, done, _rest(value, column))


def _share(size: int, row: int, rows: int) -> int:
    return size * row // rows


def _next_batch(path: Path, batches: Iterator[Any]) -> Any:
    import pyarrow

    try:
        return next(batches, None)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: expected a Parquet file whose pages can be read: {' '.join(str(error).split())}"
        ) from error


def _builtin(name: str) -> Source:
    text = NAMED[name]()
    size = len(text.encode())

    def read(_column: str, split: str) -> Iterator[Document]:
        pattern = {"file": None, "paragraph": r"\n\s*\n", "line": r"\n"}[split]
        texts = [text] if pattern is None else [t for t in re.split(pattern, text) if t.strip()]
        # in proportion to the characters; separators between texts belong to none
        total, taken = sum(map(len, texts)), 0
        for number, each in enumerate(texts, 1):
            taken += len(each)
            yield Document([each], name, number, lambda at=size * taken // total: at)  # type: ignore[misc]

    return Source(name, size, read)


def _dataset(name: str) -> Source:
    require("datasets", "datasets", f"--text {name}")
    match = re.fullmatch(r"hf:([^:@]+)(?::([^@]+))?(?:@(.+))?", name)
    if match is None:
        raise ValueError(f"--text: expected hf:DATASET[:CONFIG][@SPLIT], got {name!r}")
    path, config, part = match.groups()

    def read(column: str, _split: str) -> Iterator[Document]:
        from datasets import load_dataset

        for row, value in enumerate(load_dataset(path, config, split=part or "train", streaming=True), 1):
            yield Document([string(value, column, f"{name}, row {row}")], name, row, lambda: 0, _rest(value, column))

    return Source(name, None, read)
