"""What the SAEs of a bank keep in addition to weights: their screen when they are on the device, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gemmascope_fast.errors import BankError
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import pays
from gemmascope_fast.sae.screen_cache import ScreenCache, Screened, ScreenOptions


class NoScreen(ScreenCache):
    """Never builds a screen, because the bank reserves no room for it.  The results are the same."""

    def encode(
        self, sae: Screened, x: Tensor, screen: bool | None, bandwidth: float | None = None, **options: Any
    ) -> Sequence[Tensor]:
        return super().encode(sae, x, False, bandwidth, **options)

    def build(self, sae: Screened, options: ScreenOptions) -> None:
        raise BankError("prepare: this bank was made with screen=False and has no room for a screen")


def drop_screens(module: nn.Module, bare: bool = False) -> None:
    """Drop the screen.  bare: never build one again."""
    for part in _saes(module):
        part.screen_cache = NoScreen() if bare else ScreenCache()


def build_screens(module: nn.Module) -> None:
    """Build the screen now rather than at first use, if it makes encoding faster."""
    for part in _saes(module):
        if pays(part.b_dec, part.W_enc):
            part.prepare()


def screen_tensors(module: nn.Module) -> list[Tensor]:
    """All tensors kept in addition to the parameters."""
    screens = [part.screen_cache.screen for part in _saes(module)]
    return [t for screen in screens if screen is not None for t in vars(screen).values() if isinstance(t, Tensor)]


def _saes(module: nn.Module) -> list[JumpReLUSAE]:
    return [part for part in module.modules() if isinstance(part, JumpReLUSAE)]
