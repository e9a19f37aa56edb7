"""The screen of one SAE: built at first use, and rebuilt after its weights change."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmascope_fast import backends
from gemmascope_fast.ops._library import expect_tensor
from gemmascope_fast.ops._transforms import derivative_wanted
from gemmascope_fast.ops.codes import Codes
from gemmascope_fast.sae.rows import Rows
from gemmascope_fast.sae.screen import Screen, balancing_scales, pays, principal_directions
from gemmascope_fast.sae.weights import EncoderWeights, WeightWatch


class Screened(Protocol):
    """What the cache needs from an SAE."""

    rows: Rows

    W_dec: Any
    b_enc: Any

    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    def encoder_weights(self) -> EncoderWeights: ...
    def check_encoder(self, weights: EncoderWeights) -> None: ...
    # they take the options that a caller of `encode` gives for them
    @property
    def encode_unscreened(self) -> Callable[..., Sequence[Tensor]]: ...
    @property
    def encode_screened(self) -> Callable[..., Sequence[Tensor]]: ...
    def screen_centre(self) -> Tensor | None: ...
    def screen_directions(self) -> Tensor | None: ...
    def screen_scales(self) -> Tensor | None: ...


@dataclass(frozen=True)
class ScreenOptions:
    """The arguments of `JumpReLUSAE.prepare`, kept for later rebuilds.  None: the SAE's default."""

    centre: Tensor | None = None
    directions: Tensor | int | None = None  # 0: none
    spread: Tensor | None = None  # standard deviations of the user's sample
    second_digit: bool = True
    codes: Codes | None = None

    @classmethod
    def of(
        cls,
        d_in: int,
        *,
        sample: Tensor | None = None,
        centre: Tensor | None = None,
        directions: int | Tensor | None = None,
        second_digit: bool = True,
        codes: Codes | None = None,
    ) -> ScreenOptions:
        """Check the arguments of `prepare` and compute what is needed from the sample."""
        if sample is not None and centre is not None:
            raise ValueError("sample, centre: give at most one of them")
        for name, given in (("sample", sample), ("centre", centre)):
            if given is not None:
                expect_tensor(name, given)
        if not isinstance(directions, int | None):
            expect_tensor("directions", directions, "a number or a torch.Tensor")
        if isinstance(directions, int) and directions and sample is None:
            raise ValueError(f"directions: {directions} of them can only be found in a sample; pass one")
        spread = None
        if sample is not None:
            if sample.shape[-1:] != (d_in,) or not sample.is_floating_point():
                raise ValueError(
                    f"sample: expected floating activations [..., d_in = {d_in}], got {tuple(sample.shape)}"
                )
            sample = sample.detach().reshape(-1, d_in)
            centre = sample.double().mean(0).float()
            spread = sample.double().std(0, correction=0).float()
            if isinstance(directions, int) and directions:
                directions = principal_directions(sample, directions)
        return cls(centre, directions, spread, second_digit, codes)


