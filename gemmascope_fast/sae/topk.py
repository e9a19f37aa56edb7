"""SAEs that keep the k greatest pre-activations of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.ops._library import in_dtype
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE


class TopKSAE(JumpReLUSAE):
    """The k greatest pre-activations of a token, where they are positive; ties go to the lower feature.

    Rows are encoded in chunks: before the k are taken about half of all features are there.
    """

    kind = "topk_sae"
    chunk = 256  # tokens; 256 · 16,384 candidate pairs of 8 bytes are 34 MB

    def __init__(self, *args: Any, k: int, **more: Any) -> None:
        super().__init__(*args, **more)
        if not 0 < k <= self.cfg.d_sae:
            raise ValueError(f"k: expected 1 to d_sae = {self.cfg.d_sae}, got {k}")
        self.k = k

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        if bandwidth is not None:
            raise ValueError("bandwidth: a top-k SAE has no threshold to train")
        flat = self._tokens(x)
        # at least one chunk, so that no tokens give no rows
        exact = precision == "exact"
        wide = (
            self._positive(rows, screen) if exact else JumpReLUSAE.encode_sparse(self, rows, screen, None, precision)
            for rows in in_dtype(flat, torch.float32).split(self.chunk)
        )
        whole = SparseLatents.cat([_greatest(part, self.k) for part in wide]).to(self.dtype)
        return SparseLatents(whole.crow_indices, whole.col_indices, whole.values, (*x.shape[:-1], self.cfg.d_sae))

    def _positive(self, rows: Tensor, screen: bool | None) -> SparseLatents:
        """What is above threshold, in float32: the k greatest are chosen before any of them is rounded."""
        if self._unpacked(screen):
            csr = ops.encode(rows, self.W_enc, self.b_enc, self.threshold, None)
        else:
            csr = self.screen_cache.encode(self, rows, screen)
        crow, col, values = csr
        return SparseLatents(crow, col, values, (rows.shape[0], self.cfg.d_sae))


def _greatest(latents: SparseLatents, k: int) -> SparseLatents:
    """The k greatest of each row, columns still ascending."""
    rows, n = latents.row_indices(), latents.n_rows
    by_value = torch.sort(latents.values.detach().float(), descending=True, stable=True).indices
    order = by_value[torch.sort(rows[by_value], stable=True).indices]
    rank = torch.arange(latents.nnz, device=latents.device) - latents.crow_indices[rows[order]]
    keep = torch.sort(order[rank < k]).values
    crow = torch.zeros(n + 1, dtype=torch.int64, device=latents.device)
    crow[1:] = torch.bincount(rows[keep], minlength=n).cumsum(0)
    return SparseLatents(crow, latents.col_indices[keep], latents.values[keep], latents.shape)
