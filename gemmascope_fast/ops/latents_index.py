"""Indexing of SparseLatents: finds the rows that an index selects, and extracts them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gemmascope_fast.ops.latents import SparseLatents

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def fitted(lead: Sequence[int], rows: int) -> tuple[int, ...] | None:
    """Leading dimensions for this many rows, with a -1 filled in; None if they do not fit."""
    open_at = [i for i, s in enumerate(lead) if s == -1]
    known = math.prod(s for s in lead if s != -1)
    if len(open_at) > 1 or any(s < -1 for s in lead):
        return None
    if not open_at:
        return tuple(lead) if known == rows else None
    if not known or rows % known:
        return None
    return tuple(rows // known if s == -1 else s for s in lead)


def index(latents: SparseLatents, key: Any) -> Any:
    """Implements `latents[key]`; see `SparseLatents.__getitem__`."""
    lead = latents.shape[:-1]
    simple = _first(lead, key)
    if simple is not None:
        return _between(latents, *simple)
    if isinstance(key, Tensor) and key.dim() == 1 == len(lead) and key.dtype in (torch.int64, torch.bool):
        # consecutive rows: no table of all rows is needed
        if key.dtype == torch.bool:
            if key.numel() != lead[0]:
                raise IndexError(f"mask: expected {lead[0]} entries for shape {latents.shape}, got {key.numel()}")
            key = key.nonzero()[:, 0]
        rows = torch.where(key < 0, key + lead[0], key).to(latents.crow_indices.device)
        return rows_of(latents, rows, (rows.numel(),))
    keys, features = _split(latents, key)
    picked = _positions(lead, keys)
    found = rows_of(latents, picked.reshape(-1).to(latents.crow_indices.device), tuple(picked.shape))
    if features is None:
        return found
    if isinstance(features, int):
        return found.features([features])[..., 0]
    if any(isinstance(k, Tensor) for k in keys):
        raise IndexError("features: expected `:` or one feature with an array or mask of rows; index in two steps")
    chosen: Tensor = found.features(features)
    return chosen


def _first(lead: tuple[int, ...], key: Any) -> tuple[int, int, tuple[int, ...]] | None:
    """(first row, last row, leading dimensions) for an integer or a slice with step 1 in the first dimension."""
    if not lead or isinstance(key, bool):
        return None
    each = math.prod(lead[1:])
    if isinstance(key, int):
        if not -lead[0] <= key < lead[0]:
            raise IndexError(f"index {key} is out of bounds for dimension 0 with size {lead[0]}")
        return key % lead[0] * each, (key % lead[0] + 1) * each, lead[1:]
    if isinstance(key, slice):
        start, stop, step = key.indices(lead[0])
        if step == 1:
            stop = max(start, stop)
            return start * each, stop * each, (stop - start, *lead[1:])
    return None


def _between(latents: SparseLatents, first: int, last: int, lead: tuple[int, ...]) -> SparseLatents:
    """Rows from first to last, without copying their contents."""
    crow = latents.crow_indices[first : last + 1]
    begin, end = int(crow[0]), int(crow[-1])
    cls = type(latents)
    return cls(crow - begin, latents.col_indices[begin:end], latents.values[begin:end], (*lead, latents.d_sae))


def rows_of(latents: SparseLatents, rows: Tensor, lead: tuple[int, ...]) -> SparseLatents:
    """Select rows by number, int64 [n] in [0, n_rows), with leading dimensions that multiply to n."""
    counts = latents.crow_indices.diff()[rows]
    crow = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=rows.device)
    crow[1:] = counts.cumsum(0)
    shift = latents.crow_indices[rows] - crow[:-1]
    source = torch.arange(int(crow[-1]), device=rows.device) + torch.repeat_interleave(shift, counts)
    return type(latents)(crow, latents.col_indices[source], latents.values[source], (*lead, latents.d_sae))


def _split(latents: SparseLatents, key: Any) -> tuple[list[Any], Any]:
    """Split an index into (leading dimensions, features); features is None for all, an int, a list or a vector."""
    keys = [_checked(k) for k in (key if isinstance(key, tuple) else (key,))]
    taken = sum(_consumed(k) for k in keys)
    if sum(k is Ellipsis for k in keys) > 1:
        raise IndexError("index: expected at most one `...`")
    if taken > latents.ndim:
        raise IndexError(f"index: expected at most {latents.ndim} dimensions for shape {latents.shape}, got {taken}")
    if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (latents.ndim - taken)
    elif taken < latents.ndim:
        return keys, None
    while keys and keys[-1] is None:
        raise IndexError("index: None after the feature dimension is not supported; use to_dense()")
    last = keys.pop()
    if isinstance(last, slice):
        if last != slice(None):
            raise IndexError(f"features: expected `:`, a feature or a list of features, got {last}; use features(ids)")
        return keys, None
    if isinstance(last, Tensor):
        if last.dtype == torch.bool or last.dim() != 1:
            raise IndexError(
                "features: expected `:`, a feature or a list of features, got a tensor of"
                f" {last.dtype} {tuple(last.shape)}; use to_dense()"
            )
        return keys, [_feature(latents, f) for f in last.tolist()]
    return keys, _feature(latents, last)


def _feature(latents: SparseLatents, f: int) -> int:
    if not -latents.d_sae <= f < latents.d_sae:
        raise IndexError(f"index {f} is out of bounds for dimension {latents.ndim - 1} with size {latents.d_sae}")
    return f % latents.d_sae


def _checked(key: Any) -> Any:
    """Keep int, slice, None and `...`; turn lists, arrays and tensors into a tensor.  TypeError for anything else."""
    if key is None or key is Ellipsis or isinstance(key, slice):
        return key
    if isinstance(key, bool):
        raise TypeError("index: expected an integer, a slice, an array or a mask, got a bool")
    if hasattr(key, "__index__") and not isinstance(key, Tensor) and not getattr(key, "ndim", 0):
        return int(key)
    if isinstance(key, Tensor | list | range) or hasattr(key, "__array__"):
        made = key if isinstance(key, Tensor) else torch.as_tensor(list(key) if isinstance(key, range) else key)
        if made.dtype == torch.bool or made.dtype in INTEGERS or not made.numel():
            if made.dim() == 0 and made.dtype != torch.bool:
                return int(made)
            return made if made.dtype == torch.bool else made.long()
        raise IndexError(f"index: expected integers or a mask, got {made.dtype}")
    raise TypeError(f"index: expected an integer, a slice, an array or a mask, got {type(key).__name__}")


def _consumed(key: Any) -> int:
    if key is None or key is Ellipsis:
        return 0
    return key.dim() if isinstance(key, Tensor) and key.dtype == torch.bool else 1


def _positions(lead: tuple[int, ...], keys: list[Any]) -> Tensor:
    """Row numbers, in the shape that indexing a tensor of the leading dimensions would give."""
    numbers = torch.arange(math.prod(lead)).reshape(lead)
    plain: list[Any] = []
    dim = 0
    for given in keys:
        key = given
        if isinstance(key, slice) and (key.step or 1) < 0:  # torch does not accept negative steps
            numbers = numbers.index_select(dim, torch.tensor(range(lead[dim])[key], dtype=torch.int64))
            key = slice(None)
        elif isinstance(key, int) and not -lead[dim] <= key < lead[dim]:
            raise IndexError(f"index {key} is out of bounds for dimension {dim} with size {lead[dim]}")
        plain.append(key.cpu() if isinstance(key, Tensor) else key)
        dim += _consumed(key)
    return numbers[tuple(plain)]
