"""SparseLatents: the output of an encoder, as compressed sparse rows."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gemmascope_fast.ops._csr import check_csr, from_mask, row_indices
from gemmascope_fast.ops._exact import outside_autocast, put
from gemmascope_fast.ops._library import expect_tensor
from gemmascope_fast.ops._transforms import derivative_wanted
from gemmascope_fast.ops.latents_index import fitted, index
from gemmascope_fast.ops.latents_reduce import TopLatents, greatest, top, total


@dataclass(eq=False)
class SparseLatents:
    """Latents of N tokens as compressed rows (one row a token), with the names of `torch.sparse_csr_tensor`.

    crow_indices: int64 [N+1], offsets of the rows.
    col_indices: int32 [nnz], feature indices, ascending within a row.
    values: [nnz], floating; gradients flow through these.
    shape: the dense shape (..., d_sae), whose leading dimensions multiply to N.

    It behaves like a dense tensor of shape [..., d_sae]: len, indexing by the leading dimensions, iteration, reshape,
    sum, mean, max, topk, multiplication by a number.  NaN values are stored and count as not zero.  The constructor
    does not read the data; `validate` does.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.shape = tuple(int(s) for s in self.shape)
        rows = math.prod(self.shape[:-1])
        if not self.shape or self.crow_indices.numel() != rows + 1:
            raise ValueError(
                f"crow_indices: expected {rows + 1} offsets for shape {self.shape}, got {self.crow_indices.numel()}"
            )

    # ---- construction -------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseLatents:
        """Take the entries of [..., d_sae] that are not zero (NaN is not zero).  TypeError unless a floating tensor."""
        expect_tensor("dense", dense)
        if not dense.is_floating_point():
            raise TypeError(f"dense: expected a floating dtype, got {dense.dtype}")
        flat = dense.reshape(math.prod(dense.shape[:-1]), dense.shape[-1])
        crow, col = from_mask(flat != 0)
        return cls(crow, col, flat[row_indices(crow), col.long()], tuple(dense.shape))

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> SparseLatents:
        """Rows without any latent."""
        rows = math.prod(shape[:-1])
        return cls(
            torch.zeros(rows + 1, dtype=torch.int64, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=dtype, device=device),
            tuple(shape),
        )

    @classmethod
    def cat(cls, parts: Iterable[SparseLatents]) -> SparseLatents:
        """Concatenate rows in order, as shape [N, d_sae].  Raises ValueError for no parts or different d_sae."""
        parts = list(parts)
        if not parts or len({p.d_sae for p in parts}) != 1:
            raise ValueError(f"cat: expected parts with the same d_sae, got {[p.d_sae for p in parts]}")
        offsets, base = [parts[0].crow_indices[:1]], 0
        for p in parts:
            offsets.append(p.crow_indices[1:] + base)
            base += p.nnz
        with outside_autocast(parts[0].device):
            values = torch.cat([p.values for p in parts])
        return cls(
            torch.cat(offsets),
            torch.cat([p.col_indices for p in parts]),
            values,
            (sum(p.n_rows for p in parts), parts[0].d_sae),
        )

    def validate(self) -> SparseLatents:
        """Raise ValueError, TypeError or IndexError if the arrays do not fit the description of the class."""
        check_csr(self.crow_indices, self.col_indices, self.d_sae)
        if self.values.shape != self.col_indices.shape:
            raise ValueError(f"values: expected [{self.nnz}], got {tuple(self.values.shape)}")
        rising = self.col_indices[1:] > self.col_indices[:-1]
        starts = self.crow_indices[1:-1]
        inside = torch.ones_like(rising)
        inside[starts[(starts > 0) & (starts < self.nnz)] - 1] = False
        if bool((~rising & inside).any()):
            raise ValueError("col_indices: expected features ascending within a row")
        return self

    # ---- what it is ---------------------------------------------------------------------------------

    @property
    def d_sae(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return self.crow_indices.numel() - 1

    @property
    def nnz(self) -> int:
        return self.col_indices.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The whole shape, or one of its dimensions."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Number of entries of the dense tensor, zeros included."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        """The first dimension, as for a tensor; `n_rows` counts tokens."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"SparseLatents(shape={self.shape}, nnz={self.nnz}, l0={self._mean_l0()}, dtype={self.dtype})"

    def _mean_l0(self) -> str:
        """Mean L0 of the rows that are not empty. Tokens that a run skipped have empty rows."""
        if self.crow_indices.is_meta:
            return "?"
        held = int((self.crow_indices.diff() > 0).sum())
        mean = int((self.values.detach() != 0).sum()) / max(held, 1)
        return f"{mean:.1f}" if held == self.n_rows else f"{mean:.1f} over the {held} of {self.n_rows} rows not empty"

    def row_indices(self) -> Tensor:
        """Row of each stored entry, int64 [nnz]."""
        return row_indices(self.crow_indices)

    def l0(self) -> Tensor:
        """Number of nonzero entries per token, int64, with shape shape[:-1]."""
        fired = (self.values.detach() != 0).to(torch.int64)
        total = torch.zeros(self.nnz + 1, dtype=torch.int64, device=self.device)
        total[1:] = fired.cumsum(0)
        ends = total[self.crow_indices]
        return (ends[1:] - ends[:-1]).reshape(self.shape[:-1])

    # ---- other forms --------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """[..., d_sae], differentiable with respect to values."""
        flat = torch.zeros(self.n_rows * self.d_sae, dtype=self.dtype, device=self.device)
        at = self.row_indices() * self.d_sae + self.col_indices.long()
        return put(flat, (at,), self.values).reshape(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """A `torch.sparse_csr` tensor [N, d_sae] with int64 indices (torch requires equal dtypes)."""
        # torch's own sparse operations do not check indices, and would read out of bounds with wrong ones
        size = (self.n_rows, self.d_sae)
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices.long(), self.values, size, check_invariants=True
        )

    def topk(self, k: int) -> TopLatents:
        """(values, indices) of shape (..., k) like `torch.topk`, padded with 0 and -1 if fewer fired.

        NaN ranks above every number, as in torch; ties go to the lower feature index.
        """
        return top(self, k)

    def features(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Values of the given features, dense [..., len(ids)].  IndexError for an id outside [0, d_sae)."""
        few = self.n_rows == 1 and self.device.type == "cpu"
        if few and isinstance(ids, list) and not derivative_wanted(self.values):
            return self._of_one_row(ids)
        wanted = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if wanted.numel():
            # checking the bounds of a list is cheaper than of a tensor
            least, most = (min(ids), max(ids)) if isinstance(ids, list) else (int(wanted.min()), int(wanted.max()))
        if wanted.numel() and (least < 0 or most >= self.d_sae):
            raise IndexError(f"ids: expected features in [0, {self.d_sae}), got {wanted.tolist()}")
        if self.n_rows == 1 and self.nnz:  # one decoded token: search among those that fired
            narrow = wanted.to(torch.int32)
            slot = torch.searchsorted(self.col_indices, narrow).clamp_(max=self.nnz - 1)
            found = self.values[slot].masked_fill(self.col_indices[slot] != narrow, 0)
            return found.reshape(*self.shape[:-1], wanted.numel())
        unique, inverse = torch.unique(wanted, return_inverse=True)
        col = self.col_indices.long()
        slot = torch.searchsorted(unique, col)
        hit = torch.zeros_like(col, dtype=torch.bool)
        if wanted.numel():
            slot = slot.clamp(max=unique.numel() - 1)
            hit = unique[slot] == col
        out = torch.zeros(self.n_rows, unique.numel(), dtype=self.dtype, device=self.device)
        out = put(out, (self.row_indices()[hit], slot[hit]), self.values[hit])
        return out[:, inverse].reshape(*self.shape[:-1], wanted.numel())

    def _of_one_row(self, ids: list[int]) -> Tensor:
        """`features` for a single token: between a model's layers eight small ops take 100 us, lists 25 us."""
        if ids and (min(ids) < 0 or max(ids) >= self.d_sae):
            raise IndexError(f"ids: expected features in [0, {self.d_sae}), got {ids}")
        fired, values = self.col_indices.tolist(), self.values.tolist()
        slots = [bisect_left(fired, f) for f in ids]
        found = [values[i] if i < len(fired) and fired[i] == f else 0.0 for f, i in zip(ids, slots, strict=True)]
        return torch.tensor([found], dtype=self.dtype).reshape(*self.shape[:-1], len(ids))

    def __getitem__(self, key: Any) -> Any:
        """Index by the leading dimensions, as for a dense tensor of this shape: returns SparseLatents [..., d_sae].

        Accepts integers, slices (steps may be negative), `...`, None, integer and bool tensors, arrays and lists.  For
        the last dimension: `:`, a feature or a list of features; the last two return a dense tensor, like `features`.
        Raises IndexError for a position outside the shape, for more than one array, mask or list together with chosen
        features, and for a slice of features; TypeError for any other kind of index.
        """
        return index(self, key)

    def __iter__(self) -> Iterator[SparseLatents]:
        """Yield `self[0]`, `self[1]`, … along the first dimension."""
        if len(self.shape) == 1:
            raise TypeError(f"SparseLatents of shape {self.shape} hold one token: there are no rows to iterate over")
        return (self[i] for i in range(self.shape[0]))

    def reshape(self, *shape: int | Sequence[int]) -> SparseLatents:
        """The same rows with other leading dimensions: `reshape(batch, seq)`, or the full shape as for a tensor,
        `reshape(batch, seq, d_sae)`.  One of them may be -1. If both readings fit, it is the full shape.  Nothing is
        copied.  ValueError if the number of rows does not match.
        """
        given: Any = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        given = tuple(int(s) for s in given)
        lead = fitted(given[:-1], self.n_rows) if given and given[-1] == self.d_sae else None
        lead = fitted(given, self.n_rows) if lead is None else lead
        if lead is None:
            raise ValueError(
                f"shape: expected leading dimensions of {self.n_rows} rows, with or without d_sae {self.d_sae} at the"
                f" end, got {given}"
            )
        return SparseLatents(self.crow_indices, self.col_indices, self.values, (*lead, self.d_sae))

    view = reshape

    # ---- arithmetic ---------------------------------------------------------------------------------

    def sum(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """Dense sum over all entries, or over one or more dimensions (leading ones or the features).

        Added in float64 and rounded to the values' dtype once.  IndexError for a dimension outside the shape.
        """
        return total(self, dim, keepdim)

    def mean(self, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
        """Like `sum`, divided by the number of entries, zeros included."""
        return total(self, dim, keepdim, mean=True)

    @overload
    def max(self, dim: None = None, keepdim: bool = False) -> Tensor: ...
    @overload
    def max(self, dim: int, keepdim: bool = False) -> TopLatents: ...
    def max(self, dim: int | None = None, keepdim: bool = False) -> Tensor | TopLatents:
        """The largest entry, or with one `dim` (values, indices) along it, dense; zeros count, NaN is the largest.

        Ties go to the first.  IndexError for a dimension outside the shape or without entries.
        """
        return greatest(self, dim, keepdim)

    def __mul__(self, scalar: Any) -> SparseLatents:
        """Multiply by a finite number or a tensor of one element. ValueError for NaN and infinity, because 0 times
        those is not 0."""
        return self.with_values(self.values * scalar) if _is_scalar(scalar) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> SparseLatents:
        """Divide by a finite number other than 0, or a tensor of one element."""
        if not _is_scalar(scalar):
            return NotImplemented
        if scalar == 0:
            raise ValueError("scalar: expected a number other than 0 to divide by, got 0")
        return self.with_values(self.values / scalar)

    def __neg__(self) -> SparseLatents:
        return self.with_values(-self.values)

    __array_ufunc__ = None  # lets `number * latents` with a NumPy number call __rmul__

    def with_values(self, values: Tensor) -> SparseLatents:
        """The same sparsity pattern with other values."""
        return SparseLatents(self.crow_indices, self.col_indices, values, self.shape)

    def nonzero(self) -> SparseLatents:
        """Remove entries whose value is zero (pairs within the bandwidth, ablated features)."""
        keep = self.values.detach() != 0
        total = torch.zeros(self.nnz + 1, dtype=torch.int64, device=self.device)
        total[1:] = keep.cumsum(0)
        return SparseLatents(total[self.crow_indices], self.col_indices[keep], self.values[keep], self.shape)

    # ---- moving, saving, comparing ------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> SparseLatents:
        """Like `Tensor.to`; a dtype changes the values only."""
        values = self.values.to(*args, **kwargs)
        return SparseLatents(
            self.crow_indices.to(values.device), self.col_indices.to(values.device), values, self.shape
        )

    def cpu(self) -> SparseLatents:
        return self.to("cpu")

    def detach(self) -> SparseLatents:
        return self.with_values(self.values.detach())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle, copy or `torch.load`, with checks, because a file may contain anything."""
        fields = ("crow_indices", "col_indices", "values", "shape")
        if set(state) != set(fields) or not all(isinstance(state[name], Tensor) for name in fields[:3]):
            raise ValueError(f"SparseLatents: expected {', '.join(fields)} in what was saved, got {sorted(state)}")
        self.__dict__.update(state)
        self.__post_init__()
        if not self.crow_indices.is_meta:
            self.validate()

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, atomically; its metadata has the shape."""
        from gemmascope_fast.files.write import write_safetensors

        arrays = {"crow_indices": self.crow_indices, "col_indices": self.col_indices, "values": self.values.detach()}
        write_safetensors(Path(path), arrays, {"shape": ",".join(map(str, self.shape))})

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "cpu") -> SparseLatents:
        """Read and check a file written by `save`.  CheckpointError if it is damaged or another kind of file."""
        from gemmascope_fast.errors import CheckpointError
        from gemmascope_fast.files.arrays import latents_shape, open_safetensors

        entries, metadata = open_safetensors(Path(path))
        if set(entries) != {"crow_indices", "col_indices", "values"}:
            raise CheckpointError(f"{path}: expected crow_indices, col_indices and values, got {sorted(entries)}")
        try:
            shape = latents_shape(Path(path), metadata.get("shape"), entries)
            # NaN is a valid activation
            each = [entries[n] for n in ("crow_indices", "col_indices", "values")]
            crow, col, values = (entry.read(torch.device(device), entry.dtype, finite=False) for entry in each)
            return cls(crow, col, values, shape).validate()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        """Whether shape, pattern and values are equal bit for bit (NaN equals the same NaN)."""
        if not isinstance(other, SparseLatents):
            return NotImplemented
        if self.shape != other.shape or self.dtype != other.dtype or self.nnz != other.nnz:
            return False
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.values.element_size()]
        return (
            torch.equal(self.crow_indices, other.crow_indices)
            and torch.equal(self.col_indices, other.col_indices)
            and torch.equal(self.values.detach().view(bits), other.values.detach().view(bits))
        )

    __hash__ = None  # type: ignore[assignment]


def _is_scalar(value: Any) -> bool:
    """Whether value is a real number or a 0-d tensor of one; ValueError if it is not finite."""
    number = isinstance(value, Real) or (isinstance(value, Tensor) and not value.dim() and not value.is_complex())
    if number and not math.isfinite(value):
        raise ValueError(f"scalar: expected a finite number, got {value}")
    return number


# pickled under the public name, so that files still load if this module moves; torch.load(weights_only=True) works
SparseLatents.__module__ = "gemmascope_fast"
torch.serialization.add_safe_globals([SparseLatents])


def check_latents(latents: Tensor | SparseLatents, d_sae: int, device: torch.device, name: str = "latents") -> None:
    """Check the input of a decode: TypeError unless a floating tensor or SparseLatents, ValueError for a wrong d_sae or
    device."""
    if not isinstance(latents, SparseLatents):
        expect_tensor(name, latents, "a torch.Tensor or SparseLatents")
    if not latents.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {latents.dtype}")
    if tuple(latents.shape[-1:]) != (d_sae,):
        raise ValueError(f"{name}: expected d_sae = {d_sae} in the last dimension, got {tuple(latents.shape)}")
    if latents.device != device:
        raise ValueError(f"{name}: expected them on {device}, like the SAE, got {latents.device}")


pytree.register_pytree_node(
    SparseLatents,
    lambda s: ([s.crow_indices, s.col_indices, s.values], s.shape),
    lambda leaves, shape: _unflatten(list(leaves), shape),
    serialized_type_name="gemmascope_fast.SparseLatents",
)


def _unflatten(leaves: list[Any], shape: tuple[int, ...]) -> SparseLatents:
    # pytree also unflattens leaves that are not tensors (specs, placeholders), so skip the constructor's checks
    made = object.__new__(SparseLatents)
    made.crow_indices, made.col_indices, made.values = leaves
    made.shape = shape
    return made
