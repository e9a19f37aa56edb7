"""Reductions of SparseLatents (top k, sum, mean, max), with the results of the dense tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gemmascope_fast.ops._exact import put

if TYPE_CHECKING:
    from gemmascope_fast.ops.latents import SparseLatents


class TopLatents(NamedTuple):
    """Result of `topk` and `max(dim)`, with torch's field names."""

    values: Tensor
    indices: Tensor


def top(latents: SparseLatents, k: int) -> TopLatents:
    """Implements `latents.topk(k)`."""
    if k < 0:
        raise ValueError(f"k: expected 0 or more, got {k}")
    rows, nnz, device = latents.row_indices(), latents.nnz, latents.device
    order = descending(latents.values, rows)
    rank = torch.arange(nnz, device=device) - latents.crow_indices[rows]
    kept = rank < k
    values = torch.zeros(latents.n_rows, k, dtype=latents.dtype, device=device)
    indices = torch.full((latents.n_rows, k), -1, dtype=torch.int64, device=device)
    at, source = (rows[kept], rank[kept]), order[kept]
    values = put(values, at, latents.values[source])
    indices[at] = latents.col_indices[source].long()
    lead = latents.shape[:-1]
    return TopLatents(values.reshape(*lead, k), indices.reshape(*lead, k))


def descending(values: Tensor, cells: Tensor) -> Tensor:
    """Order of entries by cell, then by value in descending order; ties go to the earlier entry."""
    by_value = torch.sort(values.detach(), descending=True, stable=True).indices
    return by_value[torch.sort(cells[by_value], stable=True).indices]


def total(latents: SparseLatents, dim: int | Sequence[int] | None, keepdim: bool, mean: bool = False) -> Tensor:
    """Implements `latents.sum` and `latents.mean`."""
    dims = _dims(latents, range(latents.ndim) if dim is None or dim == () else dim)
    cells, kept = _cells(latents, dims)
    out = torch.zeros(math.prod(kept), dtype=torch.float64, device=latents.device)
    out = out.index_add(0, cells, latents.values.double())
    if mean:
        out = out / math.prod(latents.shape[d] for d in dims) if out.numel() and latents.numel() else out * math.nan
    shape = [1 if d in dims else s for d, s in enumerate(latents.shape)] if keepdim else kept
    return out.to(latents.dtype).reshape(shape)


def greatest(latents: SparseLatents, dim: int | None, keepdim: bool) -> Tensor | TopLatents:
    """Implements `latents.max`."""
    if dim is None:
        if not latents.numel():
            raise IndexError(f"max: expected at least one entry, got shape {latents.shape}")
        return greatest(_flat(latents), -1, keepdim=False)[0][0]
    (dim,) = _dims(latents, dim)
    size = latents.shape[dim]
    if not size:
        raise IndexError(f"max: expected a dimension with entries, got dimension {dim} of shape {latents.shape}")
    cells, kept = _cells(latents, [dim])
    n, device = math.prod(kept), latents.device
    position = _coordinate(latents, dim)
    counts = torch.bincount(cells, minlength=n)
    starts = counts.cumsum(0) - counts
    values = torch.zeros(n, dtype=latents.dtype, device=device)
    best = _first_hole(cells, position, starts, counts)
    order = descending(latents.values, cells)
    held = (counts > 0).nonzero()[:, 0]
    first = order[starts[held]]
    stored = latents.values.detach()[first]
    # a zero that is not stored beats lower values, and an equal value that comes later
    full = counts[held] == size
    wins = full | ~(stored <= 0) | ((stored == 0) & (position[first] < best[held]))
    held, first = held[wins], first[wins]
    values = put(values, (held,), latents.values[first])
    best[held] = position[first]
    shape = [1 if d == dim else s for d, s in enumerate(latents.shape)] if keepdim else kept
    return TopLatents(values.reshape(shape), best.reshape(shape))


def _first_hole(cells: Tensor, position: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """The first position of each cell at which nothing is stored, int64."""
    order = torch.sort(cells, stable=True).indices  # entries of a cell stay in ascending order of position
    rank = torch.arange(cells.numel(), device=cells.device) - starts[cells[order]]
    gap = position[order] != rank
    return counts.clone().scatter_reduce(0, cells[order][gap], rank[gap], "amin")


def _flat(latents: SparseLatents) -> SparseLatents:
    """All entries as one row with int64 columns; not valid as input of an op."""
    at = latents.row_indices() * latents.d_sae + latents.col_indices
    return type(latents)(torch.tensor([0, latents.nnz], device=at.device), at, latents.values, (1, latents.numel()))


def _dims(latents: SparseLatents, dim: int | Sequence[int]) -> list[int]:
    """Dimensions as non-negative numbers, each once.  IndexError for one outside the shape."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    for d in dims:
        if not -latents.ndim <= d < latents.ndim:
            raise IndexError(f"dim: expected one in [{-latents.ndim}, {latents.ndim}) for {latents.shape}, got {d}")
    found = [d % latents.ndim for d in dims]
    if len(set(found)) < len(found):
        raise IndexError(f"dim: expected each dimension once, got {dims}")
    return found


def _cells(latents: SparseLatents, dims: list[int]) -> tuple[Tensor, list[int]]:
    """Position of each stored entry after these dimensions are removed, int64 [nnz], and the remaining shape."""
    kept = [d for d in range(latents.ndim) if d not in dims]
    cells = torch.zeros(latents.nnz, dtype=torch.int64, device=latents.device)
    for d in kept:
        cells = cells * latents.shape[d] + _coordinate(latents, d)
    return cells, [latents.shape[d] for d in kept]


def _coordinate(latents: SparseLatents, dim: int) -> Tensor:
    """Position of each stored entry along a dimension, int64 [nnz]."""
    if dim == latents.ndim - 1:
        return latents.col_indices.long()
    within = math.prod(latents.shape[dim + 1 : -1])
    return latents.row_indices().div(within, rounding_mode="floor") % latents.shape[dim]
