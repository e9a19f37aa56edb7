"""Documents → windows of tokens → blocks, the unit of work: one block is one shard. Its contents depend only on the
text and the settings, so an interrupted run continues with the same blocks."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmascope_fast.analysis.evaluation.run import pieces
from gemmascope_fast.analysis.extraction.sources import Document


class Window(NamedTuple):
    """Consecutive tokens of one document, read by the model at once after a BOS; `start`: position of the first."""

    document: int
    start: int
    ids: list[int]


class Cursor(NamedTuple):
    """How far the text was read: documents begun, windows used of the last one, and a hash of the texts of the earlier
    documents and of the tokens used of the last one."""

    documents: int = 0
    windows: int = 0
    digest: str = ""


START = Cursor()


@dataclass
class Block:
    """Windows of one shard in order, documents that begin in it (number, source, record, other fields as JSON), where
    the next one begins."""

    windows: list[Window] = field(default_factory=list)
    documents: list[tuple[int, str, int, str | None]] = field(default_factory=list)
    tokens: int = 0
    end: Cursor = field(default_factory=Cursor)
    done: int = 0  # bytes of the sources read
    last: bool = False  # nothing follows


def blocks(
    documents: Iterable[Document], tokenizer: Any, *, window: int, size: int, start: Cursor = START
) -> Iterator[Block]:
    """Blocks of at least `size` tokens (the last may be smaller), made of windows of at most `window` tokens.

    start: a block's `end`; the text before it is read again, compared with its hash, and left out.  Raises ValueError
    if it is not the text that was read before.
    """
    block, chain, number, end = Block(), b"", -1, Cursor()
    for number, document in enumerate(documents):
        resumed = number == start.documents - 1
        skipped = start.windows if resumed else 0
        if number >= start.documents:
            about = json.dumps(document.about, ensure_ascii=False, default=str) if document.about else None
            block.documents.append((number, document.source, document.record, about))
        text, taken = hashlib.sha256(chain), hashlib.sha256(chain)
        count = position = 0
        for part in pieces(document.parts):
            text.update(part.encode("utf-8", "surrogatepass"))
            if number < start.documents - 1:
                continue
            ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for at in range(0, len(ids), window):
                own = ids[at : at + window]
                if count == skipped and resumed:
                    _check(taken.hexdigest() == start.digest, document)
                if count >= skipped:
                    if block.tokens >= size:
                        block.end, block.done = Cursor(number + 1, count, taken.hexdigest()), document.done()
                        yield block
                        block = Block()
                    block.windows.append(Window(number, position + at, own))
                    block.tokens += len(own)
                taken.update(array("q", own).tobytes())
                count += 1
            position += len(ids)
        if resumed and count <= skipped:
            _check(count == skipped and taken.hexdigest() == start.digest, document)
        chain, end = text.digest(), Cursor(number + 1, count, taken.hexdigest())
        block.done = document.done()
    if number + 1 < start.documents:
        raise ValueError(f"--text: {start.documents} documents were read before, now there are only {number + 1}")
    block.end, block.last = end, True
    yield block


def _check(same: bool, document: Document) -> None:
    if not same:
        raise ValueError(
            f"--text: {document.source}, record {document.record}: the text up to here is not the one that this"
            " extraction read before; restore it, or extract into another folder"
        )


def batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of windows by decreasing length, in batches of at most `most` tokens including padding (at least one
    window)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[list[int]] = []
    for i in order:
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= most:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """(ids int64 [B, S], padded on the right; mask int64 [B, S], None if there is no padding)."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), None if bool(mask.all()) else mask.to(device)
