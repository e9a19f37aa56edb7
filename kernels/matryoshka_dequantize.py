"""Triton kernel of op `matryoshka_dequantize`: bit planes to the weights of a slice."""

import triton
import triton.language as tl

from gemmascope_fast.kernels.planes import codes_tile


@triton.jit
def matryoshka_dequantize_kernel(
    p0,  # uint8 [blocks, units, 64 * W0]
    p1,
    p2,
    p3,
    p4,
    scale_ptr,  # fp32 or fp16 [blocks, groups, 16]
    zero_ptr,  # uint8 [blocks, groups, 16]
    weight_ptr,  # fp32 [out, width]
    out,
    width,
    blocks,
    units,
    groups,
    group_units,
    top,  # the slice's largest code, if it rounds
    mid,  # what the "prefix" slice adds on the 8-bit grid
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    W4: tl.constexpr,
    BITS: tl.constexpr,
    DROP: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """A program: UNITS units of one block of 16 rows.  Each weight is rounded once, when multiplied by its scale."""
    steps = tl.cdiv(units, UNITS)
    pid = tl.program_id(0)
    block = pid // steps + tl.arange(0, 1)
    unit = (pid % steps) * UNITS + tl.arange(0, UNITS)
    code = codes_tile(p0, p1, p2, p3, p4, block, unit, blocks, units, top, W0, W1, W2, W3, W4, DROP, ROUNDS, 1, UNITS)
    lane = tl.arange(0, 16)
    at = ((pid // steps).to(tl.int64) * groups + unit // group_units)[None, :] * 16 + lane[:, None]
    there = (unit < units)[None, :] & (lane < 16)[:, None]
    alpha = tl.load(scale_ptr + at, mask=there, other=0.0).to(tl.float32)  # [16, UNITS]
    zero = tl.load(zero_ptr + at, mask=there, other=0).to(tl.float32)
    level = tl.reshape((code << (8 - BITS)).to(tl.float32) + mid, [16, UNITS, 32])
    weight = tl.reshape(alpha[:, :, None] * (level - zero[:, :, None]), [16, UNITS * 32])
    row = (pid // steps) * 16 + lane
    k = (pid % steps) * (UNITS * 32) + tl.arange(0, UNITS * 32)
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    tl.store(weight_ptr + at, weight, mask=(row < out)[:, None] & (k < width)[None, :])
