"""Triton kernel of op `matryoshka_linear` with int8 activations: converts bit planes to int8 for tensor cores.

One program: BLOCKS blocks of 16 outputs and BT tokens.  A slice to `bits` loads only the planes it needs, each byte
once.  Integers are exact; the fp32 steps are those of the native kernel, in the same order.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.lanes import canonical
from gemmascope_fast.kernels.planes import codes_tile


@triton.jit
def matryoshka_linear_kernel(
    q_ptr,  # int8 [T, units * 32], zero-padded
    s_ptr,  # fp32 [T]
    qsum_ptr,  # int32 [T, groups], sums of q
    p0,  # uint8 [blocks, units, 64 * W0]
    p1,
    p2,
    p3,
    p4,
    scale_ptr,  # fp32 or fp16 [blocks, groups, 16]
    zero_ptr,  # uint8 [blocks, groups, 16]
    bias_ptr,  # fp32 [out], read if HAS_BIAS
    y_ptr,  # fp32 [T, out]
    T,
    out,
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
    WIDE: tl.constexpr,  # a group has more than 512 weights
    HAS_BIAS: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    BT: tl.constexpr,
):
    tiles = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    block = (pid // tiles) * BLOCKS + tl.arange(0, BLOCKS)
    row = (pid // tiles) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    t = (pid % tiles) * BT + tl.arange(0, BT)
    t_in = t < T
    acc = tl.zeros([BT, BLOCKS * 16], dtype=tl.float32)
    for g in range(0, groups):
        dot = tl.zeros([BT, BLOCKS * 16], dtype=tl.int32)
        last = tl.minimum((g + 1) * group_units, units)
        for u in range(g * group_units, last, UNITS):
            # in a shorter last step, a group reads codes of the next one: their q is masked to 0
            code = codes_tile(
                p0, p1, p2, p3, p4, block, u + tl.arange(0, UNITS), blocks, units, top,
                W0, W1, W2, W3, W4, DROP, ROUNDS, BLOCKS, UNITS,
            )  # fmt: skip
            k = u * 32 + tl.arange(0, UNITS * 32)
            at = t.to(tl.int64)[:, None] * (units * 32) + k[None, :]
            q = tl.load(q_ptr + at, mask=t_in[:, None] & (k < last * 32)[None, :], other=0)
            # codes go up to 255: 128 is subtracted to fit int8, and 128 times the sum of q is added back
            dot = tl.dot(q, tl.trans((code - 128).to(tl.int8)), dot, out_dtype=tl.int32)
        qsum = tl.load(qsum_ptr + t.to(tl.int64) * groups + g, mask=t_in, other=0)
        dot += 128 * qsum[:, None]
        at = ((row // 16).to(tl.int64) * groups + g) * 16 + row % 16
        alpha = tl.load(scale_ptr + at, mask=row // 16 < blocks, other=0.0).to(tl.float32)[None, :]
        zero = tl.load(zero_ptr + at, mask=row // 16 < blocks, other=0).to(tl.int32)[None, :]
        alpha = tl.broadcast_to(alpha, [BT, BLOCKS * 16])
        qs = tl.broadcast_to(qsum.to(tl.float32)[:, None], [BT, BLOCKS * 16])
        if WIDE:
            whole = (dot * (1 << (8 - BITS)) - zero * qsum[:, None]).to(tl.float32)
            acc = tl.fma(alpha, whole + mid * qs, acc)
        else:
            acc = tl.fma(alpha * (1 << (8 - BITS)), dot.to(tl.float32), acc)
            acc = tl.fma(alpha * (mid - zero.to(tl.float32)), qs, acc)
    s = tl.load(s_ptr + t, mask=t_in, other=0.0)[:, None]
    bias = tl.zeros([BLOCKS * 16], dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row, mask=row < out, other=0.0)
    shape: tl.constexpr = [BT, BLOCKS * 16]
    y = tl.fma(acc, tl.broadcast_to(s, shape), tl.broadcast_to(bias[None, :], shape))
    at = t.to(tl.int64)[:, None] * out + row[None, :]
    tl.store(y_ptr + at, canonical(y), mask=t_in[:, None] & (row < out)[None, :])
