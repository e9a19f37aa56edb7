"""Channel scales that keep an unquantised block's output and make it easier to quantise (OmniQuant, SmoothQuant).

Two places in a block allow them at no cost at run time:

* after a norm: norm(x)/s, with the weights' columns times s; the division goes into the norm's gain;
* between `up_proj` and `down_proj` of a gated feed-forward block, act(gate(x)) · up(x), which is linear in up: up's
  rows are divided by s, down's columns multiplied by s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.training.nested.recipe import NestedWeight


class Scales(nn.Module):
    """The logarithms of one block's channel scales, initially zero.

    norms: path of a norm → the linear layers that are the only readers of its output; gated: (up, down) paths.
    """

    def __init__(
        self,
        block: nn.Module,
        nested: Mapping[str, NestedWeight],
        norms: dict[str, list[str]],
        gated: list[tuple[str, str]],
    ) -> None:
        super().__init__()
        self.norms, self.gated = norms, gated
        self.logs = nn.ParameterList()
        self.after: dict[str, nn.Parameter] = {}
        for norm, readers in norms.items():
            self.after[norm] = self._add(nested[readers[0]].weight.shape[1])
            for name in readers:
                nested[name].columns, nested[name].divides_input = self.after[norm], True
        for up, down in gated:
            nested[up].rows = nested[down].columns = self._add(nested[down].weight.shape[1])

    def _add(self, channels: int) -> nn.Parameter:
        self.logs.append(nn.Parameter(torch.zeros(channels)))
        return self.logs[-1]

    @torch.no_grad()
    def fold(self, block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """The norms' weights including the division, rounded to `dtype`. The scales absorb the rounding, so that codes
        made afterwards fit the rounded weights exactly."""
        gains = {}
        for name, log in self.after.items():
            norm = block.get_submodule(name)
            weight: Tensor = norm.weight  # type: ignore[assignment]
            one = offset_of(norm)
            whole = one + weight.float()
            new = (whole / log.exp() - one).to(dtype)
            exact = whole / (one + new.float())
            # a channel that is zero in the norm or after rounding keeps its weight
            usable = (exact > 0) & torch.isfinite(exact)
            log.copy_(torch.where(usable, exact, torch.ones_like(exact)).log())
            gains[name] = torch.where(usable, new, weight.to(dtype))
        return gains


def find(
    block: nn.Module, names: list[str], hidden: Tensor, arguments: dict[str, Any]
) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """(norms, gated) of a block for `Scales`, found in one pass over hidden [1, window, d] from which module reads
    which tensor.  A norm whose output goes to a layer that is not quantised is left out."""
    made: dict[int, str] = {}
    readers: dict[str, list[str]] = {}
    kept: list[Tensor] = []  # kept alive, so that no address is used twice

    def produced(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                kept.append(out)
                made[id(out)] = name

        return hook

    def read(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in made:
                readers.setdefault(made[id(args[0])], []).append(name)

        return hook

    handles = []
    for name, module in block.named_modules():
        if is_norm(module):
            handles.append(module.register_forward_hook(produced(name)))
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(read(name)))
    try:
        with torch.no_grad():
            block(hidden, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    norms = {norm: found for norm, found in readers.items() if set(found) <= set(names)}
    gated = [(n, n.removesuffix("up_proj") + "down_proj") for n in names if n.endswith("up_proj")]
    plain = nn.Linear
    gated = [
        (up, down)
        for up, down in gated
        if down in names
        and up.removesuffix("up_proj") + "gate_proj" in names
        and isinstance(block.get_submodule(down), plain)
    ]
    return norms, gated


def is_norm(module: nn.Module) -> bool:
    """An RMSNorm: only a weight vector (a bias would have to be divided too)."""
    weight = getattr(module, "weight", None)
    kinds = "RMSNorm" in type(module).__name__
    return kinds and isinstance(weight, Tensor) and weight.dim() == 1 and getattr(module, "bias", None) is None


@torch.no_grad()
def offset_of(norm: nn.Module) -> float:
    """1 if a norm multiplies by 1 + weight (Gemma), 0 if by the weight: tested on ones with the weight set to 0."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    before = weight.clone()
    weight.zero_()
    out = norm(torch.ones(1, weight.numel(), dtype=weight.dtype, device=weight.device))
    weight.copy_(before)
    return 1.0 if bool(out.any()) else 0.0
