"""What training of nested codes gives, as `quantize_` takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from gemmascope_fast.ops.codes import Codes


@dataclass(frozen=True)
class Trained:
    """A run's result: codes by path of the linear layer, and the norms' new weights (by path) that go with them."""

    codes: dict[str, Codes]
    gains: dict[str, Tensor] = field(default_factory=dict)


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule at a path."""
    path, _, child = name.rpartition(".")
    setattr(parent.get_submodule(path), child, module)
