"""What an SAE packs at first use, kept until its weights are seen to change."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemmascope_fast import ops

if TYPE_CHECKING:
    from gemmascope_fast.sae import JumpReLUSAE

Fingerprint = tuple[Any, ...]


def fingerprint(*tensors: Tensor) -> Fingerprint:
    """What can be seen of an edit without reading the data: identity, storage, dtype, device, strides and the
    version counter (inference tensors have none)."""
    return tuple(
        (id(t), t.data_ptr(), t.dtype, t.device, t.stride(), None if t.is_inference() else t._version) for t in tensors
    )


class Prepared:
    """The packed state of one SAE, behind a lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._seen: Fingerprint | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy packs its own weights anew; locks do not travel
        return (Prepared, ())

    def refresh(self, sae: JumpReLUSAE, force: bool = False) -> None:
        """Check and lay out the weights anew where they were seen to change."""
        weights = (sae.W_enc, sae.b_enc, sae.threshold)
        if not force and self._seen == fingerprint(*weights):
            return
        from gemmascope_fast.sae import as_rows, check_threshold

        with self._lock:
            check_threshold(sae.threshold)
            if not sae.W_enc.t().is_contiguous():
                # loaded by assignment, or `.data =` with Gemma Scope's own layout: laid out once, not at each call
                with torch.no_grad():
                    sae.W_enc.data = as_rows(sae.W_enc.data)
            self._seen = fingerprint(sae.W_enc, sae.b_enc, sae.threshold)

    def encode(self, sae: JumpReLUSAE, x: Tensor, screen: bool | None) -> tuple[Tensor, Tensor, Tensor]:
        """(crow_indices, col_indices, values fp32) by the fastest route that `screen` allows."""
        if screen:
            raise NotImplementedError("the certified screen is not here yet")
        return ops.encode(x, sae.W_enc, sae.b_enc, sae.threshold, None)
