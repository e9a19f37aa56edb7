"""Helpers for every launch: check whether it can run here, and raise an error that says why not."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from gemmascope_fast.errors import BackendError

OLDEST = (8, 0)  # int8 tensor cores with exact int32 sums, bf16, cp.async
MAX_GRID = 2**31 - 1  # programs along a grid's first dimension


def interpreted() -> bool:
    """True where Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(name: str, *tensors: Tensor | None) -> ModuleType:
    """Import kernels/<name>.py after checking that its kernels can run on these tensors.

    Raises BackendError if Triton is missing or does not support the device, ValueError if devices differ.
    """
    check_devices(*tensors)
    if importlib.util.find_spec("triton") is None:
        raise BackendError("backend 'triton': the package triton is not installed (pip install triton)")
    return importlib.import_module(f"gemmascope_fast.kernels.{name}")


def check_devices(*tensors: Tensor | None) -> None:
    """Check that all tensors are on one device and that kernels can run on it."""
    present = [t for t in tensors if t is not None]
    device = present[0].device
    for t in present:
        if t.device != device:
            raise ValueError(f"expected all tensors on {device}, like the first, got one on {t.device}")
    if device.type == "cpu":
        if not interpreted():
            raise BackendError("triton kernels need tensors on cuda (or, with TRITON_INTERPRET=1, on cpu)")
    elif device.type != "cuda":
        raise BackendError(f"triton kernels need tensors on cuda, got one on {device}")
    elif torch.version.hip is None:
        check_capability(torch.cuda.get_device_capability(device), str(device))


def check_capability(capability: tuple[int, int], device: str) -> None:
    if capability < OLDEST:
        have, least = ".".join(map(str, capability)), ".".join(map(str, OLDEST))
        raise BackendError(f"{device}: expected compute capability {least} or newer, got {have}")


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_while_capturing(device: torch.device, what: str) -> None:
    """Raise BackendError during a capture: a tensor cached inside a capture has no contents before the first replay."""
    if capturing(device):
        raise BackendError(f"{what}: cached by the first call, which cannot be captured; call once before capturing")


def grid(programs: int, what: str) -> tuple[int]:
    """A one-dimensional grid; ValueError if it exceeds the device's limit."""
    if programs > MAX_GRID:
        raise ValueError(f"{what}: expected at most {MAX_GRID} programs in a grid, got {programs}")
    return (programs,)


def on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within the block, launch on this tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
