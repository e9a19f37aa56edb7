"""Op `matryoshka_linear`: y = A(x − mean) · W_rᵀ + bias. W_r is a slice of nested codes, read from bit planes.

W_r[o, k] = α · (level − z), with level the position of the r-bit code on the 8-bit grid (see ops/codes.py).  A is the
identity (exact), or int8 with one scale a token: s = max|v| / 127, A(v) = s · round(v / s).  Then, with exact integers,

    y[t, o] = s_t · Σ_groups α_g · ( Σ_k (2^(8−r)·code − z_g)·q[t, k]  +  mid · Σ_k q[t, k] )  + bias[o]

in fp32, adding groups in ascending order by fused multiply-add; every instruction set gives the same bytes.  A token
with NaN or Inf gives NaN in every int8 output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._library import Cost, register, register_autograd
from gemmascope_fast.ops._planes import check_planes, check_scales
from gemmascope_fast.ops.matryoshka_dequantize import NO_DERIVATIVE, dequantize

SCHEMA = (
    "matryoshka_linear(Tensor x, Tensor[] planes, Tensor scale, Tensor zero_point, Tensor? bias, Tensor? mean,"
    " Tensor? overflow_crow, Tensor? overflow_col, int out_features, int group_size, int bits, int rule, bool exact)"
    " -> Tensor"
)
MAX_IN = 66_000  # 256 · 127 · 66,000 < 2^31: no int32 sum of products overflows


def matryoshka_linear_reference(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    overflow_crow: Tensor | None,
    overflow_col: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    rule: int,
    exact: bool,
) -> Tensor:
    """x [N, in] floating; planes uint8 [out/16, in/32, 64·width], as many as the slice reads; scale and zero_point
    [out/16, groups, 16]; bias [out], mean [in]; group_size 0: one group a row → fp32 [N, out].
    """
    check(x, planes, scale, zero_point, bias, mean, out_features, group_size, bits, rule)
    overflow = None if overflow_crow is None or overflow_col is None else (overflow_crow, overflow_col)
    weight = dequantize(planes, scale, zero_point, overflow, out_features, x.shape[1], group_size, bits, rule)
    centred = x.float() if mean is None else x.float() - mean.float()
    if exact:
        y = exact_product(centred, weight.t())
    else:
        q, s = quantize_tokens(centred)
        y = exact_product(q, weight.t()) * s[:, None]
    return y if bias is None else y + bias.float()


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x fp32 [N, in] → (int8 [N, in], scale fp32 [N]). A token that is not finite gets codes 0 and scale NaN."""
    finite = torch.isfinite(x).all(1)
    x = torch.where(finite[:, None], x, torch.zeros_like(x))
    tiny = torch.finfo(torch.float32).tiny
    # by a tensor: on CUDA, dividing by a Python number multiplies by its reciprocal, which rounds differently
    s = (x.abs().amax(1) / x.new_full((), 127.0)).clamp(min=tiny) if x.shape[1] else x.new_full((x.shape[0],), tiny)
    q = (x / s[:, None]).round().clamp(-127, 127).to(torch.int8)
    return q, torch.where(finite, s, torch.full_like(s, float("nan")))


def check(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    rule: int,
) -> None:
    """The same checks as in the native kernel, for the reference."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] > MAX_IN:
        raise ValueError(f"x: expected [N, in_features <= {MAX_IN}], got {tuple(x.shape)}")
    check_planes(planes, out_features, x.shape[1], bits, rule)
    check_scales(scale, zero_point, out_features, x.shape[1], group_size)
    for name, tensor, shape in (
        ("bias", bias, (out_features,)),
        ("mean", mean, (x.shape[1],)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")


def _fake(x: Tensor, planes, scale, zero_point, bias, mean, crow, col, out_features: int, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=torch.float32)


def _cost(x: Tensor, planes, scale, zero_point, bias, mean, crow, col, out_features: int, *_: object) -> Cost:
    weights = sum(t.numel() * t.element_size() for t in (*planes, scale, zero_point))
    moved = x.numel() * x.element_size() + 4 * x.shape[0] * out_features
    return Cost(bytes=weights + moved, flops=2 * x.numel() * out_features)


matryoshka_linear = register(SCHEMA, matryoshka_linear_reference, _fake, _cost)


def _save(ctx, inputs, output):
    x, planes, scale, zero_point, bias, _mean, crow, col, *numbers, _exact = inputs
    ctx.numbers, ctx.dtype = numbers, x.dtype
    ctx.tokens, ctx.in_features = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    return (scale, zero_point, crow, col, *planes)


def _weight(ctx) -> Tensor:
    """The weights W_r, fp32 [out, in]."""
    scale, zero_point, crow, col, *planes = ctx.saved_tensors
    out, *more = ctx.numbers
    overflow = None if crow is None else (crow, col)
    return dequantize(planes, scale, zero_point, overflow, out, ctx.in_features, *more)


def _backward(ctx, needs, grad):
    """dx = grad · W_r, straight through the rounding of the activations. Codes and scales have no gradient."""
    if needs[2]:
        raise ValueError(f"scale: {NO_DERIVATIVE}")
    dx = dbias = dmean = None
    if needs[0] or needs[5]:
        product = exact_product(grad, _weight(ctx))
        dx = product.to(ctx.dtype) if needs[0] else None
        dmean = -product.sum(0) if needs[5] else None
    if needs[4]:
        dbias = grad.sum(0).to(ctx.bias_dtype)
    return dx, None, None, None, dbias, dmean, None, None, None, None, None, None, None


def _jvp(ctx, dx, _planes, dscale, _zero, dbias, dmean, *_rest):
    if dscale is not None:
        raise ValueError(f"scale: {NO_DERIVATIVE}")
    moved = [
        t for t in (None if dx is None else dx.float(), None if dmean is None else -dmean.float()) if t is not None
    ]
    parts = [] if dbias is None else [dbias.float().expand(ctx.tokens, -1)]
    if moved:
        parts.append(exact_product(sum(moved[1:], moved[0]), _weight(ctx).t()))
    return sum(parts[1:], parts[0])


register_autograd(matryoshka_linear, _save, _backward, _jvp)
