"""What a bank's SAEs pack beside their weights: their screen where they come to the device, or nothing at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gemmascope_fast.errors import BankError
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import pays
from gemmascope_fast.sae.screen_cache import Prepared


class Bare(Prepared):
    """Packs nothing, whatever is asked: the bank counts no room for it.  An encode's bytes are the same."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Bare, ())

    def encode(
        self, sae: JumpReLUSAE, x: Tensor, screen: bool | None, bandwidth: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super().encode(sae, x, False, bandwidth)

    def build(self, sae: JumpReLUSAE, **options: Any) -> None:
        raise BankError("prepare: this bank was made with screen=False and counts no bytes for what is packed")


def unpack(module: nn.Module, bare: bool = False) -> None:
    """Let go of what is packed.  bare: and pack nothing from now on."""
    for part in _saes(module):
        part._prepared = Bare() if bare else Prepared()


def pack(module: nn.Module) -> None:
    """Pack now, rather than at the first use, where packing pays."""
    for part in _saes(module):
        if pays(part.b_dec, part.W_enc):
            part.prepare()


def packed(module: nn.Module) -> list[Tensor]:
    """Every tensor held beside the parameters."""
    screens = [part._prepared.screen for part in _saes(module)]
    return [t for screen in screens if screen is not None for t in vars(screen).values() if isinstance(t, Tensor)]


def _saes(module: nn.Module) -> list[JumpReLUSAE]:
    return [part for part in module.modules() if isinstance(part, JumpReLUSAE)]
