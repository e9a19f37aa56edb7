"""SparseLatents: what an encoder gives, as compressed sparse rows."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gemmascope_fast.ops._csr import check_csr, from_mask, row_indices
from gemmascope_fast.ops._library import expect_tensor


@dataclass(eq=False)
class SparseLatents:
    """Latents of N tokens, compressed by row (token), named as in `torch.sparse_csr_tensor`.

    crow_indices: int64 [N+1], offsets of the rows.
    col_indices: int32 [nnz], features, ascending within a row.
    values: [nnz], floating; gradients live here.
    shape: the dense shape (..., d_sae), whose leading dimensions multiply to N.

    NaN values are stored and count as not zero.  The constructor does not look at the data (`validate` does).
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
        """The entries of [..., d_sae] that are not zero (NaN is not zero).  TypeError for another thing or dtype."""
        expect_tensor("dense", dense)
        if not dense.is_floating_point():
            raise TypeError(f"dense: expected a floating dtype, got {dense.dtype}")
        flat = dense.reshape(math.prod(dense.shape[:-1]), dense.shape[-1])
        crow, col = from_mask(flat != 0)
        return cls(crow, col, flat[row_indices(crow), col.long()], tuple(dense.shape))

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> SparseLatents:
        """Rows in which nothing fires."""
        rows = math.prod(shape[:-1])
        return cls(
            torch.zeros(rows + 1, dtype=torch.int64, device=device),
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(0, dtype=dtype, device=device),
            tuple(shape),
        )

    @classmethod
    def cat(cls, parts: Iterable[SparseLatents]) -> SparseLatents:
        """Rows of several in order, as shape [N, d_sae].  Raises ValueError for none or unequal d_sae."""
        parts = list(parts)
        if not parts or len({p.d_sae for p in parts}) != 1:
            raise ValueError(f"cat: expected parts of one d_sae, got {[p.d_sae for p in parts]}")
        offsets, base = [parts[0].crow_indices[:1]], 0
        for p in parts:
            offsets.append(p.crow_indices[1:] + base)
            base += p.nnz
        return cls(
            torch.cat(offsets),
            torch.cat([p.col_indices for p in parts]),
            torch.cat([p.values for p in parts]),
            (sum(p.n_rows for p in parts), parts[0].d_sae),
        )

    def validate(self) -> SparseLatents:
        """Raise ValueError, TypeError or IndexError where the arrays contradict the class's description."""
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

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        mean = self.nnz / self.n_rows if self.n_rows else 0.0
        return f"SparseLatents(shape={self.shape}, nnz={self.nnz}, l0={mean:.1f}, dtype={self.dtype})"

    def row_indices(self) -> Tensor:
        """Row of each stored entry, int64 [nnz]."""
        return row_indices(self.crow_indices)

    def l0(self) -> Tensor:
        """Entries that are not zero per token, int64, of shape[:-1]."""
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
        return flat.index_put((at,), self.values).reshape(self.shape)

    def to_sparse_csr(self) -> Tensor:
        """A `torch.sparse_csr` tensor [N, d_sae] with int64 indices (torch's checks demand equal types)."""
        # torch's own operations on sparse tensors trust the indices and read outside where they are wrong
        size = (self.n_rows, self.d_sae)
        return torch.sparse_csr_tensor(
            self.crow_indices, self.col_indices.long(), self.values, size, check_invariants=True
        )

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """(values, indices) of shape (..., k) as `torch.topk`, padded with 0 and -1 where fewer fired.

        NaN ranks above every number, as in torch; among equal values the lower feature comes first.
        """
        if k < 0:
            raise ValueError(f"k: expected a count, got {k}")
        rows = self.row_indices()
        by_value = torch.sort(self.values.detach(), descending=True, stable=True).indices
        order = by_value[torch.sort(rows[by_value], stable=True).indices]
        rank = torch.arange(self.nnz, device=self.device) - self.crow_indices[rows]
        kept = rank < k
        values = torch.zeros(self.n_rows, k, dtype=self.dtype, device=self.device)
        indices = torch.full((self.n_rows, k), -1, dtype=torch.int64, device=self.device)
        at, source = (rows[kept], rank[kept]), order[kept]
        values = values.index_put(at, self.values[source])
        indices[at] = self.col_indices[source].long()
        lead = self.shape[:-1]
        return values.reshape(*lead, k), indices.reshape(*lead, k)

    def features(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Values of chosen features, dense [..., len(ids)].  IndexError for an id outside [0, d_sae)."""
        if isinstance(ids, list) and self.n_rows == 1 and not self.values.requires_grad and self.device.type == "cpu":
            return self._of_one_row(ids)
        wanted = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if wanted.numel():
            # the bounds of a list cost less than those of a tensor
            least, most = (min(ids), max(ids)) if isinstance(ids, list) else (int(wanted.min()), int(wanted.max()))
        if wanted.numel() and (least < 0 or most >= self.d_sae):
            raise IndexError(f"ids: expected features in [0, {self.d_sae}), got {wanted.tolist()}")
        if self.n_rows == 1 and self.nnz:  # a decoded token: the few wanted are looked for among what fired
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
        out = out.index_put((self.row_indices()[hit], slot[hit]), self.values[hit])
        return out[:, inverse].reshape(*self.shape[:-1], wanted.numel())

    def _of_one_row(self, ids: list[int]) -> Tensor:
        """`features` of a decoded token: between a model's layers eight small ops take 100 us, lists a quarter."""
        if ids and (min(ids) < 0 or max(ids) >= self.d_sae):
            raise IndexError(f"ids: expected features in [0, {self.d_sae}), got {ids}")
        fired, values = self.col_indices.tolist(), self.values.tolist()
        slots = [bisect_left(fired, f) for f in ids]
        found = [values[i] if i < len(fired) and fired[i] == f else 0.0 for f, i in zip(ids, slots, strict=True)]
        return torch.tensor([found], dtype=self.dtype).reshape(*self.shape[:-1], len(ids))

    def __getitem__(self, key: int | slice | Tensor) -> SparseLatents:
        """Rows by number, slice, bool mask [N] or int64 indices, over the flattened tokens → [n, d_sae]."""
        if isinstance(key, int):
            if not -self.n_rows <= key < self.n_rows:
                raise IndexError(f"row {key} of {self.n_rows}")
            key = slice(key % self.n_rows, key % self.n_rows + 1)
        if isinstance(key, slice):
            start, stop, step = key.indices(self.n_rows)
            if step == 1:
                stop = max(start, stop)
                crow = self.crow_indices[start : stop + 1]
                begin, end = int(crow[0]), int(crow[-1])
                return SparseLatents(
                    crow - begin, self.col_indices[begin:end], self.values[begin:end], (stop - start, self.d_sae)
                )
            stop = max(start, stop) if step > 0 else min(start, stop)
            key = torch.arange(start, stop, step, device=self.device)
        if key.dtype == torch.bool:
            if key.numel() != self.n_rows:
                raise IndexError(f"mask: expected {self.n_rows} entries, got {key.numel()}")
            key = key.reshape(-1).nonzero()[:, 0]
        rows = torch.where(key < 0, key + self.n_rows, key).to(self.device)
        counts = self.crow_indices.diff()[rows]
        crow = torch.zeros(rows.numel() + 1, dtype=torch.int64, device=self.device)
        crow[1:] = counts.cumsum(0)
        shift = self.crow_indices[rows] - crow[:-1]
        source = torch.arange(int(crow[-1]), device=self.device) + torch.repeat_interleave(shift, counts)
        return SparseLatents(crow, self.col_indices[source], self.values[source], (rows.numel(), self.d_sae))

    def reshape(self, *lead: int) -> SparseLatents:
        """The same rows under other leading dimensions."""
        return SparseLatents(self.crow_indices, self.col_indices, self.values, (*lead, self.d_sae))

    def with_values(self, values: Tensor) -> SparseLatents:
        """The same pattern with other values."""
        return SparseLatents(self.crow_indices, self.col_indices, values, self.shape)

    def nonzero(self) -> SparseLatents:
        """Without the entries whose value is zero (pairs within the bandwidth, ablated features)."""
        keep = self.values.detach() != 0
        total = torch.zeros(self.nnz + 1, dtype=torch.int64, device=self.device)
        total[1:] = keep.cumsum(0)
        return SparseLatents(total[self.crow_indices], self.col_indices[keep], self.values[keep], self.shape)

    # ---- moving, saving, comparing ------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> SparseLatents:
        """As `Tensor.to`; a dtype changes the values only."""
        values = self.values.to(*args, **kwargs)
        return SparseLatents(
            self.crow_indices.to(values.device), self.col_indices.to(values.device), values, self.shape
        )

    def cpu(self) -> SparseLatents:
        return self.to("cpu")

    def detach(self) -> SparseLatents:
        return self.with_values(self.values.detach())

    def save(self, path: str | PathLike[str]) -> None:
        """One safetensors file, written atomically; the shape stands in its metadata."""
        from gemmascope_fast.files.write import write_safetensors

        arrays = {"crow_indices": self.crow_indices, "col_indices": self.col_indices, "values": self.values.detach()}
        write_safetensors(Path(path), arrays, {"shape": ",".join(map(str, self.shape))})

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "cpu") -> SparseLatents:
        """What `save` wrote, checked.  CheckpointError where the file is damaged or something else."""
        from gemmascope_fast.errors import CheckpointError
        from gemmascope_fast.files.arrays import open_safetensors

        entries, metadata = open_safetensors(Path(path))
        if set(entries) != {"crow_indices", "col_indices", "values"}:
            raise CheckpointError(f"{path}: expected crow_indices, col_indices and values, got {sorted(entries)}")
        try:
            shape = tuple(int(s) for s in metadata["shape"].split(","))
            # NaN is a legal activation
            each = [entries[n] for n in ("crow_indices", "col_indices", "values")]
            crow, col, values = (entry.read(torch.device(device), entry.dtype, finite=False) for entry in each)
            return cls(crow, col, values, shape).validate()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        """Equal shape, pattern and values bit for bit (NaN equals the same NaN)."""
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


def check_latents(latents: Tensor | SparseLatents, d_sae: int, device: torch.device, name: str = "latents") -> None:
    """What a decode takes: TypeError for what is neither a floating tensor nor SparseLatents, ValueError for another
    d_sae or device."""
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
    # pytree also unflattens leaves that are no tensors (specs, placeholders): the constructor's check is not theirs
    made = object.__new__(SparseLatents)
    made.crow_indices, made.col_indices, made.values = leaves
    made.shape = shape
    return made
