"""Implementations of the ops for device CUDA (also AMD), registered at import without touching a GPU.

There are two kinds: Triton launchers, and CUDA C++ if the package was built with it (`make wheel-cuda`).  For ops that
have both, `PREFERRED` says which one is used and why; `gemmascope_fast.backend(name)` selects the other.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from gemmascope_fast.backends.gpu.launch import interpreted
from gemmascope_fast.errors import BackendError
from gemmascope_fast.ops._library import LIBRARY, requested

# op -> name of the module in gemmascope_fast.backends.gpu with the function of that name
TRITON = {
    "encode": "encode",
    "encode_tensor": "tensor",
    "encode_screened": "screen",
    "encode_topk": "topk",
    "encode_topk_screened": "topk",
    "decode": "decode",
    "sampled_dot": "decode",
    "matryoshka_linear": "matryoshka",
    "matryoshka_pack": "planes",
    "matryoshka_slice": "planes",
    "matryoshka_dequantize": "planes",
}

# Ops that use CUDA C++ if it is there, and why.  All others use Triton.
PREFERRED = {
    "encode": "16 lanes of a half-warp hold the 16 accumulators and add up by shuffles; Triton needs shared memory",
    "decode": "32 columns a warp, features staged through shared memory",
    "matryoshka_linear": "up to 4 tokens: planes' words are dp4a operands without unpacking, two launches; else Triton",
}

CUDA_MISSING: str | None = None
try:  # loading registers gemmascope_fast_cuda::*; it needs a CUDA build of torch, but no driver
    importlib.import_module("gemmascope_fast._C_cuda")
except ImportError as error:
    CUDA_MISSING = f"this build has no CUDA C++ kernels (make wheel-cuda builds them): {error}"


def launcher(op: str, name: str) -> Callable[..., Any]:
    """The implementation of an op in "triton" or "cuda"; BackendError if there is none."""
    if name == "triton" and op in TRITON:
        return getattr(importlib.import_module(f"gemmascope_fast.backends.gpu.{TRITON[op]}"), op)
    if name == "cuda" and compiled(op):
        return getattr(torch.ops.gemmascope_fast_cuda, op).default
    raise BackendError(f"backend {name!r} cannot run {op}: {missing(op, name)}")


def compiled(op: str) -> bool:
    """Whether this build has a CUDA C++ kernel for the op."""
    name = f"gemmascope_fast_cuda::{op}"
    known = name in torch._C._dispatch_get_all_op_names()
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def missing(op: str, name: str) -> str | None:
    """Why a backend cannot run an op on any GPU, or None if it can."""
    if name == "triton":
        if op not in TRITON:
            return "it has no triton kernel"
        return None if importlib.util.find_spec("triton") else "the package triton is not installed"
    if compiled(op):
        return None
    return CUDA_MISSING or "it has no CUDA C++ kernel"


def unavailable(op: str, name: str, device: torch.device) -> str | None:
    """Why "triton" or "cuda" cannot run the op on this device, or None if it can."""
    if device.type == "cpu" and not (name == "triton" and interpreted()):
        return f"{name} kernels need tensors on cuda"
    return missing(op, name)


def choice(op: str) -> tuple[str, str]:
    """(backend, reason): the default for an op on CUDA."""
    if op in PREFERRED and compiled(op):
        return "cuda", PREFERRED[op]
    if op in TRITON:
        why = missing(op, "triton")
        return ("triton", "Triton kernels") if why is None else ("none", why)
    return "eager", "it has no GPU kernel"


def loop_choice() -> tuple[str, str]:
    """The same for the fused loop, which is not an op; attach calls it."""
    when = "in attach, up to 16 rows without gradients, fp32 weights and plain edits (attach/fused.py)"
    if compiled("splice"):
        return "cuda", f"two launches {when}"
    if importlib.util.find_spec("triton"):
        return "triton", f"three launches {when}"
    return "none", "the package triton is not installed"


def pick(op: str, wanted: str | None, args: tuple[Any, ...]) -> str:
    """The backend for one call on CUDA if `wanted` was requested by name.

    An op that `wanted` has no kernel for was rejected earlier. If one arrives here, it is a step of another op
    (Op.step).  BackendError if CUDA C++ was requested and has no kernel for these arguments.
    """
    asked = wanted in ("triton", "cuda") and missing(op, str(wanted)) is None
    name = str(wanted) if asked else choice(op)[0]
    if name == "cuda" and op == "matryoshka_linear":
        from gemmascope_fast.backends.gpu.matryoshka import CUDA_PREFERRED, cuda_refuses

        why = cuda_refuses(*args)
        if asked and why is not None:
            raise BackendError(f"backend 'cuda' cannot run {op} with {why}")
        if not asked and (why is not None or args[0].shape[0] > CUDA_PREFERRED):
            name = "triton"
    return "triton" if name == "none" else name


def _serve(op: str) -> Callable[..., Any]:
    def serve(*args: Any) -> Any:
        return launcher(op, pick(op, requested(), args))(*args)

    return serve


for _op in TRITON:
    LIBRARY.impl(_op, _serve(_op), "CUDA")
