"""Op `encode`: JumpReLU encode into compressed sparse rows.

z = x @ W_enc + b_enc. A pair (token, feature) is stored if and only if relu(z) * (z > threshold) is not zero, where
NaN counts as not zero: z > max(threshold, 0), or z is NaN (docs/how/exact.md).  With a bandwidth ε, pairs with
|z - threshold| < ε/2 are stored too, whether or not they fire: training needs them (sae/straight_through.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import from_mask, row_indices
from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._library import Cost, register, register_autograd
from gemmascope_fast.ops.decode import backward_of_dots
from gemmascope_fast.ops.sampled_dot import tangent_of_dots

Csr = tuple[Tensor, Tensor, Tensor]

SCHEMA = (
    "encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, float? bandwidth=None)"
    " -> (Tensor crow_indices, Tensor col_indices, Tensor values)"
)


def kappa(d: int) -> float:
    """Relative error bound of the fixed-order dot of length d: ⌈d/16⌉ terms a lane, four folds, the bias, one spare."""
    return 1.01 * (math.ceil(d / 16) + 6) * 2.0**-24


def fires(z: Tensor, threshold: Tensor) -> Tensor:
    """Mask of the latents that are stored; NaN counts as fired."""
    return ~(z <= threshold.clamp(min=0))


def encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None = None) -> Csr:
    """Dense eager fp32.  torch can differentiate it; it sums in torch's order, not in the fixed order.

    x [N, d_in], W_enc [d_in, d_sae], b_enc and threshold [d_sae]; 16-bit inputs are widened first.
    Returns crow_indices int64 [N+1], col_indices int32 [nnz] ascending in a row, pre-activations fp32 [nnz].
    """
    check_encode(x, W_enc, b_enc, threshold, bandwidth)
    z = exact_product(x, W_enc) + b_enc.float()
    keep = fires(z, threshold.float())
    if bandwidth is not None:
        keep |= (z - threshold.float()).abs() < bandwidth / 2
    crow, col = from_mask(keep)
    return crow, col, z[row_indices(crow), col.long()]


def check_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None) -> None:
    """The same checks as in the native kernel, for the reference."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != W_enc.shape[0]:
        raise ValueError(f"x: expected [N, d_in = {W_enc.shape[0]}], got {tuple(x.shape)}")
    for name, vector in (("b_enc", b_enc), ("threshold", threshold)):
        if vector.shape != W_enc.shape[1:]:
            raise ValueError(f"{name}: expected [d_sae = {W_enc.shape[1]}], got {tuple(vector.shape)}")
    for name, tensor in (("x", x), ("b_enc", b_enc), ("threshold", threshold)):
        if tensor.device != W_enc.device:
            raise ValueError(f"{name}: expected a tensor on {W_enc.device}, like W_enc, got {tensor.device}")
    if bandwidth is not None and bandwidth <= 0:
        raise ValueError(f"bandwidth: expected a positive number, got {bandwidth}")


def fake_of_encode(x: Tensor, *_: object) -> Csr:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(nnz, dtype=torch.float32),
    )


def cost_of_encode(x: Tensor, W_enc: Tensor, *_: object) -> Cost:
    weights = W_enc.numel() * W_enc.element_size()
    return Cost(bytes=weights + x.numel() * x.element_size(), flops=2 * x.shape[0] * W_enc.numel())


encode = register(SCHEMA, encode_reference, fake_of_encode, cost_of_encode, ragged=True)


def save_for_encode(ctx, inputs, output):
    """Save what `backward_of_encode` and `tangent_of_encode` read: x, W_enc, b_enc and the pattern."""
    return (*inputs[:3], *output[:2])


def backward_of_encode(ctx, needs, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """On the stored pairs z is linear in x, W_enc and b_enc. The support has no gradient.

    dx[n] = sum over f of g · W_enc[:, f];  dW_enc[:, f] = sum over n of g · x[n];  db[f] = sum over n of g.
    """
    x, W_enc, *rest = ctx.saved_tensors
    dx, drows, db = backward_of_dots((x, W_enc.t(), *rest), needs, grad)
    return dx, None if drows is None else drows.t(), db


def tangent_of_encode(ctx, dx: Tensor | None, dW: Tensor | None, db: Tensor | None) -> Tensor:
    """The same derivative in forward mode."""
    x, W_enc, _b_enc, crow, col = ctx.saved_tensors
    return tangent_of_dots((x, dx), (W_enc.t(), None if dW is None else dW.t()), db, crow, col)


def _backward(ctx, needs, _grad_crow, _grad_col, grad):
    return (*backward_of_encode(ctx, needs, grad), None, None)


def _jvp(ctx, dx, dW, db, *_rest):
    return None, None, tangent_of_encode(ctx, dx, dW, db)


register_autograd(encode, save_for_encode, _backward, _jvp)
