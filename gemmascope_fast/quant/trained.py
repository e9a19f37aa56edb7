"""What training of nested codes gives, as `quantize_` takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from gemmascope_fast.files import identity
from gemmascope_fast.ops.codes import Codes


@dataclass(frozen=True)
class Trained:
    """A run's result: codes by path of the linear layer, and the norms' new weights (by path) that go with them."""

    codes: dict[str, Codes]
    gains: dict[str, Tensor] = field(default_factory=dict)

    def identity(self) -> str:
        """A digest of every code, scale, zero point and gain."""
        parts = [
            (n, c.group_size, *map(identity.of_tensor, (c.q, c.scale, c.zero_point))) for n, c in self.codes.items()
        ]
        return identity.of_json([parts, [(n, identity.of_tensor(gain.detach())) for n, gain in self.gains.items()]])


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule at a path."""
    path, _, child = name.rpartition(".")
    setattr(parent.get_submodule(path), child, module)
