"""The edits of one site, ready to run: from latents to what is added to the activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.edits import Direction, Edit, FeatureEdit, Mask, check_edits
from gemmascope_fast.latents import SparseLatents
from gemmascope_fast.sae import JumpReLUSAE


class Plan:
    """Edits of one site in their order; features that none of them names are never looked at."""

    def __init__(self, edits: Sequence[Edit], d_sae: int | None, d_out: int | None) -> None:
        check_edits(edits, d_sae, d_out)
        self.edits = list(edits)
        self.on_latents = [e for e in edits if not isinstance(e, Direction)]
        self.directions = [e for e in edits if isinstance(e, Direction)]
        self.touched = sorted({f for e in edits if isinstance(e, FeatureEdit) for f in e.features})
        at = {feature: column for column, feature in enumerate(self.touched)}
        self.columns = [torch.tensor([at[f] for f in e.features]) if isinstance(e, FeatureEdit) else None
                        for e in self.on_latents]  # fmt: skip
        self.masks = any(isinstance(e, Mask) for e in edits)

    def apply(
        self,
        x: Tensor,
        sae: JumpReLUSAE | None,
        latents: SparseLatents | None,
        call: Call,
        at: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x [n, d] of the chosen rows with everything added; x itself where nothing is.

        latents: of the same rows, by `sae`; at: int64 [n], their numbers in the call (None: all of them); scale: what
        the SAE's own units are multiplied by at this place (the embedding's scale), if anything.
        """
        if self.on_latents and latents is not None:
            assert sae is not None
            delta = self.delta(latents, call, at)
            if delta.nnz:
                filled = delta.crow_indices.diff() > 0
                rows = filled.nonzero()[:, 0]
                own = delta if rows.numel() == delta.n_rows else delta[rows]
                added = ops.decode(own.crow_indices, own.col_indices, own.values, sae.W_dec, None, None)
                x = _added(x, rows, added if scale is None else added * scale)
        for edit in self.directions:
            if edit.strength == 0:
                continue
            mask = self._rows(edit, call, at)
            rows = torch.arange(x.shape[0]) if mask is None else mask.nonzero()[:, 0]
            if rows.numel():
                vector = edit.strength * edit.vector.to(x.device)
                vector = vector if scale is None else vector * scale
                x = _added(x, rows, vector.expand(rows.numel(), -1))
        return x

    def delta(self, latents: SparseLatents, call: Call, at: Tensor | None) -> SparseLatents:
        """What the edits add to the latents: entries that are not zero alone."""
        old = latents.features(self.touched)
        delta = torch.zeros_like(old)
        rest = torch.zeros_like(latents.values) if self.masks else None
        for edit, columns in zip(self.on_latents, self.columns, strict=True):
            mask = self._rows(edit, call, at)
            mask = None if mask is None else mask.to(old.device)
            if isinstance(edit, FeatureEdit):
                assert columns is not None
                before = delta[:, columns]
                after = edit.delta(old[:, columns], before)
                if mask is not None:
                    after = torch.where(mask[:, None], after, before)
                delta = delta.index_copy(1, columns.to(old.device), after.to(delta.dtype))
            elif isinstance(edit, Mask):
                assert rest is not None
                delta, rest = self._masked(edit, mask, latents, old, delta, rest)
        return self._entries(latents, delta, rest)

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

    def _entries(self, latents: SparseLatents, delta: Tensor, rest: Tensor | None) -> SparseLatents:
        """The two parts, of the touched features and of all others, as one set of sparse rows."""
        rows, columns = (delta != 0).nonzero(as_tuple=True)
        features = torch.tensor(self.touched, dtype=torch.int64, device=delta.device)[columns]
        values = delta[rows, columns]
        if rest is not None:
            touched = torch.zeros(latents.d_sae, dtype=torch.bool, device=delta.device)
            touched[self.touched] = True
            own = ((rest != 0) & ~touched[latents.col_indices.long()]).nonzero()[:, 0]
            rows = torch.cat([rows, latents.row_indices()[own]])
            features = torch.cat([features, latents.col_indices[own].long()])
            values = torch.cat([values, rest[own]])
            order = (rows * latents.d_sae + features).argsort()
            rows, features, values = rows[order], features[order], values[order]
        crow = torch.zeros(latents.n_rows + 1, dtype=torch.int64, device=delta.device)
        crow[1:] = torch.bincount(rows, minlength=latents.n_rows).cumsum(0)
        return SparseLatents(crow, features.to(torch.int32), values, (latents.n_rows, latents.d_sae))

    @staticmethod
    def _rows(edit: Edit, call: Call, at: Tensor | None) -> Tensor | None:
        mask = edit.rows(call)
        return mask if mask is None or at is None else mask[at]


def _added(x: Tensor, rows: Tensor, what: Tensor) -> Tensor:
    """x with `what` added to some rows, in x's own dtype; the other rows stay bit for bit."""
    what = what.to(x.device)
    if rows.numel() == x.shape[0]:
        return (x + what).to(x.dtype)
    rows = rows.to(x.device)
    return x.index_copy(0, rows, (x[rows] + what).to(x.dtype))
