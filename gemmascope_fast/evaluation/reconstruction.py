"""L0, FVU, explained variance, cosine and firing frequencies, from sums that grow with the text in no dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.sae import JumpReLUSAE


class Reconstruction:
    """Sums over activations seen so far, in fp64.  `add` takes them in blocks; `figures` may be asked at any time.

    Every sum is over x - shift, shift being the first block's mean: the residual stream's mean is larger than its
    variation, and the variance is a difference of sums.
    """

    def __init__(self, sae: JumpReLUSAE) -> None:
        if sae.kind not in ("sae", "topk_sae"):
            raise ValueError(f"sae: expected an SAE that reads and writes one site, got a {sae.kind}")
        self.sae = sae
        self.rows = 0
        self.pairs = 0
        self.cosine = 0.0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.shift = torch.zeros(sae.d_in, dtype=torch.float64)
        # Σ(x - shift), Σ(x - shift)², Σ(x - x̂), Σ(x - x̂)², by dimension
        self.sums = torch.zeros(4, sae.d_in, dtype=torch.float64)

    def add(self, x: Tensor) -> Tensor:
        """Activations [n, d_in] of tokens that count; returns the reconstruction [n, d_in]."""
        if not x.shape[0]:
            return x
        with torch.no_grad():
            latents = self.sae.encode_sparse(x)
            x_hat = self.sae.decode(latents)
        wide, wide_hat = x.double().cpu(), x_hat.double().cpu()
        if not self.rows:
            self.shift = wide.mean(0)
        off, error = wide - self.shift, wide - wide_hat
        self.sums += torch.stack([off.sum(0), off.square().sum(0), error.sum(0), error.square().sum(0)])
        self.cosine += float(torch.nn.functional.cosine_similarity(wide, wide_hat, dim=1).sum())
        self.fired += torch.bincount(latents.col_indices.long().cpu(), minlength=self.sae.d_sae)
        self.pairs += latents.values.numel()
        self.rows += x.shape[0]
        return x_hat

    def mean(self) -> Tensor:
        """The activations' mean, fp64 [d_in]."""
        return self.shift + self.sums[0] / max(1, self.rows)

    def figures(self) -> dict[str, Any]:
        """tokens, l0, fvu = Σ‖x - x̂‖² / Σ‖x - mean‖² with the mean of all tokens seen, explained_variance
        = 1 - Var(x - x̂) / Var(x) (blind to a constant error), cosine, dead_fraction (features that never fired).
        ValueError before any token.
        """
        if not self.rows:
            raise ValueError("text: expected at least one content token, got none")
        of_x = self.sums[1] - self.sums[0].square() / self.rows
        of_error = self.sums[3] - self.sums[2].square() / self.rows
        total = float(of_x.sum())
        return {
            "tokens": self.rows,
            "l0": self.pairs / self.rows,
            "fvu": float(self.sums[3].sum()) / total if total > 0 else float("nan"),
            "explained_variance": 1 - float(of_error.sum()) / total if total > 0 else float("nan"),
            "cosine": self.cosine / self.rows,
            "dead_fraction": float((self.fired == 0).double().mean()),
        }

    def state(self) -> dict[str, Tensor]:
        """Everything but the SAE, as tensors."""
        numbers = torch.tensor([self.rows, self.pairs], dtype=torch.int64)
        cosine = torch.tensor([self.cosine], dtype=torch.float64)
        return {"numbers": numbers, "cosine": cosine, "fired": self.fired, "shift": self.shift, "sums": self.sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; ValueError where it belongs to an SAE of other dimensions."""
        if state["fired"].shape != self.fired.shape or state["sums"].shape != self.sums.shape:
            raise ValueError("state: expected sums of an SAE of the same dimensions")
        self.rows, self.pairs = (int(n) for n in state["numbers"])
        self.cosine = float(state["cosine"])
        self.fired, self.shift, self.sums = (state[k].clone() for k in ("fired", "shift", "sums"))
