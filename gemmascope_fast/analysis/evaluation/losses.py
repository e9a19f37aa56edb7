"""Cross-entropy of a model alone, with the SAE spliced in, and with the SAE's site ablated to its mean or to zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.analysis.reading import constant
from gemmascope_fast.attach import attach
from gemmascope_fast.attach.tokens import device_of
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.sites import Site

KINDS = ("base", "spliced", "mean_ablated", "zero_ablated")


class Losses:
    """Sums of cross-entropies in nats over predicted content tokens, one per kind of `KINDS`.

    Changes are made only at content tokens (not at BOS, EOS, PAD); the others pass unchanged.
    """

    def __init__(self, sae: Coder, sites: tuple[Site, Site], mean: Tensor) -> None:
        """sites: where the SAE reads and where it writes.  mean [d_out]: the value for mean ablation at the latter."""
        mean = mean.to(sae.device)
        reads, writes = sites
        self.coders = (None, {reads: sae}, {writes: constant(mean)}, {writes: constant(torch.zeros_like(mean))})
        self.tokens = 0
        self.sums = torch.zeros(len(KINDS), dtype=torch.float64)

    def add(self, model: Any, ids: Tensor, content: Tensor) -> None:
        """Add one batch: ids [B, S], content bool [B, S]; one sequence at a time: S × vocabulary logits are large."""
        ids = ids.to(device_of(model))
        for row, counts in zip(ids[:, None], content[:, None], strict=True):
            for i, coder in enumerate(self.coders):
                if coder is None:
                    self.sums[i] += _loss(model, row, counts)
                    continue
                with attach(model, coder, mode="splice", tokens=counts, anywhere=True):  # the sites were checked
                    self.sums[i] += _loss(model, row, counts)
        self.tokens += int(content[:, 1:].sum())

    def figures(self) -> dict[str, float]:
        """loss_tokens (number of predicted tokens), ce_* means in nats, delta_loss = ce_spliced - ce_base, and the
        share of an ablation's loss increase that the SAE recovers: (ce_ablated - ce_spliced) / (ce_ablated - ce_base);
        NaN if the ablation does not increase the loss."""
        ce = {kind: float(value) / max(1, self.tokens) for kind, value in zip(KINDS, self.sums, strict=True)}
        figures: dict[str, float] = {"loss_tokens": self.tokens}
        figures |= {f"ce_{kind}": value for kind, value in ce.items()} | {"delta_loss": ce["spliced"] - ce["base"]}
        for kind in ("mean", "zero"):
            cost = ce[f"{kind}_ablated"] - ce["base"]
            recovered = (ce[f"{kind}_ablated"] - ce["spliced"]) / cost if cost else float("nan")
            figures[f"loss_recovered_{kind}"] = recovered
        return figures


def _loss(model: Any, ids: Tensor, content: Tensor) -> float:
    """Sum of -log p(token | earlier tokens) over content tokens from the second position on; ids and content [1, S]."""
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return float(each[content[0, 1:]].double().sum())
