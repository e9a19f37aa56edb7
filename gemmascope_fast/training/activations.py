"""Activations of a model at one layer: collected in windows through `attach`, stored on disk, read in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.attach.selection import Selection
from gemmascope_fast.attach.tokens import content_of, device_of, framing, uncached
from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.files import identity, progress
from gemmascope_fast.files.atomic import make_folder, replacing
from gemmascope_fast.sae.sites import Site

WINDOW = 255  # content tokens after the BOS
WINDOWS_AT_ONCE = 8
PART = 4 * WINDOWS_AT_ONCE * WINDOW  # tokens per file: after a kill, at most the seconds for one file are lost


def windows(ids: list[int], tokenizer: Any, length: int = WINDOW) -> Iterator[Tensor]:
    """int64 [n, `length` and the tokenizer's `framing`] blocks of consecutive windows; the last window may be
    shorter."""
    head, tail = framing(tokenizer)
    for start in range(0, len(ids), WINDOWS_AT_ONCE * length):
        part = ids[start : start + WINDOWS_AT_ONCE * length]
        rows = [[*head, *part[i : i + length], *tail] for i in range(0, len(part), length)]
        whole = [row for row in rows if len(row) == len(head) + length + len(tail)]
        if whole:
            yield torch.tensor(whole)
        if len(rows) > len(whole):
            yield torch.tensor(rows[-1:])


@contextmanager
def first_layers(model: Any, count: int) -> Iterator[Any]:
    """The text part of a model (decoder or encoder) with only its first `count` layers, because the later layers and
    the head are not needed."""
    structure = Structure(model)
    stack, layers = structure.stack()
    if not 0 < count <= len(layers):
        raise ValueError(f"layer: expected a layer below {len(layers)}, got {count - 1}")
    path, _, name = structure.names[id(layers)].rpartition(".")
    holder = model.get_submodule(path)
    setattr(holder, name, layers[:count])
    try:
        yield stack
    finally:
        setattr(holder, name, layers)


def activations(model: Any, layer: int, batches: Iterable[Tensor], tokens: Selection = "content") -> Iterator[Tensor]:
    """fp32 [n, d_in] per batch of token ids [B, S]: the output of `layer`; otherwise like `activations_at`."""
    for seen in activations_at(model, [Site("resid", layer)], batches, tokens):
        yield seen[0]


def activations_at(
    model: Any, sites: Sequence[Site], batches: Iterable[Tensor], tokens: Selection = "content"
) -> Iterator[list[Tensor]]:
    """Per batch of token ids [B, S], one fp32 [n, d] per site, all of the same n tokens.

    tokens: as in `attach`; by default without BOS, EOS and PAD.  `content_of` gives what a tokenizer's texts need.
    """
    from gemmascope_fast.attach import Activations, attach

    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    keep = {site: Activations(sink=partial(_append, parts)) for site, parts in seen.items()}
    with _what_reaches(model, sites) as stack, torch.inference_mode():
        options = uncached(stack)
        device = device_of(stack)
        for ids in batches:
            # one run per batch, because a run stores every row
            with attach(stack, keep, tokens=tokens):
                stack(ids.to(device), **options)
            yield [torch.cat(seen[site]) for site in sites]
            for parts in seen.values():
                parts.clear()


def _append(parts: list[Tensor], x: Tensor, _tokens: Any) -> None:
    parts.append(x.float().clone())


@contextmanager
def _what_reaches(model: Any, sites: Sequence[Site]) -> Iterator[Any]:
    """The part of the model whose forward reaches every site: `first_layers`, or the whole model for a module path."""
    if any(site.kind == "path" for site in sites):
        yield model
        return
    with first_layers(model, 1 + max(site.layer or 0 for site in sites)) as stack:
        yield stack


def collect(
    model: Any, tokenizer: Any, layer: int, text: str, folder: Path, name: str, limit: int | None = None,
    model_id: str | None = None,
) -> list[Tensor]:  # fmt: skip
    """Activations of a text as parts fp32 [N_i, d_in], each memory-mapped from a file in `folder`.

    limit: no part begins after that many tokens (a part has `PART` tokens).  model_id: `identity.of_module` of the
    model (default: computed here from the current weights).

    A folder belongs to one model, with any texts, layers and dtypes; ValueError if it belongs to another model.  Each
    text has a subfolder, whose name contains a hash of tokens, model, dtype and layer.  Each part appears complete or
    not at all, and existing parts are not computed again: an interrupted job continues with the first missing part.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = _length(model, sum(map(len, framing(tokenizer))))
    end = len(ids) if limit is None else min(len(ids), -(-limit // PART) * PART)
    model_id = identity.of_module(model) if model_id is None else model_id
    identity.claim(folder, {"model": model_id}, "--activations")
    key = identity.of_json([model_id, str(model.dtype), layer, length, PART, ids])
    own = folder / f"{name}-{key[:16]}"
    make_folder(own)
    parts = []
    with progress.bar(total=end, desc=f"activations of {name}", unit="token", unit_scale=True) as bar:
        for start in range(0, end, PART):
            path, some = own / f"{start // PART:05}.npy", ids[start : start + PART]
            if not path.exists():
                blocks = list(activations(model, layer, windows(some, tokenizer, length), content_of(tokenizer)))
                _write(path, torch.cat(blocks))
            parts.append(torch.from_numpy(np.load(path, mmap_mode="c")))  # copy on write: the file does not change
            bar.update(len(some))
    return parts


def _length(model: Any, special: int) -> int:
    """Number of content tokens in a window: `WINDOW`, or what the model's positions leave after special tokens."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return min(WINDOW, getattr(config, "max_position_embeddings", WINDOW + special) - special)


def _write(path: Path, rows: Tensor) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        # into a file itself numpy writes by C's stdio, whose errors do not say that the disk is full
        np.save(SimpleNamespace(write=file.write), rows.cpu().numpy())


class Batches:
    """Rows of several activation tensors [N_i, d_in], in an order that depends only on the seed and the step.

    Each epoch is a new permutation; a remainder smaller than a batch is skipped in that epoch.
    """

    def __init__(self, parts: list[Tensor], batch: int, seed: int) -> None:
        self.parts, self.batch, self.seed = parts, batch, seed
        self.ends = torch.tensor([p.shape[0] for p in parts]).cumsum(0)
        self.rows = int(self.ends[-1])
        self.per_epoch = self.rows // batch
        if not self.per_epoch:
            raise ValueError(f"--text: expected at least {batch} tokens, one batch, got {self.rows}")
        self._epoch: tuple[int, Tensor] | None = None

    def __getitem__(self, step: int) -> Tensor:
        """The batch of step `step`, fp32 [batch, d_in]."""
        epoch, at = divmod(step, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(self.rows, generator=generator)
        order = self._epoch[1][at * self.batch : (at + 1) * self.batch]
        which = torch.bucketize(order, self.ends, right=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends[:-1]])
        out = torch.empty(self.batch, self.parts[0].shape[1])
        for i, part in enumerate(self.parts):
            mine = (which == i).nonzero()[:, 0]
            out[mine] = part[order[mine] - starts[i]].float()
        return out
