"""ReFT-r1 (AxBench, section 3.2): one vector that detects and steers, trained with the language model's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.analysis.concepts.methods import Detector
from gemmascope_fast.analysis.extraction.windows import padded
from gemmascope_fast.attach.tokens import device_of, opening
from gemmascope_fast.attach.transformers import places
from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.ops._exact import outside_autocast
from gemmascope_fast.sae.sites import Site


class _Intervention:
    """Φ(h) = h + mean(TopK(ReLU((h - mean)·v)))·v on the content tokens of each text; stores the latents."""

    def __init__(self, v: Tensor, mean: Tensor, content: Tensor, k: int) -> None:
        self.v, self.mean, self.content, self.k = v, mean, content, k
        self.rest = torch.zeros(())

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None:
        """Not needed."""

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        with outside_autocast(x.device):
            a = torch.relu((x.float() - self.mean) @ self.v) * self.content  # [B, S]
        top = a.topk(min(self.k, a.shape[1]), dim=1).values
        self.rest = (a.sum() - top.sum()) / self.content.sum()
        added = top.mean(1)[:, None, None] * self.v * self.content[..., None]
        return x + added.to(x.dtype)


def fit_reft(
    model: Any,
    tokenizer: Any,
    site: Site,
    texts: Sequence[str],
    start: Detector,
    *,
    steps: int = 12,
    lr: float = 2e-3,
    k: int = 4,
    l1: float = 0.1,
    window: int = 255,
    progress: Callable[[], None] = lambda: None,
) -> Detector:
    """v from the concept's texts: cross-entropy under Φ plus l1 times the mean latent outside the top k.

    start: initial v (DiffMean, because a few steps on few texts are too short to start from random).  The latents in
    the penalty are divided by their mean at the start.  v is normalised to unit length after every step.
    """
    head = opening(tokenizer)
    rows = [[*head, *tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"][:window]] for t in texts]
    device = device_of(model)
    ids, mask = padded(rows, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id, device)
    content = torch.ones_like(ids, dtype=torch.float32) if mask is None else mask.float()
    content = content * ~torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids), device=device))
    v, mean = start.write.to(device, copy=True).requires_grad_(), start.mean.to(device)
    optimiser = torch.optim.Adam([v], lr=lr)
    place = Structure(model).place(site)
    wanted = {p: p.requires_grad for p in model.parameters()}
    scale: float | None = None
    model.requires_grad_(False)
    try:
        for _ in range(steps):
            acting = _Intervention(v, mean, content, k)
            leave = places.visit(place, acting)
            try:
                logits = model(ids, attention_mask=mask, use_cache=False).logits
            finally:
                leave()
            counts = content[:, 1:].bool()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1][counts].float(), ids[:, 1:][counts])
            scale = scale or float(acting.rest.detach()) or 1.0
            optimiser.zero_grad()
            (loss + l1 * acting.rest / scale).backward()
            optimiser.step()
            with torch.no_grad():
                v /= v.norm()
            progress()
    finally:
        for p, was in wanted.items():
            p.requires_grad_(was)
    unit = v.detach().clone().cpu()
    return Detector("ReFT-r1", unit, unit, start.mean)
