"""Activations and latents at a model's sites, text by text: for comparisons of whole texts, which store no shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.analysis.extraction.windows import batches, padded
from gemmascope_fast.attach import Activations, attach
from gemmascope_fast.attach.entries import site_of
from gemmascope_fast.attach.observers import Observer
from gemmascope_fast.attach.tokens import device_of, opening, room
from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.training.activations import first_layers

Rows = dict[Any, Any]  # by key: Tensor [n, d] for an `Activations`, SparseLatents [n, d_sae] for an SAE
CHUNK = 64  # texts tokenised and sorted by length together


class _Seen(Observer):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    def update(self, latents: SparseLatents, tokens: Any) -> None:
        self.calls.append((latents.cpu(), tokens))

    def sink(self, x: Tensor, tokens: Any) -> None:
        kept = tokens.valid.nonzero()[:, 0]
        self.calls.append((x.float().cpu()[kept], type(tokens)(**{n: v[kept] for n, v in vars(tokens).items()})))


def read_texts(
    model: Any,
    tokenizer: Any,
    sites: Mapping[Any, Any],
    texts: Iterable[str],
    *,
    window: int = 1023,
    batch: int = 2048,
    progress: Callable[[int], None] = lambda _texts: None,
) -> Iterator[tuple[list[int], Rows]]:
    """Yield (token ids, rows by key) of each text, in order; rows are those of the content tokens.

    sites: `saes` of attach as a dict; an `Activations()` in place of an SAE gives the activations in fp32.  Texts
    longer than the window are read in parts, each after a BOS.  Layers after the last site are not run.  ValueError if
    a part is longer than the model's window.
    """
    layers = [site_of(key, getattr(getattr(coder, "cfg", None), "site", None)).layer for key, coder in sites.items()]
    known = [layer for layer in layers if layer is not None]
    last = max(known) if len(known) == len(layers) else len(Structure(model).stack()[1]) - 1
    most = room(model, tokenizer)
    stream, number = iter(texts), 0
    while chunk := list(islice(stream, CHUNK)):
        # the model is restored whenever the caller has control
        with first_layers(model, last + 1) as decoder:
            found = list(_chunk(decoder, tokenizer, sites, chunk, window, batch, most, number))
        number += len(chunk)
        progress(len(chunk))
        yield from found


def _chunk(
    model: Any, tokenizer: Any, sites: Mapping[Any, Any], texts: list[str], window: int, batch: int,
    most: int | None, before: int,
) -> Iterator[tuple[list[int], Rows]]:  # fmt: skip
    head = opening(tokenizer)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    for number, own in enumerate(ids, before + 1):
        if window < 1 or (most is not None and min(window, len(own)) > most):
            raise ValueError(
                f"text {number}: expected at most {most} tokens at once, the model's window after the BOS, got"
                f" {len(own)} and a window of {window}"
            )
    windows = [(t, own[at : at + window]) for t, own in enumerate(ids) for at in range(0, len(own), window)]
    found: list[Rows] = [{} for _ in windows]
    for rows in batches([len(own) + len(head) for _, own in windows], batch):
        for key, parts in _batch(model, tokenizer, sites, [[*head, *windows[i][1]] for i in rows]).items():
            for i, part in zip(rows, parts, strict=True):
                found[i][key] = part
    for t, own in enumerate(ids):
        mine = [rows for (text, _), rows in zip(windows, found, strict=True) if text == t]
        yield own, {key: _joined([rows[key] for rows in mine]) for key in sites} if mine else {}


def _batch(model: Any, tokenizer: Any, sites: Mapping[Any, Any], rows: list[list[int]]) -> dict[Any, list[Any]]:
    pad = tokenizer.pad_token_id
    ids, mask = padded(rows, 0 if pad is None else pad, device_of(model))
    seen = {key: _Seen() for key in sites}
    coders = {key: Activations(seen[key].sink) if isinstance(c, Activations) else c for key, c in sites.items()}
    with torch.inference_mode(), attach(model, coders, tokens="content", keep=False) as run:
        for key, coder in coders.items():
            if not isinstance(coder, Activations):
                run.watch(seen[key], key)
        model(ids, attention_mask=mask, use_cache=False)
    out = {}
    for key, own in seen.items():
        ((values, tokens),) = own.calls
        ends = torch.searchsorted(tokens.sequence, torch.arange(len(rows) + 1)).tolist()
        out[key] = [values[begin:end] for begin, end in pairwise(ends)]
    return out


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else SparseLatents.cat(parts)
