"""Encoder rows in pinned host memory. The 8-bit screen runs on the device and reads over the bus only the rows that
need an exact product (docs/guides/gpu.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.backends.gpu.screen import in_host_memory
from gemmascope_fast.errors import BackendError
from gemmascope_fast.sae.rows import Rows


class Pinned(Rows):
    """The encoder's rows are in pinned host memory, everything else is on a device."""

    only_through_screen = True

    def laid_out(self, W_enc: Tensor) -> Tensor:
        return as_pinned(W_enc)

    def after_change(self, sae: Any) -> Rows:
        # the rows were moved to the device: they are resident now
        return self if sae.W_enc.device != sae.b_enc.device else Rows()


def check_device(device: torch.device) -> None:
    """Raise ValueError if the device is not CUDA, BackendError if this process has no CUDA device."""
    if device.type != "cuda":
        raise ValueError(f'rows: "pinned" needs a CUDA device, got {device}')
    if not torch.cuda.is_available():
        raise BackendError(f'rows: "pinned" needs {device}, and there is no CUDA device in this process')


def page_locked(rows: Tensor) -> Tensor:
    """Copy a tensor into contiguous pinned host memory."""
    return rows.cpu().contiguous().pin_memory()


def as_pinned(W_enc: Tensor) -> Tensor:
    """W_enc [d_in, d_sae] as the transposed view of pinned rows; W_enc itself if it already is that."""
    rows = W_enc.t()
    return W_enc if serves(W_enc) else page_locked(rows).t()


def serves(W_enc: Tensor) -> bool:
    """Whether the device reads these weights directly from host memory."""
    return W_enc.t().is_contiguous() and in_host_memory(W_enc)


def pin_rows(sae: Any, device: torch.device) -> None:
    """Implements `JumpReLUSAE.pin_rows`."""
    check_device(device)
    if not sae.rows.in_memory:
        raise ValueError('mapped rows cannot be pinned: load the checkpoint with rows="pinned"')
    sae.screen_cache.refresh(sae)
    screen = None if sae.screen_cache.stale() else sae.screen_cache.screen
    rows = nn.Parameter(as_pinned(sae.W_enc.detach()), requires_grad=False)
    sae.W_enc = nn.Parameter(rows.new_empty(0), requires_grad=False)  # so that moving the module does not move the rows
    try:
        sae.to(device)
    finally:
        sae.W_enc, sae.rows = rows, Pinned()
    sae.requires_grad_(False)
    if screen is not None:  # the screen was built from these same weights
        sae.screen_cache.adopt(sae, screen)
