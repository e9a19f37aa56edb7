"""Op `matryoshka_dequantize`: bit planes → the weights of a slice to r bits, W_r[o, k] = α · (level − z).

level is the position of the r-bit code on the 8-bit grid (ops/codes.py).  level − z is a multiple of 1/2 and exact, so
each weight is rounded only once, when it is multiplied by α in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._library import Cost, register, register_autograd
from gemmascope_fast.ops._planes import add_overflow, check_planes, check_scales, mode_of, unblocked
from gemmascope_fast.ops.matryoshka_slice import matryoshka_slice, matryoshka_slice_reference

SCHEMA = (
    "matryoshka_dequantize(Tensor[] planes, Tensor scale, Tensor zero_point, int out_features, int in_features,"
    " int group_size, int bits, int rule) -> Tensor"
)
NO_DERIVATIVE = "codes and their scales have no derivative; train nested weights and pack them afterwards"


def matryoshka_dequantize_reference(
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    rule: int,
) -> Tensor:
    """planes uint8 [out/16, in/32, 64·width], as many as the slice reads; scale fp32 or fp16 and zero_point uint8
    [out/16, groups, 16]; group_size 0: one group a row; rule as in op `matryoshka_slice` → fp32 [out, in].
    """
    check_planes(planes, out_features, in_features, bits, rule)
    check_scales(scale, zero_point, out_features, in_features, group_size)
    code = matryoshka_slice_reference(planes, out_features, in_features, bits, rule)
    alpha, zero = (unblocked(v, out_features) for v in (scale, zero_point))
    return on_grid(code, alpha, zero, group_size, bits, rule)


def on_grid(code: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, bits: int, rule: int) -> Tensor:
    """r-bit codes uint8 [n, in] and scales and zero points of their rows [n, groups] → weights fp32 [n, in]."""
    from gemmascope_fast.ops.codes import grid

    alpha, zero = scale.float(), zero_point.float()
    if group_size:
        alpha, zero = (v.repeat_interleave(group_size, 1)[:, : code.shape[1]] for v in (alpha, zero))
    return alpha * (grid(code, bits, mode_of(rule)) - zero)


def dequantize(
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    overflow: tuple[Tensor, Tensor] | None,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    rule: int,
) -> Tensor:
    """Call the op as a step of another op. A flat copy may list the weights whose code is one higher (crow, col)."""
    if overflow is None:
        return matryoshka_dequantize.step(planes, scale, zero_point, out_features, in_features, group_size, bits, rule)
    code = add_overflow(matryoshka_slice.step(planes, out_features, in_features, bits, rule), *overflow)
    alpha, zero = (unblocked(v, out_features) for v in (scale, zero_point))
    return on_grid(code, alpha, zero, group_size, bits, rule)


def _fake(planes: list[Tensor], scale: Tensor, zero_point: Tensor, out_features: int, in_features: int, *_: object):
    return scale.new_empty(out_features, in_features, dtype=torch.float32)


def _cost(
    planes: list[Tensor], scale: Tensor, zero_point: Tensor, out_features: int, in_features: int, *_: object
) -> Cost:
    read = sum(t.numel() * t.element_size() for t in (*planes, scale, zero_point))
    return Cost(bytes=read + 4 * out_features * in_features, flops=2 * out_features * in_features)


matryoshka_dequantize = register(SCHEMA, matryoshka_dequantize_reference, _fake, _cost)


def _refuse(*_: object):
    raise ValueError(f"scale: {NO_DERIVATIVE}")


register_autograd(matryoshka_dequantize, lambda ctx, inputs, output: (), _refuse, _refuse)
