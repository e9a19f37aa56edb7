"""The folder written by an extraction.

manifest.json     what was extracted and how; `complete` when everything is there
shards.jsonl      one line per finished shard, appended last: its contents, its hashes, where the next one begins
latents/NNNNNN.parquet    document int64, position int32, token_id int32, feature int32, value float32
tokens/NNNNNN.parquet     document int64, position int32, token_id int32, read bool (False: special, no latents)
documents/NNNNNN.parquet  document int64, source string, record int64: origin of the documents that begin in this shard
tokenizer/        the tokenizer, as transformers saves one

Rows are ascending by document, position and feature; a position counts the tokens of the whole document from 0.
Files are written atomically.  A shard without a line in shards.jsonl is not finished and is written again.

"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemmascope_fast.analysis.extraction.windows import Cursor
from gemmascope_fast.errors import GemmaScopeFastError, require
from gemmascope_fast.files import atomic as files
from gemmascope_fast.files import identity
from gemmascope_fast.files.atomic import replacing, replacing_folder, saying_where
from gemmascope_fast.files.identity import digest_of
from gemmascope_fast.files.results import write_json

VERSION = 3  # 1: fingerprints were of a sample of the weights; 2: no fields of records, white space around texts
TABLES = ("latents", "tokens", "documents")
SAFE = "; finished shards are safe, and the same command continues after them"
Columns = dict[str, Any]


class StoreError(GemmaScopeFastError):
    """A folder of latents is damaged, incomplete or of another extraction; the message names the file."""


def schemas() -> dict[str, Any]:
    """pyarrow's schema of each table."""
    import pyarrow as pa

    place = [("document", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32())]
    return {
        "latents": pa.schema([*place, ("feature", pa.int32()), ("value", pa.float32())]),
        "tokens": pa.schema([*place, ("read", pa.bool_())]),
        "documents": pa.schema(
            [("document", pa.int64()), ("source", pa.string()), ("record", pa.int64()), ("about", pa.string())]
        ),
    }


class Store:
    """Latents in a folder, for reading; `Writer` writes them."""

    def __init__(self, folder: str | Path) -> None:
        """Raises StoreError if there are none."""
        require("pyarrow", "analysis", "latents")
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text("utf-8"))
            self.settings = self.manifest["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{folder}: expected a folder that `extract` wrote: {error}") from error
        self.shards = read_journal(self.folder / "shards.jsonl")

    @property
    def d_sae(self) -> int:
        return int(self.settings["d_sae"])

    @property
    def tokens(self) -> int:
        """Number of tokens read, without special ones."""
        return sum(shard["read"] for shard in self.shards)

    def path(self, table: str, shard: int) -> Path:
        return self.folder / table / f"{shard:06d}.parquet"

    def paths(self, table: str) -> list[Path]:
        """The files of the table in order."""
        return [self.path(table, i) for i in range(len(self.shards))]

    def read(self, table: str, shard: int, columns: list[str] | None = None) -> dict[str, np.ndarray]:
        """One shard's columns as numpy arrays.  Raises StoreError if the file is damaged."""
        import pyarrow.parquet as pq

        path = self.path(table, shard)
        try:
            found = pq.read_table(path, columns=columns, memory_map=True)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise StoreError(f"{path}: expected a Parquet file of this extraction: {error}") from error
        if found.num_rows != self.shards[shard]["rows"][table]:
            raise StoreError(f"{path}: expected {self.shards[shard]['rows'][table]} rows, got {found.num_rows}")
        return {name: found.column(name).to_numpy() for name in found.column_names}

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)

    def damaged(self, progress: Callable[[], None] = lambda: None) -> dict[int, str]:
        """Shards with a missing or changed file, and what is wrong; reads every byte."""
        found: dict[int, str] = {}
        for i, shard in enumerate(self.shards):
            for table in TABLES:
                path = self.path(table, i)
                if not path.is_file():
                    found.setdefault(i, f"{path} is missing")
                elif digest_of(path) != shard["sha256"][table]:
                    found.setdefault(i, f"{path} was changed: its SHA-256 differs")
            progress()
        return found

    def check(self) -> None:
        """Raise StoreError unless every file is unchanged, rows are ascending, and the counts are those recorded."""
        for i, wrong in self.damaged().items():
            raise StoreError(f"shard {i}: {wrong}; `extract --repair` makes it again")
        last = (-1, -1)
        for i, shard in enumerate(self.shards):
            tokens, latents = self.read("tokens", i), self.read("latents", i)
            last = _ascending(self.path("tokens", i), tokens, last)
            _check_latents(self.path("latents", i), tokens, latents, self.d_sae)
            if int(tokens["read"].sum()) != shard["read"]:
                raise StoreError(f"{self.path('tokens', i)}: expected {shard['read']} tokens that were read")


