"""The edits of one site, compiled: computes from latents what is added to the activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.edits import Direction, Edit, FeatureEdit, Mask, check_edits
from gemmascope_fast.ops._csr import from_mask
from gemmascope_fast.ops._library import in_dtype
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder


class Plan:
    """The edits of one site in their order; features that no edit names are not processed."""

    def __init__(self, edits: Sequence[Edit], d_sae: int | None, d_out: int | None) -> None:
        check_edits(edits, d_sae, d_out)
        self.edits = list(edits)
        self.directions = [e for e in edits if isinstance(e, Direction)]
        self.touched = sorted({f for e in edits if isinstance(e, FeatureEdit) for f in e.features})
        self.ids = torch.tensor(self.touched, dtype=torch.int32)
        self.ends = torch.tensor([0, len(self.touched)])
        self.steps = [self._step(group) for group in _groups([e for e in edits if not isinstance(e, Direction)])]
        self.masks = any(isinstance(e, Mask) for e in edits)

    def _step(self, group: list[Edit]) -> tuple[list[Edit], Tensor | None, list[Tensor | None]]:
        """(edits of one kind on different features, their columns together (None: all), the columns of each)."""
        at = {feature: column for column, feature in enumerate(self.touched)}
        each = [[at[f] for f in e.features] if isinstance(e, FeatureEdit) else [] for e in group]
        flat = [column for columns in each for column in columns]
        together = None if flat == list(range(len(self.touched))) else torch.tensor(flat, dtype=torch.int64)
        return group, together, [torch.tensor(columns, dtype=torch.int64) for columns in each]

    def apply(
        self,
        x: Tensor,
        sae: Coder | None,
        latents: SparseLatents | None,
        call: Call,
        at: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x [n, d] of the selected rows with everything added; x itself if nothing is added.

        latents: of the same rows, by `sae`; at: int64 [n], their row numbers in the call (None: all); scale: factor for
        the SAE's units at this place (such as the embedding's scale), if any.
        """
        if latents is not None and sae is not None:
            change = self.change(sae, latents, call, at)
            if change is not None:
                rows, what = change
                x = added(x, rows, what if scale is None else what * scale)
        return self.direct(x, call, at, scale)

    def direct(self, x: Tensor, call: Call, at: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """x [n, d] with the directions added, as in `apply`."""
        for edit in self.directions:
            if edit.strength == 0:
                continue
            mask = self._rows(edit, call, at)
            rows = None if mask is None else mask.nonzero()[:, 0]
            if rows is None or rows.numel():
                vector = edit.strength * edit.vector.to(x.device)
                vector = vector if scale is None else vector * scale
                x = added(x, rows, vector.expand(x.shape[0] if rows is None else rows.numel(), -1))
        return x

    def change(
        self, sae: Coder, latents: SparseLatents, call: Call, at: Tensor | None
    ) -> tuple[Tensor | None, Tensor] | None:
        """(rows or None for all, what the edits of latents add there, fp32 [rows, d_out]); None if nothing is added."""
        if not self.steps or not latents.n_rows:
            return None
        delta, rest = self._delta(latents, call, at)
        if rest is None:
            if not bool(delta.any()):
                return None
            if delta.shape[0] == 1:  # one token: checking for zeros would cost more than decoding them
                ids, ends = self._on(delta.device)
                return None, ops.decode(ends, ids, delta[0], sae.W_dec, None, None)
            rows = (delta != 0).any(1).nonzero()[:, 0]
            return rows, self._decode(delta[rows], sae.W_dec)
        own = self._entries(latents, delta, rest)
        rows = (own.crow_indices.diff() > 0).nonzero()[:, 0]
        if not rows.numel():
            return None
        own = own[rows]
        return rows, ops.decode(own.crow_indices, own.col_indices, own.values, sae.W_dec, None, None)

    def _decode(self, delta: Tensor, W_dec: Tensor) -> Tensor:
        """delta [n, k] of the edited features times their decoder rows: fp32 [n, d_out]."""
        ids, _ends = self._on(delta.device)
        crow, col = from_mask(delta != 0)
        return ops.decode(crow, ids[col.long()], delta[delta != 0], W_dec, None, None)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The edited features, and the offsets of one row with all of them; cached on the device."""
        if self.ids.device != device:
            self.ids, self.ends = self.ids.to(device), self.ends.to(device)
        return self.ids, self.ends

    def _delta(self, latents: SparseLatents, call: Call, at: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is added to the edited features, fp32 [n, k], and, if there are masks, to what fired [nnz]."""
        old = in_dtype(latents.features(self.touched), torch.float32)
        delta = torch.zeros_like(old)
        rest = torch.zeros_like(latents.values) if self.masks else None
        for group, together, each in self.steps:
            if isinstance(group[0], Mask):
                assert rest is not None
                delta, rest = self._masked(group[0], self._own(group[0], call, at, old), latents, old, delta, rest)
            elif all(edit.everywhere for edit in group):
                delta = _changed(group, together, old, delta, None)
            else:
                for edit, columns in zip(group, each, strict=True):
                    if edit.on:
                        delta = _changed([edit], columns, old, delta, self._own(edit, call, at, old))
        return delta, rest

    def _own(self, edit: Edit, call: Call, at: Tensor | None, like: Tensor) -> Tensor | None:
        mask = self._rows(edit, call, at)
        return None if mask is None else mask.to(like.device)

    def _masked(
        self, edit: Mask, mask: Tensor | None, latents: SparseLatents, old: Tensor, delta: Tensor, rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        keep = torch.zeros(latents.d_sae, dtype=torch.bool, device=old.device)
        keep[list(edit.features)] = True
        drop = ~keep[self.touched] if mask is None else ~keep[self.touched] & mask[:, None]
        gone = ~keep[latents.col_indices.long()]
        if mask is not None:
            gone &= mask[latents.row_indices()]
        return torch.where(drop, -old, delta), torch.where(gone, -latents.values, rest)

    def _entries(self, latents: SparseLatents, delta: Tensor, rest: Tensor) -> SparseLatents:
        """The two parts (edited features, all others) as one set of sparse rows."""
        rows, columns = (delta != 0).nonzero(as_tuple=True)
        touched = torch.zeros(latents.d_sae, dtype=torch.bool, device=delta.device)
        touched[self.touched] = True
        own = ((rest != 0) & ~touched[latents.col_indices.long()]).nonzero()[:, 0]
        features = torch.cat([self._on(delta.device)[0][columns], latents.col_indices[own]]).long()
        values = torch.cat([delta[rows, columns], rest[own].to(delta.dtype)])
        rows = torch.cat([rows, latents.row_indices()[own]])
        order = (rows * latents.d_sae + features).argsort()
        crow = torch.zeros(latents.n_rows + 1, dtype=torch.int64, device=delta.device)
        crow[1:] = torch.bincount(rows, minlength=latents.n_rows).cumsum(0)
        shape = (latents.n_rows, latents.d_sae)
        return SparseLatents(crow, features[order].to(torch.int32), values[order], shape)

    @staticmethod
    def _rows(edit: Edit, call: Call, at: Tensor | None) -> Tensor | None:
        mask = edit.rows(call)
        return mask if mask is None or at is None else mask[at]


def _groups(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Group neighbouring edits of one kind that share no feature: each group runs as one operation."""
    found: list[list[Edit]] = []
    for edit in edits:
        last = found[-1] if found else []
        alike = bool(last) and isinstance(edit, FeatureEdit) and type(last[0]) is type(edit)
        features = set(edit.features) if isinstance(edit, FeatureEdit) else set()
        if alike and not any(features & set(other.features) for other in last):  # type: ignore[attr-defined]
            last.append(edit)
        else:
            found.append([edit])
    return found


def _changed(edits: Sequence[Edit], columns: Tensor | None, old: Tensor, delta: Tensor, mask: Tensor | None) -> Tensor:
    """delta after edits of one kind.  columns [c] of their features (None: all); mask [n]: the rows they apply to."""
    first = edits[0]
    assert isinstance(first, FeatureEdit)
    amounts = [e.amount for e in edits if isinstance(e, FeatureEdit) for _ in e.features]
    amount = torch.tensor(amounts, dtype=torch.float32, device=old.device)
    if columns is None:
        after = first.delta(old, delta, amount)
        return after if mask is None else torch.where(mask[:, None], after, delta)
    columns = columns.to(old.device)
    before = delta[:, columns]
    after = first.delta(old[:, columns], before, amount)
    return delta.index_copy(1, columns, after if mask is None else torch.where(mask[:, None], after, before))


def added(x: Tensor, rows: Tensor | None, what: Tensor) -> Tensor:
    """x with `what` added to some rows (None: all), in x's dtype; the other rows stay unchanged, bit for bit."""
    what = what if what.device == x.device else what.to(x.device)
    if rows is None or rows.numel() == x.shape[0]:
        return in_dtype(x + what, x.dtype)
    rows = rows.to(x.device)
    return x.index_copy(0, rows, (x[rows] + what).to(x.dtype))