class ScreenCache:
    """The screen of one SAE and the weights it was built from, behind a lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._watch = WeightWatch()
        self._options = ScreenOptions()
        self._screen: Screen | None = None
        self._built_at = -1  # value of `watch.changes` when the screen was built
        self._met_at = -1  # value of `watch.changes` at the last encode whose weights did not fit the screen
        _CACHES.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy builds its own screen; a lock cannot be pickled
        return (type(self), ())

    @property
    def screen(self) -> Screen | None:
        """The current screen, or None."""
        return self._screen

    @property
    def nbytes(self) -> int:
        """Bytes of the screen, on any device."""
        screen = self._screen
        return 0 if screen is None else screen.nbytes

    def stale(self) -> bool:
        """Whether there is no screen for the weights last seen."""
        return self._screen is None or self._built_at != self._watch.changes

    def refresh(self, sae: Screened, force: bool = False) -> EncoderWeights:
        """The encoder's current weights, checked and laid out again if they changed.

        force: treat them as changed, and drop the screen.
        """
        weights = sae.encoder_weights()
        if not force and not self._watch.changed(weights):
            return weights
        with self._lock, torch.no_grad():
            sae.check_encoder(weights)
            sae.rows = sae.rows.after_change(sae)
            sae.rows.lay_out(weights.W_enc)
            self._watch.note(weights)
            if force:
                self._screen, self._built_at = None, -1
            return weights

    def build(self, sae: Screened, options: ScreenOptions) -> None:
        """Build the screen with these options, and keep them for later rebuilds."""
        with self._lock:
            self._options = options
            self._screen, self._built_at = None, -1
            self._current(sae, self.refresh(sae))

    def adopt(self, sae: Screened, screen: Screen) -> None:
        """Use a screen that was stored with these same weights."""
        weights = self.refresh(sae)
        with self._lock:
            directions = 0 if screen.directions is None else screen.directions
            self._options = ScreenOptions(screen.centre, directions, None, screen.code2 is not None)
            self._hold(screen, weights)

    def share(self, sae: Screened, twin: Any) -> None:
        """Share the screen of `sae`, if it has one, with an SAE of the same weights."""
        self.refresh(sae)
        if self._screen is not None and not self.stale():
            twin.screen_cache.adopt(twin, self._screen)

    def encode(
        self, sae: Screened, x: Tensor, screen: bool | None, bandwidth: float | None = None, **options: Any
    ) -> Sequence[Tensor]:
        """(crow_indices, col_indices, values fp32) of x [N, d_in] with the current weights.

        screen: as in `JumpReLUSAE.encode_sparse`.  options: passed on to the SAE, such as per_batch of a top-k SAE.
        """
        weights = self.refresh(sae)
        if sae.rows.only_through_screen:
            if screen is False:
                raise ValueError("screen: expected None or True: rows in host memory are read only through the screen")
            if derivative_wanted(x):
                raise ValueError("x: no gradients through rows in host memory: use torch.no_grad() or sae.to(device)")
            screen = True
        # with a bandwidth the weights are being trained: each screen would be used once
        if screen is False or (screen is None and (bandwidth is not None or not pays(x, weights.W_enc))):
            return sae.encode_unscreened(x, weights, bandwidth, **options)
        if self._watch.vectors_changed(weights):
            weights = self._vectors_edited(sae)
        if screen is None and not self._worth_building():
            return sae.encode_unscreened(x, weights, bandwidth, **options)
        return sae.encode_screened(self._current(sae, weights), x, weights, bandwidth, **options)

    def _vectors_edited(self, sae: Screened) -> EncoderWeights:
        """Handle an edit of b_enc or threshold that changed no version counter: check the weights again."""
        weights = sae.encoder_weights()
        with self._lock:
            sae.check_encoder(weights)
            self._watch.note(weights)
        return weights

    def _worth_building(self) -> bool:
        """Whether to use the screen: it exists, or is to be built now.

        Weights that were edited after a screen was built may be edited again, as in training. So it is rebuilt only at
        the second encode that sees the same weights.
        """
        if self._screen is None or not self.stale():
            return True
        again, self._met_at = self._met_at == self._watch.changes, self._watch.changes
        return again

    def _current(self, sae: Screened, weights: EncoderWeights) -> Screen:
        """The screen of these weights; builds it if there is none."""
        screen = self._screen
        if screen is not None and not self.stale():
            return screen
        with self._lock:
            if self._screen is None or self.stale():
                self._hold(self._built(sae, weights), weights)
                if sae.rows.in_memory:
                    for rows in (weights.W_enc, sae.W_dec):
                        backends.advise_large_pages(rows)
            assert self._screen is not None
            return self._screen

    def _hold(self, screen: Screen, weights: EncoderWeights) -> None:
        self._watch.keep_vectors(weights)
        self._screen, self._built_at = screen, self._watch.changes

    def _built(self, sae: Screened, weights: EncoderWeights) -> Screen:
        options = self._options
        centre = sae.screen_centre() if options.centre is None else options.centre
        directions = sae.screen_directions() if options.directions is None else options.directions
        if options.codes is not None:
            scales = None  # the codes were made from unscaled rows
        elif options.spread is None:
            scales = sae.screen_scales()
        else:
            scales = balancing_scales(weights.W_enc, options.spread, sae.screen_directions())
        return Screen.build(
            *weights,
            centre=centre,
            second_digit=options.second_digit,
            directions=None if isinstance(directions, int) else directions,
            scales=scales,
            codes=options.codes,
        )


_CACHES: weakref.WeakSet[ScreenCache] = weakref.WeakSet()


def _new_locks() -> None:
    """Make new locks in a forked child: a lock held by a parent's thread would never be released there."""
    for cache in list(_CACHES):
        cache._lock = threading.RLock()


os.register_at_fork(after_in_child=_new_locks)
