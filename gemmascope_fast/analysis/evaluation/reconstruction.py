"""L0, FVU, explained variance, cosine and firing frequencies, from sums whose size does not depend on the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.checkpoints.kinds import KINDS
from gemmascope_fast.sae.base import Coder


def check_kind(sae: Any) -> None:
    """Raise ValueError for a coder that reads or reconstructs several sites."""
    if sae.kind not in KINDS:
        raise ValueError(f"sae: expected an SAE or transcoder that reads one site and writes one, got a {sae.kind}")


class Reconstruction:
    """Sums over the activations seen so far, in fp64.  `add` takes them in blocks; call `figures` at any time.

    y is what the SAE should reconstruct: its input, or for a transcoder the activations where it writes.  Every sum is
    over y - shift, where shift is the first block's mean. This is needed because the residual stream's mean is larger
    than its variation, and the variance is a difference of sums.
    """

    def __init__(self, sae: Coder) -> None:
        check_kind(sae)
        self.sae = sae
        self.rows = 0
        self.pairs = 0
        self.cosine = 0.0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.shift = torch.zeros(sae.cfg.d_out, dtype=torch.float64)
        # Σ(y - shift), Σ(y - shift)², Σ(y - ŷ), Σ(y - ŷ)², by dimension
        self.sums = torch.zeros(4, sae.cfg.d_out, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Add activations [n, d_in] of content tokens, and y [n, d_out] of the same tokens (None: x itself); returns
        the reconstruction [n, d_out]."""
        if y is None and "transcoder" in self.sae.kind:
            raise ValueError(f"y: expected the activations that a {self.sae.kind} reconstructs, got None")
        y = x if y is None else y
        if y.shape[-1] != self.sae.cfg.d_out:
            raise ValueError(f"y: expected [n, d_out = {self.sae.cfg.d_out}], got {tuple(y.shape)}")
        if not y.shape[0]:
            return y
        with torch.no_grad():
            latents = self.sae.encode_sparse(x)
            y_hat = self.sae.reconstruct(latents, x)
        wide, wide_hat = y.double().cpu(), y_hat.double().cpu()
        if not self.rows:
            self.shift = wide.mean(0)
        off, error = wide - self.shift, wide - wide_hat
        self.sums += torch.stack([off.sum(0), off.square().sum(0), error.sum(0), error.square().sum(0)])
        self.cosine += float(torch.nn.functional.cosine_similarity(wide, wide_hat, dim=1).sum())
        self.fired += torch.bincount(latents.col_indices.long().cpu(), minlength=self.sae.d_sae)
        self.pairs += latents.values.numel()
        self.rows += y.shape[0]
        return y_hat

    def mean(self) -> Tensor:
        """The mean of y, fp64 [d_out]."""
        return self.shift + self.sums[0] / max(1, self.rows)

    def figures(self) -> dict[str, Any]:
        """tokens, l0, fvu = Σ‖y - ŷ‖² / Σ‖y - mean‖² with the mean of all tokens seen, explained_variance
        = 1 - Var(y - ŷ) / Var(y) (ignores a constant error), cosine, dead_fraction (features that never fired).
        ValueError if there are no tokens yet.
        """
        if not self.rows:
            raise ValueError("text: expected at least one content token, got none")
        of_y = self.sums[1] - self.sums[0].square() / self.rows
        of_error = self.sums[3] - self.sums[2].square() / self.rows
        total = float(of_y.sum())
        return {
            "tokens": self.rows,
            "l0": self.pairs / self.rows,
            "fvu": float(self.sums[3].sum()) / total if total > 0 else float("nan"),
            "explained_variance": 1 - float(of_error.sum()) / total if total > 0 else float("nan"),
            "cosine": self.cosine / self.rows,
            "dead_fraction": float((self.fired == 0).double().mean()),
        }

    def state(self) -> dict[str, Tensor]:
        """The whole state except the SAE, as tensors."""
        numbers = torch.tensor([self.rows, self.pairs], dtype=torch.int64)
        cosine = torch.tensor([self.cosine], dtype=torch.float64)
        return {"numbers": numbers, "cosine": cosine, "fired": self.fired, "shift": self.shift, "sums": self.sums}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; ValueError if it belongs to an SAE of other dimensions."""
        if state["fired"].shape != self.fired.shape or state["sums"].shape != self.sums.shape:
            raise ValueError("state: expected sums of an SAE of the same dimensions")
        self.rows, self.pairs = (int(n) for n in state["numbers"])
        self.cosine = float(state["cosine"])
        self.fired, self.shift, self.sums = (state[k].clone() for k in ("fired", "shift", "sums"))
