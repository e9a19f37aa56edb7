"""Encoder rows in pinned host memory: on the device the 8-bit screen decides, and reads the rows that refine where they
lie (docs/guides/gpu.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.backends.gpu.screen import in_host_memory
from gemmascope_fast.errors import BackendError
from gemmascope_fast.sae.rows import Rows


class Pinned(Rows):
    """The encoder's rows in pinned host memory, everything else on a device."""

    only_through_screen = True

    def lay_out(self, W_enc: Tensor) -> Tensor:
        return as_pinned(W_enc)

    def after_change(self, sae: Any) -> Rows:
        # moved to where everything else is, they are resident
        return self if sae.W_enc.device != sae.b_enc.device else Rows()


def check_device(device: torch.device) -> None:
    """ValueError for a device that reads no host memory, BackendError where there is none in this process."""
    if device.type != "cuda":
        raise ValueError(f'rows: "pinned" serves a CUDA device, got {device}')
    if not torch.cuda.is_available():
        raise BackendError(f'rows: "pinned" needs {device}, and there is no CUDA device in this process')


def page_locked(rows: Tensor) -> Tensor:
    """A contiguous copy in pinned host memory."""
    return rows.cpu().contiguous().pin_memory()


def as_pinned(W_enc: Tensor) -> Tensor:
    """The same [d_in, d_sae] values as the transposed view of pinned rows; W_enc itself where it is that."""
    rows = W_enc.t()
    return W_enc if serves(W_enc) else page_locked(rows).t()


def serves(W_enc: Tensor) -> bool:
    """Whether a device reads these weights where they lie."""
    return W_enc.t().is_contiguous() and in_host_memory(W_enc)


def pin_rows(sae: Any, device: torch.device) -> None:
    """`JumpReLUSAE.pin_rows`."""
    check_device(device)
    if not sae.rows.in_memory:
        raise ValueError('mapped rows are not pinned: load the checkpoint with rows="pinned"')
    sae.screen_cache.refresh(sae)
    screen = None if sae.screen_cache.stale() else sae.screen_cache.screen
    rows = nn.Parameter(as_pinned(sae.W_enc.detach()), requires_grad=False)
    sae.W_enc = nn.Parameter(rows.new_empty(0), requires_grad=False)  # what moves must not take them along
    try:
        sae.to(device)
    finally:
        sae.W_enc, sae.rows = rows, Pinned()
    sae.requires_grad_(False)
    if screen is not None:  # of these very weights
        sae.screen_cache.adopt(sae, screen)
