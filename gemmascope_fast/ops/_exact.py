"""Dense products in float32, whether or not `torch.autocast` is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.ops._transforms import derivative_wanted


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn `torch.autocast` off within the block for this kind of device."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def put(t: Tensor, at: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """`t.index_put(at, values)`. On a GPU, autocast would refuse this for the other 16-bit dtype."""
    with outside_autocast(t.device):
        return t.index_put(at, values)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; both are widened first. The same bytes inside and outside of `torch.autocast`, backward too.

    a [..., n, k] and b [k, m]. Derivatives of every order and the transforms of `torch.func` work as for `@`.
    """
    if torch.compiler.is_compiling() or not derivative_wanted(a, b):
        with outside_autocast(a.device):
            return a.float() @ b.float()
    product: Tensor = _Product.apply(a.float(), b.float())
    return product


class _Product(torch.autograd.Function):
    """a @ b with a backward outside of autocast too. torch's own backward would be rounded if it ran inside."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with outside_autocast(a.device):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        if grad is None:
            return None, None
        a, b = ctx.saved_tensors
        da = exact_product(grad, b.t()) if ctx.needs_input_grad[0] else None
        db = None
        if ctx.needs_input_grad[1]:
            rows, grads = a.reshape(-1, a.shape[-1]), grad.reshape(-1, grad.shape[-1])
            db = exact_product(rows.t(), grads)
        return da, db

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor:  # type: ignore[override]
        a, b = ctx.saved_tensors
        parts = [exact_product(*pair) for pair in ((da, b), (a, db)) if pair[0] is not None and pair[1] is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
