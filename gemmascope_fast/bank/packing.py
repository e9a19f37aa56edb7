"""What a bank's SAEs pack beside their weights: their screen where they come to the device, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gemmascope_fast.errors import BankError
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import pays
from gemmascope_fast.sae.screen_cache import ScreenCache, Screened, ScreenOptions


class NoScreen(ScreenCache):
    """Holds no screen, whatever is asked: the bank counts no room for one.  An encode's bytes are the same."""

    def encode(self, sae: Screened, x: Tensor, screen: bool | None, bandwidth: float | None = None) -> Sequence[Tensor]:
        return super().encode(sae, x, False, bandwidth)

    def build(self, sae: Screened, options: ScreenOptions) -> None:
        raise BankError("prepare: this bank was made with screen=False and counts no bytes for what is packed")


def unpack(module: nn.Module, bare: bool = False) -> None:
    """Let go of what is packed.  bare: and pack nothing from now on."""
    for part in _saes(module):
        part.screen_cache = NoScreen() if bare else ScreenCache()


def pack(module: nn.Module) -> None:
    """Pack now, rather than at the first use, where packing pays."""
    for part in _saes(module):
        if pays(part.b_dec, part.W_enc):
            part.prepare()


def packed(module: nn.Module) -> list[Tensor]:
    """Every tensor held beside the parameters."""
    screens = [part.screen_cache.screen for part in _saes(module)]
    return [t for screen in screens if screen is not None for t in vars(screen).values() if isinstance(t, Tensor)]


def _saes(module: nn.Module) -> list[JumpReLUSAE]:
    return [part for part in module.modules() if isinstance(part, JumpReLUSAE)]
