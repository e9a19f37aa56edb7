"""The ops' implementations for device CUDA (AMD's too), registered at import without touching a GPU.

Two kinds: Triton launchers, and CUDA C++ where the package was built with it (`make wheel-cuda`).  Both serve the
same op; `PREFERRED` says which one is taken and why, `gemmascope_fast.backend(name)` asks for the other.
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

# op -> the function of the same name in this module of gemmascope_fast.backends.gpu
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

# Where CUDA C++ is taken when it is there, and why.  Everything else is Triton's.
PREFERRED = {
    "encode": "16 lanes of a half-warp hold the 16 accumulators and fold by shuffles; Triton pays shared memory for it",
    "decode": "a warp's width of columns a warp, features staged through shared memory",
    "matryoshka_linear": "up to 4 tokens: planes' words are dp4a operands as they lie, two launches; Triton above",
}

CUDA_MISSING: str | None = None
try:  # loading it registers gemmascope_fast_cuda::*; it needs torch's CUDA build, and no driver
    importlib.import_module("gemmascope_fast._C_cuda")
except ImportError as error:
    CUDA_MISSING = f"this build holds no CUDA C++ kernels (make wheel-cuda builds them): {error}"


def launcher(op: str, name: str) -> Callable[..., Any]:
    """The implementation of an op in "triton" or "cuda"; BackendError where there is none."""
    if name == "triton" and op in TRITON:
        return getattr(importlib.import_module(f"gemmascope_fast.backends.gpu.{TRITON[op]}"), op)
    if name == "cuda" and compiled(op):
        return getattr(torch.ops.gemmascope_fast_cuda, op).default
    raise BackendError(f"backend {name!r} cannot serve {op}: {missing(op, name)}")


def compiled(op: str) -> bool:
    """Whether this build holds a CUDA C++ kernel of the op."""
    name = f"gemmascope_fast_cuda::{op}"
    known = name in torch._C._dispatch_get_all_op_names()
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


def missing(op: str, name: str) -> str | None:
    """What keeps a backend from serving an op on any GPU, None where nothing does."""
    if name == "triton":
        if op not in TRITON:
            return "no triton kernel is written for it"
        return None if importlib.util.find_spec("triton") else "the package triton is not installed"
    if compiled(op):
        return None
    return CUDA_MISSING or "no CUDA C++ kernel is written for it"


def unavailable(op: str, name: str, device: torch.device) -> str | None:
    """Why "triton" or "cuda" cannot serve the op on this device, or None where it can."""
    if device.type == "cpu" and not (name == "triton" and interpreted()):
        return f"{name} kernels are for tensors on cuda"
    return missing(op, name)


def choice(op: str) -> tuple[str, str]:
    """(backend, reason) of what serves an op on CUDA when nobody asks for a backend by name."""
    if op in PREFERRED and compiled(op):
        return "cuda", PREFERRED[op]
    if op in TRITON:
        why = missing(op, "triton")
        return ("triton", "Triton kernels") if why is None else ("none", why)
    return "eager", "no GPU kernel is written for it"


def loop_choice() -> tuple[str, str]:
    """The same of the fused loop, which is no op: attach asks for it."""
    when = "in attach, up to 16 rows without gradients, fp32 weights and plain edits (attach/fused.py)"
    if compiled("splice"):
        return "cuda", f"two launches {when}"
    if importlib.util.find_spec("triton"):
        return "triton", f"three launches {when}"
    return "none", "the package triton is not installed"


def pick(op: str, wanted: str | None, args: tuple[Any, ...]) -> str:
    """The backend for one call on CUDA, where `wanted` is asked for by name.

    A call of an op that `wanted` has no kernel of was refused before it came here; what comes with such a name is a
    step of another op (Op.step).  BackendError where CUDA C++ is asked for and has no kernel for these arguments.
    """
    asked = wanted in ("triton", "cuda") and missing(op, str(wanted)) is None
    name = str(wanted) if asked else choice(op)[0]
    if name == "cuda" and op == "matryoshka_linear":
        from gemmascope_fast.backends.gpu.matryoshka import CUDA_PREFERRED, cuda_refuses

        why = cuda_refuses(*args)
        if asked and why is not None:
            raise BackendError(f"backend 'cuda' cannot serve {op} with {why}")
        if not asked and (why is not None or args[0].shape[0] > CUDA_PREFERRED):
            name = "triton"
    return "triton" if name == "none" else name


def _serve(op: str) -> Callable[..., Any]:
    def serve(*args: Any) -> Any:
        return launcher(op, pick(op, requested(), args))(*args)

    return serve


for _op in TRITON:
    LIBRARY.impl(_op, _serve(_op), "CUDA")