class Writer(Store):
    """The single process that writes a folder.  A context manager: it locks the folder."""

    def __init__(self, folder: str | Path, settings: dict[str, Any], tokenizer: Any) -> None:
        """Create or continue the folder.  StoreError if it belongs to another extraction or another process."""
        require("pyarrow", "analysis", "extract")
        self.folder = Path(folder)
        settings = json.loads(json.dumps(settings | {"version": VERSION}))
        known = self.folder / "manifest.json"
        if not known.exists():
            if self.folder.exists() and any(p.name != ".lock" for p in self.folder.iterdir()):
                strange = [p for p in self.folder.iterdir() if not _is_ours(p.name)]
                if strange or not (self.folder / ".lock").exists():
                    raise StoreError(f"--out {folder}: expected an empty folder or one that `extract` wrote")
            files.make_folder(self.folder)
        try:
            self._lock = files.lock(self.folder / ".lock")
        except BlockingIOError as error:
            raise StoreError(f"--out {folder}: another process is writing there") from error
        try:
            self._begin(known, settings, tokenizer)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, known: Path, settings: dict[str, Any], tokenizer: Any) -> None:
        if known.exists():
            super().__init__(self.folder)
            identity.check(f"--out {self.folder}", self.settings, settings, StoreError)
        else:
            for table in TABLES:
                files.make_folder(self.folder / table)
            files.remove_folder(self.folder / "tokenizer")  # incomplete, or another model's
            with replacing_folder(self.folder / "tokenizer") as temporary:
                _save_tokenizer(tokenizer, temporary)
            self.settings, self.shards = settings, []
            self.manifest = {"settings": settings, "complete": False}
            write_json(known, self.manifest)
        truncate_torn_line(self.folder / "shards.jsonl")
        for table in (".", *TABLES):
            files.clean(self.folder / table)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    def cursor(self, shard: int) -> Cursor:
        """The position at which shard `shard` begins."""
        return Cursor(*self.shards[shard - 1]["end"]) if shard else Cursor()

    def write(self, index: int, tables: dict[str, Columns], end: Cursor, done: int) -> None:
        """Write shard `index`: the next one, or an existing one again. That must be the same as before, otherwise
        StoreError and no file is replaced.

        done: bytes of the sources read by then.

        OSError if the disk is full: finished shards stay, and the same command continues after them.
        """
        known = self.shards[index]["sha256"] if index < len(self.shards) else {}
        written = {table: self._write_table(table, index, tables[table], known.get(table)) for table in TABLES}
        line = {
            "shard": index,
            "rows": {table: rows for table, (rows, _) in written.items()},
            "sha256": {table: digest for table, (_, digest) in written.items()},
            "read": int(np.sum(tables["tokens"]["read"])),
            "end": list(end),
            "done": done,
        }
        if known:
            return
        with saying_where(self.folder / "shards.jsonl", SAFE):
            files.append(self.folder / "shards.jsonl", json.dumps(line).encode() + b"\n")
        self.shards.append(line)

    def finish(self) -> None:
        self.manifest["complete"] = True
        write_json(self.folder / "manifest.json", self.manifest)

    def _write_table(self, table: str, index: int, columns: Columns, known: str | None) -> tuple[int, str]:
        """(rows, SHA-256) of the file; StoreError, before the file is replaced, if the hash is not the known one."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(table, index)
        rows = pa.table(columns, schema=schemas()[table])
        with saying_where(path, SAFE), replacing(path) as temporary:
            pq.write_table(rows, temporary, compression="zstd", row_group_size=1 << 20)
            digest = digest_of(temporary)
            if known is not None and digest != known:
                raise StoreError(
                    f"shard {index}: made again, its {table} differ from what was written before; the same text,"
                    " machine and versions are needed"
                )
        return rows.num_rows, digest


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The finished shards.  A last line cut short by a kill is ignored; any other damage is a StoreError."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            shard = json.loads(line)
            if shard["shard"] != number - 1:
                raise ValueError(f"expected shard {number - 1}, got {shard['shard']}")
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number}: {error}") from error
        found.append(shard)
    return found


def truncate_torn_line(path: Path) -> None:
    """Truncate after the last line end, so that the next line is not appended to an incomplete one."""
    if path.exists():
        whole = path.read_bytes()
        kept = whole.rfind(b"\n") + 1
        if kept < len(whole):
            files.truncate(path, kept)


def _is_ours(name: str) -> bool:
    """Whether a kill before the first manifest can leave a file or folder of this name."""
    return name in (".lock", "tokenizer", *TABLES) or files.is_temporary(name)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # the tokenizers library raises plain exceptions, even for a full disk
        if type(error) is not Exception:
            raise
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(int(number[1]) if number else None, str(error)) from error


def _ascending(path: Path, rows: dict[str, np.ndarray], last: tuple[int, int]) -> tuple[int, int]:
    document, position = rows["document"], rows["position"].astype(np.int64)
    if not len(document):
        return last
    steps = np.diff(document, prepend=last[0])
    further = np.diff(position, prepend=last[1])
    if not bool(np.all(((steps > 0) & (position == 0)) | ((steps == 0) & (further == 1)))):
        raise StoreError(f"{path}: expected every token of every document once, in order")
    return int(document[-1]), int(position[-1])


def _check_latents(path: Path, tokens: dict[str, np.ndarray], latents: dict[str, np.ndarray], d_sae: int) -> None:
    feature = latents["feature"]
    if len(feature) and not (int(feature.min()) >= 0 and int(feature.max()) < d_sae):
        raise StoreError(f"{path}: expected features in [0, {d_sae})")
    key = latents["document"] * (1 << 32) + latents["position"]
    known = (tokens["document"] * (1 << 32) + tokens["position"])[tokens["read"]]
    if not bool(np.isin(key, known).all()):
        raise StoreError(f"{path}: expected latents of tokens that were read")
    steps = np.diff(key)
    if bool(np.any((steps < 0) | ((steps == 0) & (np.diff(feature) <= 0)))):
        raise StoreError(f"{path}: expected rows ascending by document, position and feature")
