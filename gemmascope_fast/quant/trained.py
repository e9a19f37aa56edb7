"""The result of training nested codes, in the form that `quantize_` accepts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from gemmascope_fast.files import identity
from gemmascope_fast.ops.codes import Codes


@dataclass(frozen=True)
class Trained:
    """Result of a training run: codes by path of the linear layer, and the new norm weights (by path) for them."""

    codes: dict[str, Codes]
    gains: dict[str, Tensor] = field(default_factory=dict)

    def identity(self) -> str:
        """A digest of every code, scale, zero point and gain."""
        parts = [
            (n, c.group_size, *map(identity.of_tensor, (c.q, c.scale, c.zero_point))) for n, c in self.codes.items()
        ]
        return identity.of_json([parts, [(n, identity.of_tensor(gain.detach())) for n, gain in self.gains.items()]])


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a submodule at a path."""
    path, _, child = name.rpartition(".")
    setattr(parent.get_submodule(path), child, module)
