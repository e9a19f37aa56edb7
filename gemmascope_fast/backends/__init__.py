"""Which implementation runs each op on each device, and why.

The four backends are `eager` (the reference), `native` (C++ on CPU), `triton` and `cuda`.  By default, the dispatcher
runs the best available one.  A backend requested by name runs or raises; `gemmascope-fast info` shows fallbacks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gemmascope_fast.backends.gpu import register
from gemmascope_fast.backends.gpu.launch import interpreted  # noqa: F401 - `info` asks here
from gemmascope_fast.errors import BackendError
from gemmascope_fast.ops._library import (  # noqa: F401 - imported from here by other packages
    OPS,
    Op,
    requested,
)
from gemmascope_fast.ops._transforms import asked_for

NAMES = ("eager", "native", "triton", "cuda")

_C: Any = None
NATIVE_MISSING: str | None = None
try:  # `from gemmascope_fast import _C` would report a missing file as a circular import
    _C = importlib.import_module("gemmascope_fast._C")
except ImportError as error:  # without it the package works slowly, and `info` shows it
    NATIVE_MISSING = f"the compiled extension is missing ({error})"


# Levels of instructions that the native kernels are compiled for, each includes the earlier ones (csrc/cpu/isa.h).
ISAS = ("plain", "avx2", "avxvnni", "avx512", "amx")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, run every op with this backend: "eager", "native", "triton" or "cuda".

    A function under torch.compile keeps the backend that was requested when it was traced. An autograd graph keeps that
    of its forward, because its backward may run outside of the block or in one of autograd's threads.
    Raises ValueError for an unknown name immediately, and BackendError at the call of an op that it cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    with asked_for(name):
        yield


def implementation(op: Op, name: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The function of an op in this backend, for the device of these arguments; BackendError if there is none."""
    if name == "eager":
        return op.reference
    flat = [t for a in args for t in (a if isinstance(a, list | tuple) else (a,))]
    device = next(t.device for t in flat if isinstance(t, torch.Tensor))
    reason = unavailable(op.name, name, device)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {op.name} on {device}: {reason}")
    if name != "native" and device.type == "cpu":
        return register.launcher(op.name, name)  # Triton's interpreter has no autograd
    return op.dispatched


for _op in OPS.values():
    _op.implementations |= {name: partial(implementation, _op, name) for name in NAMES}


def unavailable(op: str, name: str, device: torch.device) -> str | None:
    """Why this backend cannot run the op on this device, or None if it can."""
    if name == "native":
        if device.type != "cpu":
            return "native kernels need tensors on cpu"
        if NATIVE_MISSING is not None:
            return NATIVE_MISSING
        return None if _has_kernel(op, "CPU") else "it has no native kernel"
    return register.unavailable(op, name, device)


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gemmascope_fast::{op}", key)


@dataclass(frozen=True)
class Choice:
    """The default backend of one op on one device."""

    op: str
    device: str
    backend: str
    reason: str


def choices() -> list[Choice]:
    """For `gemmascope-fast info`: one row per op and device, and one for the fused loop of `attach`."""
    rows = []
    for op in OPS:
        why = unavailable(op, "native", torch.device("cpu"))
        if why is None:
            rows.append(Choice(op, "cpu", "native", f"{_C.isa()} kernels"))
        else:
            rows.append(Choice(op, "cpu", "eager", why))
        if not torch.cuda.is_available():
            rows.append(Choice(op, "cuda", "none", "no CUDA device in this process"))
        elif _has_kernel(op, "CUDA"):
            rows.append(Choice(op, "cuda", *register.choice(op)))
        else:
            rows.append(Choice(op, "cuda", "eager", "it has no GPU kernel"))
    loop = register.loop_choice() if torch.cuda.is_available() else ("none", "no CUDA device in this process")
    rows.append(Choice("fused loop", "cuda", *loop))
    return rows


def isa() -> str | None:
    """The CPU instruction-set level in use (one of ISAS); None without the extension."""
    return None if _C is None else _C.isa()


def advise_large_pages(t: torch.Tensor) -> None:
    """Ask the OS to use large pages for a CPU tensor (csrc/cpu/memory.h). Reading rows at random then misses the TLB
    once instead of once per 4 KiB.  This is only a hint; it affects nothing but speed."""
    if _C is not None and t.device.type == "cpu":
        _C.advise_large_pages(t.data_ptr(), t.nbytes)


def announce_rows(rows: torch.Tensor, ids: torch.Tensor) -> None:
    """Tell the OS which rows of a matrix in a mapped file are read next, so that the disk fetches many at once
    (csrc/cpu/memory.h).  rows [n, d], contiguous; ids: integers, those outside [0, n) are ignored.  Only a hint."""
    if _C is not None:
        # sorted, so that fewer calls are needed
        chosen = torch.unique(ids).long()
        chosen = chosen[(chosen >= 0) & (chosen < rows.shape[0])].contiguous()
        _C.announce_rows(rows.data_ptr(), rows.shape[1] * rows.element_size(), chosen.data_ptr(), chosen.numel())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one dtype and shape have the same bytes (NaN equals itself, 0 is not -0)."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    if _C is not None and a.device.type == b.device.type == "cpu":
        return bool(_C.same_bytes(a.data_ptr(), b.data_ptr(), a.nbytes))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def supported_isas() -> list[str]:
    return [] if _C is None else _C.supported_isas()


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Within the block, native kernels use this instruction-set level, in the whole process. For tests and benchmarks.

    The environment variable GSF_ISA does the same for a whole process.
    """
    if _C is None:
        raise BackendError(f"isa {name!r}: {NATIVE_MISSING}")
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)
