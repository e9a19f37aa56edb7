"""The main loop: text in, shards of latents out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemmascope_fast.analysis.extraction.sources import Document
from gemmascope_fast.analysis.extraction.store import Columns, StoreError, Writer
from gemmascope_fast.analysis.extraction.windows import Block, Cursor, Window, batches, blocks, padded
from gemmascope_fast.attach import attach
from gemmascope_fast.attach.calls import Tokens
from gemmascope_fast.attach.entries import entries
from gemmascope_fast.attach.tokens import content_of, framing, room, uncached
from gemmascope_fast.files import identity
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.training.activations import first_layers

WINDOW, BATCH, SHARD = 1024, 2048, 32768
Made = tuple[Block, dict[str, Columns]]  # a block and its tables
Engine = Callable[[Callable[[Cursor], Iterable[Block]], Cursor], Iterator[Made]]


@dataclass
class Extractor:
    """Converts windows to the tables of one shard.  It uses no files, so any engine can run it.

    sites: `saes` of `attach`, with one SAE.  window: tokens of a window without its BOS. batch: tokens of a batch with
    padding.  model_seconds: time in the model's forward, without the SAE.
    """

    model: Any
    tokenizer: Any
    sites: Any
    window: int = WINDOW
    batch: int = BATCH
    model_seconds: float = 0.0
    _seen: list[tuple[SparseLatents, Tokens]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(entries(self.sites)) != 1:
            raise ValueError(f"sites: expected one SAE, got {len(entries(self.sites))}")
        most = room(self.model, self.tokenizer)
        if self.window < 1 or (most is not None and self.window > most):
            raise ValueError(
                f"--window: expected 1 to {most} tokens, the model's window without special tokens, got {self.window}"
            )
        if self.batch < 1:
            raise ValueError(f"--batch: expected a number of tokens, got {self.batch}")

    def __call__(self, block: Block, tick: Callable[[int], None] = lambda _tokens: None) -> dict[str, Columns]:
        """latents, tokens and documents as columns, ascending by document, position and feature.  tick is called with
        each batch's number of tokens."""
        windows = block.windows
        found: list[tuple[Columns, Columns]] = [None] * len(windows)  # type: ignore[list-item]
        head, tail = framing(self.tokenizer)
        pad = self.tokenizer.pad_token_id
        with self._shortened() as model, torch.inference_mode():
            for rows in batches([len(w.ids) + len(head) + len(tail) for w in windows], self.batch):
                ids, mask = padded([[*head, *windows[i].ids, *tail] for i in rows], 0 if pad is None else pad)
                own = self._read(model, ids, mask)
                for i, part in zip(rows, _by_window(own, [windows[i] for i in rows], len(head)), strict=True):
                    found[i] = part
                tick(sum(len(windows[i].ids) for i in rows))
        return {
            "latents": _joined([latents for latents, _ in found], _LATENTS),
            "tokens": _joined([tokens for _, tokens in found], _TOKENS),
            "documents": _document_columns(block.documents),
        }

    def _shortened(self) -> Any:
        """The decoder up to the layer that is read, if the site names one; later layers are not needed."""
        site = entries(self.sites)[0].site
        return nullcontext(self.model) if site.layer is None else first_layers(self.model, site.layer + 1)

    def _read(self, model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[SparseLatents, Tokens]:
        device = next(model.parameters()).device
        more = {} if mask is None else {"attention_mask": mask.to(device)}
        self._seen.clear()
        with attach(model, self.sites, tokens=content_of(self.tokenizer), keep=False) as run:
            run.watch(self)
            begin = time.perf_counter()
            model(ids.to(device), **uncached(model), **more)
            self.model_seconds += time.perf_counter() - begin - run.seconds
        return self._seen[0]

    def update(self, latents: SparseLatents, tokens: Tokens) -> None:
        """Called as an observer of a run."""
        self._seen.append((latents.cpu(), tokens))


_LATENTS = {
    "document": np.int64, "position": np.int32, "token_id": np.int32, "feature": np.int32, "value": np.float32
}  # fmt: skip
_TOKENS = {"document": np.int64, "position": np.int32, "token_id": np.int32, "read": np.bool_}


def _by_window(
    read: tuple[SparseLatents, Tokens], windows: Sequence[Window], head: int
) -> list[tuple[Columns, Columns]]:
    """Yield (latents, tokens) as columns for each window of one batch, whose rows are in order."""
    latents, rows = read
    sequence, column = rows.sequence.numpy(), rows.position.numpy()
    crow = latents.crow_indices.numpy()
    feature, value = latents.col_indices.numpy(), latents.values.float().numpy()
    ends = np.searchsorted(sequence, np.arange(len(windows)) + 1)
    found, begin = [], 0
    for window, end in zip(windows, ends.tolist(), strict=True):
        index = column[begin:end] - head
        counts = np.diff(crow[begin : end + 1])
        ids = np.asarray(window.ids, np.int32)
        taken = np.zeros(len(ids), bool)
        taken[index] = True
        at = np.repeat(index, counts)
        pairs = slice(crow[begin], crow[end])
        found.append(
            (
                {
                    "document": np.full(len(at), window.document), "position": at + window.start,
                    "token_id": ids[at], "feature": feature[pairs], "value": value[pairs],
                },
                {
                    "document": np.full(len(ids), window.document),
                    "position": np.arange(len(ids)) + window.start, "token_id": ids, "read": taken,
                },
            )
        )  # fmt: skip
        begin = end
    return found


def _joined(parts: Sequence[Columns], types: dict[str, Any]) -> Columns:
    return {
        name: np.concatenate([np.empty(0, kind), *(part[name].astype(kind, copy=False) for part in parts)])
        for name, kind in types.items()
    }


def _document_columns(documents: Sequence[tuple[int, str, int, str | None]]) -> Columns:
    names = ("document", "source", "record", "about")
    columns = zip(*documents, strict=True) if documents else ((),) * len(names)
    return {name: list(column) for name, column in zip(names, columns, strict=True)}


def extract(
    extractor: Extractor,
    documents: Callable[[], Iterable[Document]],
    out: str | Path,
    *,
    about: dict[str, Any],
    shard: int = SHARD,
    progress: Callable[[int, float], None] = lambda _tokens, _done: None,
    repair: bool = False,
    engine: Engine | None = None,
) -> Writer:
    """Extract everything that is not yet in the folder `out`; returns the store, complete and checked.

    documents(): returns the text, from the start at each call.  about: more settings to record (names of model and
    text).  progress(tokens, done) is called for each batch: its tokens, and bytes of the sources read so far (in the
    first call, those read in earlier runs).  repair: make shards that were damaged again; without it they are a
    StoreError.  engine(fresh, start): makes the tables of the blocks fresh(start) elsewhere, in order
    (`ray_engine.RayEngine`); None: in this process.  Calling it again with the same arguments continues stopped work.
    """
    if shard < 1:
        raise ValueError(f"--shard: expected a number of tokens, got {shard}")
    (entry,) = entries(extractor.sites)
    sae = entry.coder
    assert isinstance(sae, Coder)
    settings = about | {
        "hook_name": entry.site.hook_name, "d_sae": sae.cfg.d_sae, "window": extractor.window,
        "batch": extractor.batch, "shard": shard, "dtype": str(next(extractor.model.parameters()).dtype),
        "model_fingerprint": identity.of_module(extractor.model), "sae_fingerprint": identity.of_module(sae),
        "tokenizer_fingerprint": identity.of_tokenizer(extractor.tokenizer),
    }  # fmt: skip
    with Writer(out, settings, extractor.tokenizer) as store:
        damaged = store.damaged()
        if damaged and not repair:
            number, what = next(iter(damaged.items()))
            raise_damaged(number, what, len(damaged))

        fresh = _Fresh(documents, extractor.tokenizer, extractor.window, shard)

        for index in damaged:
            block = next(iter(fresh(store.cursor(index))))
            store.write(index, extractor(block), block.end, block.done)
        if not store.complete:
            done = store.shards[-1]["done"] if store.shards else 0
            progress(0, done)
            start = store.cursor(len(store.shards))
            for block, tables in (engine or _here(extractor, progress, done))(fresh, start):
                if block.tokens or block.documents:
                    store.write(len(store.shards), tables, block.end, block.done)
                if engine is not None:
                    progress(block.tokens, block.done)
            store.finish()
        else:
            _check_text(store, fresh)
        store.check()
    return store


def _check_text(store: Writer, fresh: Callable[[Cursor], Iterable[Block]]) -> None:
    """Raise ValueError unless the text of a complete extraction is unchanged: it is read again, not run."""
    for block in fresh(store.cursor(len(store.shards))):
        if block.tokens or block.documents:
            raise ValueError(
                f"--text: {store.folder} is a complete extraction of another text: this one is longer; extract into"
                " another folder"
            )


@dataclass(frozen=True)
class _Fresh:
    """Yields the blocks from a cursor on. It contains no model, so it can be sent to where the text is read."""

    documents: Callable[[], Iterable[Document]]
    tokenizer: Any
    window: int
    shard: int

    def __call__(self, start: Cursor) -> Iterable[Block]:
        return blocks(self.documents(), self.tokenizer, window=self.window, size=self.shard, start=start)


def _here(extractor: Extractor, progress: Callable[[int, float], None], done: float) -> Engine:
    """The engine of this process: makes one block after another."""

    def run(fresh: Callable[[Cursor], Iterable[Block]], start: Cursor) -> Iterator[Made]:
        before = done
        for block in fresh(start):
            yield block, extractor(block, _Ticks(progress, before, block))
            before = block.done

    return run


class _Ticks:
    """Converts a block's batches to bytes of the sources, in proportion to its tokens."""

    def __init__(self, progress: Callable[[int, float], None], begin: float, block: Block) -> None:
        self.progress, self.begin, self.block, self.tokens = progress, begin, block, 0

    def __call__(self, tokens: int) -> None:
        self.tokens += tokens
        share = self.tokens / max(self.block.tokens, 1)
        self.progress(tokens, self.begin + share * (self.block.done - self.begin))


def raise_damaged(number: int, what: str, count: int) -> None:
    more = f" ({count} shards are damaged)" if count > 1 else ""
    raise StoreError(f"shard {number}: {what}{more}; --repair makes it again and keeps the others")
