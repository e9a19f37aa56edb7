"""Observers process a run call by call, in memory that does not grow with the text (except `TopK`).

`run.watch(observer, key)` passes it the selected tokens of every call, without padding, while the run lasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Tokens
from gemmascope_fast.ops.latents import SparseLatents


class Observer(Protocol):
    def update(self, latents: SparseLatents, tokens: Tokens) -> None:
        """latents [n, d_sae] of one call's rows, without a graph, and those rows."""


class TopK:
    """The k strongest features of each token: `values` and `indices` [N, k], padded with 0 and -1; `tokens`."""

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        self.k = k
        self._parts: list[tuple[Tensor, Tensor, Tokens]] = []

    def update(self, latents: SparseLatents, tokens: Tokens) -> None:
        values, indices = latents.topk(self.k)
        self._parts.append((values.cpu(), indices.cpu(), tokens))

    @property
    def values(self) -> Tensor:
        return torch.cat([v for v, _, _ in self._parts]) if self._parts else torch.empty(0, self.k)

    @property
    def indices(self) -> Tensor:
        return torch.cat([torch.empty(0, self.k, dtype=torch.int64), *(i for _, i, _ in self._parts)])

    @property
    def tokens(self) -> Tokens:
        return Tokens.cat([t for _, _, t in self._parts])


class Statistics:
    """Running statistics per feature, in fp64 or int64, over `count` tokens.

    fired [d_sae]: number of tokens on which it fired; rate = fired / count; mean: over tokens on which it fired (0 if
    none); max.  histogram [d_sae, bins]: values by `edges` [bins + 1]; the first and last bin are open-ended.
    cofiring [c, c]: tokens on which two of the chosen features fired together (on the diagonal: on which one fired).
    """

    def __init__(self, d_sae: int, *, edges: Sequence[float] = (), chosen: Sequence[int] = ()) -> None:
        self.count = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64)
        self.max = torch.zeros(d_sae, dtype=torch.float64)
        self.edges = torch.tensor(edges, dtype=torch.float64)
        if len(edges) == 1 or bool((self.edges.diff() <= 0).any()):
            raise ValueError(f"edges: expected at least two in ascending order, got {list(edges)}")
        self.histogram = torch.zeros(d_sae, max(len(edges) - 1, 0), dtype=torch.int64)
        outside = [f for f in chosen if not 0 <= f < d_sae]
        if outside:
            raise IndexError(f"chosen: expected features in [0, {d_sae}), got {outside[0]}")
        self.chosen = list(chosen)
        self.cofiring = torch.zeros(len(chosen), len(chosen), dtype=torch.int64)

    def update(self, latents: SparseLatents, tokens: Tokens) -> None:
        features, values = latents.col_indices.cpu().long(), latents.values.cpu().double()
        self.count += latents.n_rows
        self.fired += torch.bincount(features, minlength=self.fired.numel())
        self.total.index_add_(0, features, values)
        self.max.scatter_reduce_(0, features, values, "amax")
        if self.edges.numel():
            inner = torch.bucketize(values, self.edges[1:-1], right=True)
            bins = self.histogram.shape[1]
            self.histogram += torch.bincount(features * bins + inner, minlength=self.histogram.numel()).view(-1, bins)
        if self.chosen:
            on = (latents.features(self.chosen) != 0).cpu().double()
            self.cofiring += (on.t() @ on).to(torch.int64)

    @property
    def rate(self) -> Tensor:
        return self.fired.double() / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        return self.total / self.fired.clamp(min=1)


