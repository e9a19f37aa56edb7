"""How much each latent contributed to a number: gradient times activation, and integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemmascope_fast.attach.entries import Key, spread
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops.latents import SparseLatents

if TYPE_CHECKING:
    from gemmascope_fast.attach.run import Run

Parts = Mapping[Key, list[tuple[SparseLatents, Tensor | None]]]


def gradients(parts: Parts, metric: Tensor, retain_graph: bool) -> dict[Key, list[SparseLatents]]:
    """∂metric/∂latent for the stored entries of each call's selected rows; zero if the metric ignores them."""
    if not isinstance(metric, Tensor) or metric.numel() != 1:
        raise AttachError("metric: expected a tensor of one element computed from the model's output")
    flat = [(key, latents) for key, each in parts.items() for latents, _ in each]
    graph = [latents.values for _, latents in flat if latents.values.requires_grad]
    if not graph or not metric.requires_grad:
        raise AttachError(
            "metric: no gradient reaches the latents; attach in a splicing mode and leave gradients enabled"
            " (reentrant gradient checkpointing disables them in the forward pass; use use_reentrant=False)"
        )
    found = iter(torch.autograd.grad(metric, graph, allow_unused=True, retain_graph=retain_graph))
    out: dict[Key, list[SparseLatents]] = {key: [] for key in parts}
    for key, latents in flat:
        grad = next(found) if latents.values.requires_grad else None
        out[key].append(latents.with_values(torch.zeros_like(latents.values) if grad is None else grad).detach())
    return out


def attribution(parts: Parts, metric: Tensor, retain_graph: bool = False) -> dict[Key, SparseLatents]:
    """Gradient × activation by key: SparseLatents [N, d_sae] with the pattern of `run.latents[key]`."""
    by_key = gradients(parts, metric, retain_graph)
    return {
        key: SparseLatents.cat(
            spread(grad.with_values(grad.values * latents.values.detach()), chosen)
            for grad, (latents, chosen) in zip(by_key[key], each, strict=True)
        )
        for key, each in parts.items()
        if each
    }


def integrated_gradients(run: Run, key: Key, forward: Callable[[], Tensor], steps: int) -> SparseLatents:
    """Midpoint rule along the path from no latents (only the error) to the actual latents."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    total: Tensor | None = None
    latents: list[tuple[SparseLatents, Tensor | None]] = []
    for step in range(steps):
        with run.aside((key, (step + 0.5) / steps)) as parts:
            metric = forward()
            (grads,) = gradients({key: parts[key]}, metric, retain_graph=False).values()
            values = torch.cat([grad.values for grad in grads])
            latents = [(part.detach(), chosen) for part, chosen in parts[key]]
        if total is not None and total.shape != values.shape:
            raise AttachError("forward: expected the same latents in every step; run the same input each time")
        total = values if total is None else total + values
    joined = SparseLatents.cat(spread(part, chosen) for part, chosen in latents)
    assert total is not None
    return joined.with_values(joined.values * total / steps)
