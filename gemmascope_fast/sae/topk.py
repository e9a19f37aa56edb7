"""SAEs that keep the k largest pre-activations of a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.ops.encode_topk import greatest_of
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Field
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import Screen
from gemmascope_fast.sae.weights import EncoderWeights

CHUNK = 256  # tokens; their positive pairs of 16,384 features take 24 MB


class TopKSAE(JumpReLUSAE):
    """Keeps the k largest pre-activations of a token, if they are positive (Gao et al., arXiv 2406.04093).

    Ties go to the lower feature index, and NaN ranks first.  The screen works as for JumpReLU: the result is the same,
    byte for byte, as if every pair were computed.  Thresholds must be at most 0.
    """

    kind = "topk_sae"
    extra_fields: ClassVar = {"k": Field(int, 1, "d_sae")}

    def __init__(self, *args: Any, k: int, **more: Any) -> None:
        super().__init__(*args, **more)
        if not 0 < k <= self.cfg.d_sae:
            raise ValueError(f"k: expected 1 to d_sae = {self.cfg.d_sae}, got {k}")
        self.k = k
        _check_no_threshold(self.threshold)

    def encode_sparse(
        self,
        x: Tensor,
        screen: bool | None = None,
        bandwidth: float | None = None,
        precision: str = "exact",
        per_batch: bool = False,
    ) -> SparseLatents:
        """Like `JumpReLUSAE.encode_sparse`, with at most k latents a token and without bandwidth.

        per_batch: keep the k · N largest of the whole batch instead, as in BatchTopK training.
        """
        if bandwidth is not None:
            raise ValueError("bandwidth: a top-k SAE has no thresholds to train")
        if precision == "exact":
            crow, col, values = self._encode_exact(self._checked(x), screen, None, per_batch=per_batch)
        else:
            # about half of all pairs are positive: a part of the tokens at a time, unless they are ranked together
            parts = self._tokens(x).split(x.numel() if per_batch else CHUNK) if x.numel() else (self._tokens(x),)
            wide = [super(TopKSAE, self).encode_sparse(part, screen, None, precision) for part in parts]
            kept = [greatest_of(*_csr(part), k=self.k, per_batch=per_batch) for part in wide]
            whole = SparseLatents.cat(
                [SparseLatents(*csr, shape=part.shape) for csr, part in zip(kept, wide, strict=True)]
            )
            crow, col, values = _csr(whole)
        return SparseLatents(crow, col, values.to(self.dtype), (*x.shape[:-1], self.cfg.d_sae))

    def _checked(self, x: Tensor) -> Tensor:
        """x as [N, d_in], after the rows were checked."""
        flat = self._tokens(x)
        self.rows.check()
        return flat

    def encode_unscreened(
        self, x: Tensor, weights: EncoderWeights, bandwidth: float | None, per_batch: bool = False
    ) -> Sequence[Tensor]:
        return ops.encode_topk(x, weights.W_enc, weights.b_enc, self.k, per_batch)

    def encode_screened(
        self, screen: Screen, x: Tensor, weights: EncoderWeights, bandwidth: float | None, per_batch: bool = False
    ) -> Sequence[Tensor]:
        mapped = self.rows.holds(weights.W_enc)
        return screen.encode_topk(x, weights.W_enc, weights.b_enc, self.k, per_batch, mapped=mapped)

    def check_encoder(self, weights: EncoderWeights) -> None:
        super().check_encoder(weights)
        _check_no_threshold(weights.threshold)


class AbsTopKSAE(TopKSAE):
    """Keeps the k pre-activations largest in magnitude, with their sign (Zhu et al., arXiv 2510.00404).

    They are among the k largest of z and the k largest of -z. Each needs its own encode, so this takes twice the
    time of `TopKSAE`.  Ties in magnitude go to the lower feature index, and NaN ranks first.
    """

    kind = "abs_topk_sae"
    _mirror: tuple[Screen, Screen] | None = None  # a screen, and the screen of opposite sign made from it

    def encode_sparse(
        self,
        x: Tensor,
        screen: bool | None = None,
        bandwidth: float | None = None,
        precision: str = "exact",
        per_batch: bool = False,
    ) -> SparseLatents:
        """Like `TopKSAE.encode_sparse`; it is exact, and ranks each token separately."""
        if precision != "exact" or per_batch:
            raise ValueError("precision, per_batch: a top-k SAE by magnitude is exact and ranks each token separately")
        return super().encode_sparse(x, screen, bandwidth)

    def encode_unscreened(
        self, x: Tensor, weights: EncoderWeights, bandwidth: float | None, per_batch: bool = False
    ) -> Sequence[Tensor]:
        W, b = weights.W_enc, weights.b_enc
        return _by_magnitude(ops.encode_topk(x, W, b, self.k), ops.encode_topk(-x, W, -b, self.k), self.k)

    def encode_screened(
        self, screen: Screen, x: Tensor, weights: EncoderWeights, bandwidth: float | None, per_batch: bool = False
    ) -> Sequence[Tensor]:
        W, b, mapped = weights.W_enc, weights.b_enc, self.rows.holds(weights.W_enc)
        if self._mirror is None or self._mirror[0] is not screen:
            self._mirror = screen, screen.mirrored(W.detach(), b.detach())
        up = screen.encode_topk(x, W, b, self.k, mapped=mapped)
        down = self._mirror[1].encode_topk(-x, W, -b, self.k, mapped=mapped)
        return _by_magnitude(up, down, self.k)


def _csr(latents: SparseLatents) -> tuple[Tensor, Tensor, Tensor]:
    return latents.crow_indices, latents.col_indices, latents.values


def _by_magnitude(up: Sequence[Tensor], down: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest magnitudes of each row, from the k largest of z and the k largest of -z."""
    rows, cols, values = [], [], []
    for sign, (crow, col, value) in ((1.0, up), (-1.0, down)):
        row = torch.repeat_interleave(torch.arange(crow.numel() - 1, device=crow.device), crow.diff())
        # a NaN is in both; keep it once
        kept = torch.ones_like(col, dtype=torch.bool) if sign > 0 else ~value.isnan()
        rows.append(row[kept])
        cols.append(col[kept])
        values.append(sign * value[kept])
    row, col, value = torch.cat(rows), torch.cat(cols), torch.cat(values)
    order = torch.sort(col, stable=True).indices
    order = order[torch.sort(row[order], stable=True).indices]
    crow = torch.zeros(up[0].numel(), dtype=torch.int64, device=col.device)
    crow[1:] = torch.bincount(row, minlength=crow.numel() - 1).cumsum(0)
    return greatest_of(crow, col[order], value[order], k)


def _check_no_threshold(threshold: Tensor) -> None:
    if not threshold.is_meta and bool((threshold.detach() > 0).any()):
        raise ValueError("threshold: a top-k SAE has no thresholds; expected values of at most 0")