class TopContexts:
    """For every feature, the k tokens on which it was strongest, with their context.

    Memory: d_sae · k · (left + right + 1) token ids and k values, however much text is read.  Context is text of the
    same forward call, and `left` tokens of the sequences in the last call; -1 means no token.

    values [d_sae, k], descending, -inf if fewer fired; contexts int64 [d_sae, k, left + 1 + right], with the token
    itself at index `left`; sequence and position [d_sae, k].
    """

    def __init__(self, d_sae: int, k: int = 10, *, left: int = 16, right: int = 8) -> None:
        if k < 1 or left < 0 or right < 0:
            raise ValueError(f"expected k of at least 1 and no negative width, got k {k}, left {left}, right {right}")
        self.k, self.left, self.right = k, left, right
        self.values = torch.full((d_sae, k), -torch.inf, dtype=torch.float32)
        self.contexts = torch.full((d_sae, k, left + 1 + right), -1, dtype=torch.int64)
        self.sequence = torch.full((d_sae, k), -1, dtype=torch.int64)
        self.position = torch.full((d_sae, k), -1, dtype=torch.int64)
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # for each sequence, its last positions and ids

    def update(self, latents: SparseLatents, tokens: Tokens) -> None:
        around = self._windows(tokens)
        rows, features = latents.row_indices().cpu(), latents.col_indices.cpu().long()
        values = latents.values.cpu().float()
        order = values.argsort(descending=True, stable=True)
        order = order[features[order].argsort(stable=True)]
        rows, features, values = rows[order], features[order], values[order]
        own, counts = features.unique_consecutive(return_counts=True)
        rank = torch.arange(features.numel()) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        at = torch.repeat_interleave(torch.arange(own.numel()), counts)
        kept = rank < self.k
        at, rank, rows, values = at[kept], rank[kept], rows[kept], values[kept]
        new = torch.full((own.numel(), self.k), -torch.inf, dtype=torch.float32)
        new[at, rank] = values
        row = torch.full((own.numel(), self.k), -1, dtype=torch.int64)
        row[at, rank] = rows
        both = torch.cat([self.values[own], new], 1)
        # stable: ties keep the earlier one (BOS gives the same values in every text)
        ranked, pick = both.sort(dim=1, descending=True, stable=True)
        self.values[own], pick = ranked[:, : self.k], pick[:, : self.k]
        self._merge(self.sequence, own, pick, _at(tokens.sequence, row))
        self._merge(self.position, own, pick, _at(tokens.position, row))
        self._merge(self.contexts, own, pick, _at(around, row))

    def _merge(self, stored: Tensor, own: Tensor, pick: Tensor, new: Tensor) -> None:
        both = torch.cat([stored[own], new], 1)
        index = pick if both.dim() == 2 else pick[..., None].expand(-1, -1, both.shape[2])
        stored[own] = both.gather(1, index)

    def _windows(self, tokens: Tokens) -> Tensor:
        """int64 [n, left + 1 + right] around each row, within its sequence."""
        around = torch.full((len(tokens), self.left + 1 + self.right), -1, dtype=torch.int64)
        before: dict[int, tuple[Tensor, Tensor]] = {}
        for sequence in tokens.sequence.unique().tolist():
            rows = (tokens.sequence == sequence).nonzero()[:, 0]
            own = tokens.position[rows], tokens.token_id[rows]
            earlier = self._before.get(sequence, (own[0][:0], own[1][:0]))
            kept = earlier[0] < own[0][0]  # later columns were removed: a rejected draft, or a cache that was cropped
            position, ids = (torch.cat([old[kept], new]) for old, new in zip(earlier, own, strict=True))
            padded = torch.cat([ids.new_full((self.left,), -1), ids, ids.new_full((self.right,), -1)])
            around[rows] = padded.unfold(0, self.left + 1 + self.right, 1)[int(kept.sum()) :]
            first = max(ids.numel() - self.left, 0)
            before[sequence] = position[first:], ids[first:]
        self._before = before
        return around


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], with -1 where the row is -1."""
    found = values[rows.clamp(min=0)]
    missing = rows < 0
    return found.masked_fill(missing if found.dim() == 2 else missing[..., None], -1)


def select(latents: SparseLatents, tokens: Tokens, chosen: Tensor | None) -> tuple[SparseLatents, Tokens]:
    """Of one call ([B, S] tokens, latents of the selected rows): the rows that are not padding."""
    flat = Tokens(**{name: value.reshape(-1) for name, value in _fields(tokens).items()})
    if chosen is not None:
        flat = Tokens(**{name: value[chosen] for name, value in _fields(flat).items()})
    if bool(flat.valid.all()):
        return latents.detach(), flat
    kept = flat.valid
    return latents.detach()[kept.to(latents.device)], Tokens(**{n: v[kept] for n, v in _fields(flat).items()})


def _fields(tokens: Tokens) -> dict[str, Any]:
    return {name: getattr(tokens, name) for name in ("call", "sequence", "position", "token_id", "valid")}
