"""Op `encode_tensor`: encode with x rounded to the weights' dtype, and sums in any order.

This is `precision="tensor"`: bf16 or fp16 products on tensor cores for 16-bit weights, tf32 for fp32 weights.
Results are not byte-exact; `tolerance` bounds the distance of a pre-activation from the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import from_mask, row_indices
from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._library import register, register_autograd
from gemmascope_fast.ops.encode import (
    backward_of_encode,
    check_encode,
    cost_of_encode,
    fake_of_encode,
    fires,
    save_for_encode,
    tangent_of_encode,
)

Csr = tuple[Tensor, Tensor, Tensor]

SCHEMA = (
    "encode_tensor(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold)"
    " -> (Tensor crow_indices, Tensor col_indices, Tensor values)"
)

# Relative error of rounding one factor.  tf32 keeps 10 bits, and hardware may truncate instead of rounding. For tf32
# both factors are rounded, otherwise only x.
INPUT_ERROR = {torch.float32: 2 * 2.0**-10 * (1 + 2.0**-10), torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x [N, d] in the form that tensor cores of this dtype take, and the factor to multiply the sums by, fp32 [N].

    fp16 holds at most 65,504 and a residual stream can exceed it, so such tokens are first divided by a power of two.
    """
    if dtype != torch.float16:
        return x.to(dtype), None
    x = x.float()
    largest = x.abs().amax(1).nan_to_num(1.0, 1.0)
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.ldexp(x, -exponent[:, None]).to(dtype), torch.ldexp(torch.ones_like(largest), exponent)


def tolerance(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """fp64 [N, d_sae]: how far z in this mode may be from x @ W_enc + b_enc.

    Rounding the factors costs INPUT_ERROR of Σ|x||w| (and half an fp16 subnormal per term).  Tensor cores add with
    at least 23 bits and truncate: 2⁻²² of the sum's size per term covers any order, the bias 2⁻²⁴ of the result.
    """
    d = W_enc.shape[0]
    x64, w64, b64 = x.double().abs(), W_enc.double().abs(), b_enc.double().abs()
    relative = INPUT_ERROR[W_enc.dtype] + (d + 2) * 2.0**-22
    size = x64 @ w64
    least = x64.amax(1, keepdim=True) * 2.0**-24 * w64.sum(0) if W_enc.dtype == torch.float16 else 0.0
    return relative * (size + b64) + least + d * 2.0**-126


def encode_tensor_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Csr:
    """Dense eager: the rounded x times W_enc in fp32.  Same shapes and dtypes as `encode`."""
    check_encode(x, W_enc, b_enc, threshold, None)
    near, scale = rounded(x, W_enc.dtype)
    z = exact_product(near, W_enc)
    z = (z if scale is None else z * scale[:, None]) + b_enc.float()
    keep = fires(z, threshold.float())
    crow, col = from_mask(keep)
    return crow, col, z[row_indices(crow), col.long()]


encode_tensor = register(SCHEMA, encode_tensor_reference, fake_of_encode, cost_of_encode, ragged=True)


def _backward(ctx, needs, _grad_crow, _grad_col, grad):
    """The gradients of `encode` for the stored pairs."""
    return (*backward_of_encode(ctx, needs, grad), None)


def _jvp(ctx, dx, dW, db, _dthreshold):
    return None, None, tangent_of_encode(ctx, dx, dW, db)


register_autograd(encode_tensor, save_for_encode, _backward, _jvp)
