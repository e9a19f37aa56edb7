"""What an SAE packs at first use, kept until its weights are seen to change."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gemmascope_fast import backends, ops
from gemmascope_fast.ops._library import expect_tensor
from gemmascope_fast.sae.screen import Screen, balancing_scales, pays, principal_directions

if TYPE_CHECKING:
    from gemmascope_fast.ops.codes import Codes
    from gemmascope_fast.sae.jumprelu import JumpReLUSAE

Fingerprint = tuple[Any, ...]
Weights = tuple[Tensor, Tensor, Tensor]  # W_enc, b_enc, threshold


def fingerprint(*tensors: Tensor) -> Fingerprint:
    """What can be seen of an edit without reading the data: identity, storage, dtype, device, strides and the
    version counter (inference tensors have none)."""
    return tuple(
        (id(t), t.data_ptr(), t.dtype, t.device, t.stride(), None if t.is_inference() else t._version) for t in tensors
    )


class Prepared:
    """The packed state of one SAE, behind a lock: its screen, and the weights it was seen with."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._seen: Fingerprint | None = None
        self._alive: tuple[StorageWeakRef, ...] = ()  # the storages last seen: an address may be given out again
        self._screen: Screen | None = None
        self._sight = 0  # counts the changes seen: new weights may lie at the old ones' address
        self._screen_of = -1  # the sight that the screen was built from
        self._centre: Tensor | None = None  # given by the user; None: the module's own choice
        self._directions: Tensor | int | None = None  # None: the module's own choice; 0: none
        self._spread: Tensor | None = None  # of the user's sample
        self._second_digit = True
        self._codes: Codes | None = None  # the user's, for the first digit
        self._edited = -1  # the sight of weights other than the screen's, as last met

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy packs its own weights anew; locks do not travel
        return (Prepared, ())

    @property
    def screen(self) -> Screen | None:
        """The screen that is there now."""
        return self._screen

    @property
    def nbytes(self) -> int:
        """Bytes of what is packed beside the weights."""
        screen = self._screen
        return 0 if screen is None else screen.nbytes

    def refresh(self, sae: JumpReLUSAE, force: bool = False) -> Weights:
        """The encoder's weights, checked and laid out anew where they were seen to change."""
        weights = (sae.W_enc, sae.b_enc, sae.threshold)
        if not force and self._seen == fingerprint(*weights) and not any(s.expired() for s in self._alive):
            return weights
        from gemmascope_fast.sae.weights import as_rows, check_threshold

        with self._lock:
            check_threshold(sae.threshold)
            # loaded by assignment, `.data =` with Gemma Scope's own layout, a copy or cast of pinned rows, which is not
            # pinned: laid out once, not at each call
            with torch.no_grad():
                sae._pinned = sae._pinned and sae.W_enc.device != sae.device  # moved to the device, they are resident
                if sae._pinned:
                    from gemmascope_fast.sae.pinned import as_pinned, serves

                    if not serves(sae.W_enc):
                        sae.W_enc.data = as_pinned(sae.W_enc.data)
                elif not sae.W_enc.t().is_contiguous():
                    sae.W_enc.data = as_rows(sae.W_enc.data)
            weights = (sae.W_enc, sae.b_enc, sae.threshold)
            self._seen = fingerprint(*weights)
            self._alive = tuple(StorageWeakRef(t.untyped_storage()) for t in weights)
            self._sight += 1
            if force:
                self._screen, self._screen_of = None, -1
            return weights

    def build(
        self,
        sae: JumpReLUSAE,
        *,
        sample: Tensor | None = None,
        centre: Tensor | None = None,
        directions: int | Tensor | None = None,
        second_digit: bool = True,
        codes: Codes | None = None,
    ) -> None:
        """Build the screen with these options, which later rebuilds keep (`JumpReLUSAE.prepare` says what they are)."""
        if sample is not None and centre is not None:
            raise ValueError("sample, centre: expected at most one of them")
        for name, given in (("sample", sample), ("centre", centre)):
            if given is not None:
                expect_tensor(name, given)
        if not isinstance(directions, int | None):
            expect_tensor("directions", directions, "a number or a torch.Tensor")
        if isinstance(directions, int) and directions and sample is None:
            raise ValueError(f"directions: {directions} of them can only be found in a sample; got none")
        spread = None
        if sample is not None:
            if sample.shape[-1:] != (sae.d_in,) or not sample.is_floating_point():
                raise ValueError(
                    f"sample: expected floating activations [..., d_in = {sae.d_in}], got {tuple(sample.shape)}"
                )
            sample = sample.detach().reshape(-1, sae.d_in)
            centre = sample.double().mean(0).float()
            spread = sample.double().std(0, correction=0).float()
            if isinstance(directions, int) and directions:
                directions = principal_directions(sample, directions)
        with self._lock:
            self._centre, self._spread, self._directions, self._second_digit = centre, spread, directions, second_digit
            self._codes = codes
            self._screen, self._screen_of = None, -1
            self._screened(sae)

    def adopt(self, sae: JumpReLUSAE, screen: Screen) -> None:
        """Take a screen that was stored with these very weights."""
        self.refresh(sae)
        with self._lock:
            self._centre = screen.centre
            self._directions = 0 if screen.directions is None else screen.directions
            self._second_digit = screen.code2 is not None
            self._screen, self._screen_of = screen, self._sight

    def share(self, sae: JumpReLUSAE, twin: JumpReLUSAE) -> None:
        """Give an SAE of the same weights the screen that `sae` has, if it has one of them."""
        self.refresh(sae)
        if self._screen is not None and not self.stale():
            twin._prepared.adopt(twin, self._screen)

    def _screened(self, sae: JumpReLUSAE) -> Screen:
        """The screen of the weights last seen, built where it is of others."""
        screen = self._screen
        if screen is not None and self._screen_of == self._sight:
            return screen
        with self._lock:
            if self.stale() or self._screen is None:
                centre = sae.screen_centre() if self._centre is None else self._centre
                directions = sae.screen_directions() if self._directions is None else self._directions
                self._screen = Screen.build(
                    sae.W_enc,
                    sae.b_enc,
                    sae.threshold,
                    centre=centre,
                    second_digit=self._second_digit,
                    directions=None if isinstance(directions, int) else directions,
                    scales=self._scales(sae),
                    codes=self._codes,
                )
                self._screen_of = self._sight
                if sae._mapped is None:  # large pages would be read from the disk in full
                    for rows in (sae.W_enc, sae.W_dec):
                        backends.advise_large_pages(rows)
            return self._screen

    def _scales(self, sae: JumpReLUSAE) -> Tensor | None:
        """What balances dimensions in the screen: the user's sample where one was given; nothing where a code was."""
        if self._codes is not None:
            return None  # it is of the rows as they are
        if self._spread is None:
            return sae.screen_scales()
        return balancing_scales(sae.W_enc, self._spread, sae.screen_directions())

    def encode(
        self, sae: JumpReLUSAE, x: Tensor, screen: bool | None, bandwidth: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(crow_indices, col_indices, values fp32) with the weights of now, by the fastest route that `screen`
        allows."""
        weights = self.refresh(sae)
        if sae._pinned:
            if screen is False:
                raise ValueError("screen: expected None or True, for rows in host memory are read through the screen")
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError("x: expected no gradient through rows in host memory; torch.no_grad(), or .to(device)")
            screen = True
        # with a bandwidth weights are being trained: a screen would be built for one use
        if screen or (screen is None and bandwidth is None and self._pays(x, weights[0])):
            mapped = sae._mapped is not None and sae._mapped.holds(weights[0])
            return self._screened(sae).encode(x, *weights, bandwidth=bandwidth, mapped=mapped)
        return ops.encode(x, *weights, bandwidth)

    def _pays(self, x: Tensor, W_enc: Tensor) -> bool:
        """Whether the screen is the faster route (`screen.pays`), a build at each call not among its costs."""
        if not pays(x, W_enc):
            return False
        if self._screen is None or not self.stale():
            return True
        # weights edited since the screen was built may be edited again (training): build at the second sight
        again, self._edited = self._edited == self._sight, self._sight
        return again

    def stale(self) -> bool:
        """Whether there is no screen of the weights last seen."""
        return self._screen is None or self._screen_of != self._sight
