"""Activations and latents at a model's sites, text by text: for comparisons of whole texts, which store no shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmascope_fast.analysis.extraction.windows import batches, padded
from gemmascope_fast.attach import Activations, attach
from gemmascope_fast.attach.entries import site_of
from gemmascope_fast.attach.observers import Observer
from gemmascope_fast.attach.tokens import content_of, device_of, framing, room, uncached
from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.training.activations import first_layers

Rows = dict[Any, Any]  # by key: Tensor [n, d] for an `Activations`, SparseLatents [n, d_sae] for an SAE
CHUNK = 64  # texts tokenised and sorted by length together


class Answer(NamedTuple):
    """A text that the model reads after a prompt.  Only the text's own tokens are looked at."""

    prompt: str
    text: str


def encoded(tokenizer: Any, text: str | Answer) -> tuple[list[int], list[int]]:
    """(token ids of the prompt and what follows it, token ids of the text), both without those of `framing`.

    A prompt is a user's turn of the tokenizer's chat template.  Without a template, an empty line follows it, and for
    encoders the separator.
    """

    def ids(part: str) -> list[int]:
        own: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return own

    if isinstance(text, str):
        return [], ids(text)
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text.prompt}]
        before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return ids(before.removeprefix(tokenizer.bos_token or "")), ids(text.text)
    _, tail = framing(tokenizer)
    return (ids(text.prompt) + tail, ids(text.text)) if tail else (ids(text.prompt + "\n\n"), ids(text.text))


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
    texts: Iterable[str | Answer],
    *,
    window: int = 1023,
    batch: int = 2048,
    progress: Callable[[int], None] = lambda _texts: None,
) -> Iterator[tuple[list[int], Rows]]:
    """Yield (token ids, rows by key) of each text, in order; rows are those of the content tokens, and of an `Answer`
    those of its own tokens.

    sites: `saes` of attach as a dict; an `Activations()` in place of an SAE gives the activations in fp32.  Texts
    longer than the window are read in parts, each after a BOS.  Layers after the last site are not run.  ValueError if
    a part is longer than the model's window, or an answer with its prompt longer than the window.
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
    model: Any, tokenizer: Any, sites: Mapping[Any, Any], texts: list[str | Answer], window: int, batch: int,
    most: int | None, before: int,
) -> Iterator[tuple[list[int], Rows]]:  # fmt: skip
    head, tail = framing(tokenizer)
    pairs = [encoded(tokenizer, text) for text in texts]
    prompts, ids = [prompt for prompt, _ in pairs], [own for _, own in pairs]
    for number, (prompt, own) in enumerate(pairs, before + 1):
        if window < 1 or (most is not None and min(window, len(own) + len(prompt)) > most):
            raise ValueError(
                f"text {number}: expected at most {most} tokens at once, the model's window without the special tokens,"
                f" got {len(own) + len(prompt)} and a window of {window}"
            )
        if prompt and len(prompt) + len(own) > window:
            raise ValueError(
                f"text {number}: expected at most {window} tokens of prompt and answer (--window), got"
                f" {len(prompt) + len(own)}"
            )
    windows = [(t, own[at : at + window]) for t, own in enumerate(ids) for at in range(0, len(own), window)]
    found: list[Rows] = [{} for _ in windows]
    answers = any(prompts)
    for rows in batches([len(own) + len(prompts[t]) + len(head) + len(tail) for t, own in windows], batch):
        read = [[*head, *prompts[windows[i][0]], *windows[i][1], *tail] for i in rows]
        ends = [len(row) - len(tail) for row in read]
        spans = [(end - len(windows[i][1]), end) for i, end in zip(rows, ends, strict=True)]
        for key, parts in _batch(model, tokenizer, sites, read, spans if answers else None).items():
            for i, part in zip(rows, parts, strict=True):
                found[i][key] = part
    for t, own in enumerate(ids):
        mine = [rows for (text, _), rows in zip(windows, found, strict=True) if text == t]
        yield own, {key: _joined([rows[key] for rows in mine]) for key in sites} if mine else {}


def _batch(
    model: Any, tokenizer: Any, sites: Mapping[Any, Any], rows: list[list[int]], spans: list[tuple[int, int]] | None
) -> dict[Any, list[Any]]:
    """spans: the columns (begin, end) of each row that are looked at; None for all content tokens."""
    pad = tokenizer.pad_token_id
    ids, mask = padded(rows, 0 if pad is None else pad, device_of(model))
    chosen: Any = content_of(tokenizer) if spans is None else columns(spans, ids.shape[1])
    seen = {key: _Seen() for key in sites}
    coders = {key: Activations(seen[key].sink) if isinstance(c, Activations) else c for key, c in sites.items()}
    with torch.inference_mode(), attach(model, coders, tokens=chosen, keep=False) as run:
        for key, coder in coders.items():
            if not isinstance(coder, Activations):
                run.watch(seen[key], key)
        model(ids, attention_mask=mask, **uncached(model))
    out = {}
    for key, own in seen.items():
        ((values, tokens),) = own.calls
        ends = torch.searchsorted(tokens.sequence, torch.arange(len(rows) + 1)).tolist()
        out[key] = [values[begin:end] for begin, end in pairwise(ends)]
    return out


def columns(spans: Sequence[tuple[int, int]], length: int) -> Tensor:
    """bool [B, length]: True in each row's columns from begin to end."""
    at = torch.arange(length)
    return torch.stack([(at >= begin) & (at < end) for begin, end in spans])


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else SparseLatents.cat(parts)
