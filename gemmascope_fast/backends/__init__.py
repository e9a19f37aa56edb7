"""Which implementation serves which op and device, and why.

Four names: `eager` (the reference), `native` (C++ on CPU), `triton`, `cuda`.  Left alone, the dispatcher takes
the best that is there.  A backend asked for by name serves or raises; a fallback shows in `gemmascope-fast info`.
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
from gemmascope_fast.ops._library import (  # noqa: F401 - asked here by what is above the ops
    OPS,
    Op,
    requested,
)
from gemmascope_fast.ops._transforms import asked_for

NAMES = ("eager", "native", "triton", "cuda")

_C: Any = None
NATIVE_MISSING: str | None = None
try:  # by name: `from gemmascope_fast import _C` would call a missing file a circular import
    _C = importlib.import_module("gemmascope_fast._C")
except ImportError as error:  # the package works without it, slowly, and says so
    NATIVE_MISSING = f"the compiled extension is not there ({error})"


# Levels of instructions that the native kernels are compiled for, each with what those before it have (csrc/cpu/isa.h).
ISAS = ("plain", "avx2", "avxvnni", "avx512", "amx")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op is served by this backend: "eager", "native", "triton" or "cuda".

    A function under torch.compile keeps the backend that was asked for when it was traced, and a graph of autograd that
    of its forward: its backward may run outside of the block, or in one of autograd's own threads.
    Raises ValueError for another name at once, BackendError at the call for an op it cannot serve.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    with asked_for(name):
        yield


def implementation(op: Op, name: str, args: Sequence[Any]) -> Callable[..., Any]:
    """The callable of one op in one backend for these arguments' device; BackendError where there is none."""
    if name == "eager":
        return op.reference
    flat = [t for a in args for t in (a if isinstance(a, list | tuple) else (a,))]
    device = next(t.device for t in flat if isinstance(t, torch.Tensor))
    reason = unavailable(op.name, name, device)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot serve {op.name} on {device}: {reason}")
    if name != "native" and device.type == "cpu":
        return register.launcher(op.name, name)  # Triton's interpreter, without autograd
    return op.dispatched


for _op in OPS.values():
    _op.implementations |= {name: partial(implementation, _op, name) for name in NAMES}


def unavailable(op: str, name: str, device: torch.device) -> str | None:
    """Why this backend cannot serve the op on this device, or None where it can."""
    if name == "native":
        if device.type != "cpu":
            return "native kernels are for tensors on cpu"
        if NATIVE_MISSING is not None:
            return NATIVE_MISSING
        return None if _has_kernel(op, "CPU") else "no native kernel is written for it"
    return register.unavailable(op, name, device)


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"gemmascope_fast::{op}", key)


@dataclass(frozen=True)
class Choice:
    """What serves one op on one device when nobody asks for a backend by name."""

    op: str
    device: str
    backend: str
    reason: str


def choices() -> list[Choice]:
    """One row per op and device, and one for attach's fused loop, for `gemmascope-fast info`."""
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
            rows.append(Choice(op, "cuda", "eager", "no GPU kernel is registered for it"))
    loop = register.loop_choice() if torch.cuda.is_available() else ("none", "no CUDA device in this process")
    rows.append(Choice("fused loop", "cuda", *loop))
    return rows


def isa() -> str | None:
    """The CPU instruction-set level in use (one of ISAS), None without the extension."""
    return None if _C is None else _C.isa()


def advise_large_pages(t: torch.Tensor) -> None:
    """Ask the system to hold a CPU tensor in large pages (csrc/cpu/memory.h): rows read at random then miss the TLB
    once instead of once per 4 KiB.  An advice; nothing but speed depends on it."""
    if _C is not None and t.device.type == "cpu":
        _C.advise_large_pages(t.data_ptr(), t.nbytes)


def announce_rows(rows: torch.Tensor, ids: torch.Tensor) -> None:
    """Tell the system which rows of a matrix in a mapped file are about to be read, so that the disk fetches many at
    once (csrc/cpu/memory.h).  rows [n, d], contiguous; ids, integer, those outside [0, n) left out.  An advice."""
    if _C is not None:
        # unsorted ones would only be more calls
        chosen = torch.unique(ids).long()
        chosen = chosen[(chosen >= 0) & (chosen < rows.shape[0])].contiguous()
        _C.announce_rows(rows.data_ptr(), rows.shape[1] * rows.element_size(), chosen.data_ptr(), chosen.numel())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one dtype and shape hold the same bytes: a NaN equals itself, 0 is not -0."""
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    if _C is not None and a.device.type == b.device.type == "cpu":
        return bool(_C.same_bytes(a.data_ptr(), b.data_ptr(), a.nbytes))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def supported_isas() -> list[str]:
    return [] if _C is None else _C.supported_isas()


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Within the block native kernels use this instruction-set level.  Process-wide: for tests and benchmarks.

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
