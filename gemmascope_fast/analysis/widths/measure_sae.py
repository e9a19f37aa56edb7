"""How far an SAE can be quantised: FVU, L0, delta_loss and agreement of supports at every width."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.analysis.evaluation.reconstruction import Reconstruction
from gemmascope_fast.analysis.widths.measure import Results
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.quant.model import nbytes, set_bits
from gemmascope_fast.quant.sae import MatryoshkaSAE
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

AT_ONCE = 1024  # tokens


@dataclass(frozen=True)
class SAECase:
    """One row of the SAE's table."""

    bits: int
    slicing: str = "prefix"  # prefix, matquant, matquant-extra
    part: str = "both"  # both, encoder, decoder; the other stays at 8 bits
    activations: str = "exact"

    def key(self) -> str:
        return f"sae/{self.part}/{self.slicing}/int{self.bits}/{self.activations}"

    def serve(self, sae: MatryoshkaSAE) -> MatryoshkaSAE:
        """`sae` at this case's width."""
        mode, extra = ("prefix", False) if self.slicing == "prefix" else ("matquant", self.slicing == "matquant-extra")
        parts = {"encoder", "decoder"} if self.part == "both" else {self.part}
        widths = {name: self.bits if name in parts else 8 for name in ("encoder", "decoder")}
        set_bits(sae, widths, mode, extra)
        sae.encoder.activations = self.activations
        return sae


def cases(widths: Iterable[int] = (8, 6, 4, 3, 2)) -> list[SAECase]:
    """Both matrices in every slicing, each one separately, and with int8 activations."""
    found = []
    for bits in widths:
        found += [SAECase(bits), SAECase(bits, activations="int8")]
        if bits < 8:
            found += [SAECase(bits, slicing) for slicing in ("matquant", "matquant-extra")]
            found += [SAECase(bits, part=part) for part in ("encoder", "decoder")]
    return found


class Agreement:
    """Supports of two encoders on the same tokens: counts of latents in both, and in each."""

    def __init__(self) -> None:
        self.both = self.ours = self.theirs = 0
        self.rows = self.equal = 0

    def add(self, ours: SparseLatents, theirs: SparseLatents) -> None:
        one, other = _pairs(ours), _pairs(theirs)
        shared = torch.isin(one, other, assume_unique=True)
        self.both += int(shared.sum())
        self.ours += one.numel()
        self.theirs += other.numel()
        wrong = torch.zeros(ours.n_rows, dtype=torch.bool)
        wrong[one[~shared] // ours.d_sae] = True
        wrong[other[~torch.isin(other, one, assume_unique=True)] // ours.d_sae] = True
        self.rows += ours.n_rows
        self.equal += int((~wrong).sum())

    def figures(self) -> dict[str, float]:
        """jaccard = |A∩B| / |A∪B|; precision of ours, recall of theirs; share of tokens with equal supports."""
        union = self.ours + self.theirs - self.both
        return {
            "jaccard": self.both / max(1, union),
            "precision": self.both / max(1, self.ours),
            "recall": self.both / max(1, self.theirs),
            "equal_tokens": self.equal / max(1, self.rows),
        }


def _pairs(latents: SparseLatents) -> Tensor:
    return latents.row_indices() * latents.d_sae + latents.col_indices.long()


@torch.no_grad()
def reconstruct(sae: Coder, x: Tensor, theirs: Coder) -> dict[str, Any]:
    """L0, FVU, explained variance, cosine of `sae` on activations x [n, d_in], and its support against `theirs`."""
    sums, agreement = Reconstruction(sae), Agreement()
    for part in x.split(AT_ONCE):
        sums.add(part)
        agreement.add(sae.encode_sparse(part), theirs.encode_sparse(part))
    return sums.figures() | agreement.figures()


@torch.no_grad()
def spliced_loss(model: nn.Module, ids: Tensor, sae: Coder | None, layer: int, batch: int = 2) -> float:
    """Mean cross-entropy in nats over ids [n, window] with the SAE replacing `layer`'s output (except at BOS)."""
    from gemmascope_fast.analysis.widths.measure import mean_loss
    from gemmascope_fast.attach import attach

    if sae is None:
        return mean_loss(model, ids, batch)
    total = 0.0
    for part in ids.split(batch):
        content = torch.ones_like(part, dtype=torch.bool)
        content[:, 0] = False
        with attach(model, {layer: sae}, mode="splice", tokens=content):
            total += mean_loss(model, part, batch) * part.shape[0]
    return total / ids.shape[0]


def compare_sae(
    model: nn.Module,
    sae: JumpReLUSAE,
    layer: int,
    x: Tensor,
    ids: Tensor,
    results: Results,
    todo: list[SAECase],
    mean: Tensor | None = None,
    progress: Callable[[list[Any]], Any] = iter,
) -> None:
    """Measure what `results` lacks: reconstruction on x [n, d_in], losses on the windows ids.

    mean: subtracted before int8 activations are rounded (the mean activation on other text).
    """
    if "sae/loss" not in results:
        results.put("sae/loss", {"loss": spliced_loss(model, ids, None, layer)})
    base = results.figures["sae/loss"]["loss"]
    coded = MatryoshkaSAE.from_sae(sae, mean=mean)
    rows: list[tuple[str, SAECase | None]] = [("sae/full", None), *((case.key(), case) for case in todo)]
    for key, case in progress([row for row in rows if row[0] not in results]):
        serving = sae if case is None else case.serve(coded)
        figures = reconstruct(serving, x, sae)
        spliced = spliced_loss(model, ids, serving, layer)
        size = sum(4 * w.numel() for w in (sae.W_enc, sae.W_dec)) if case is None else nbytes(coded)
        results.put(key, figures | {"loss": spliced, "delta_loss": spliced - base, "nbytes": size})
