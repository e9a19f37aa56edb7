"""Triton kernel of op `matryoshka_slice`: bit planes to the codes of a slice."""

import triton
import triton.language as tl

from gemmascope_fast.kernels.planes import codes_tile


@triton.jit
def matryoshka_slice_kernel(
    p0,  # uint8 [blocks, units, 64 * W0]
    p1,
    p2,
    p3,
    p4,
    code_ptr,  # uint8 [out, width]
    out,
    width,
    blocks,
    units,
    top,  # the slice's largest code, if it rounds
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    W4: tl.constexpr,
    DROP: tl.constexpr,
    ROUNDS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """A program: UNITS units of one block of 16 rows."""
    steps = tl.cdiv(units, UNITS)
    pid = tl.program_id(0)
    block = pid // steps + tl.arange(0, 1)
    unit = (pid % steps) * UNITS + tl.arange(0, UNITS)
    code = codes_tile(p0, p1, p2, p3, p4, block, unit, blocks, units, top, W0, W1, W2, W3, W4, DROP, ROUNDS, 1, UNITS)
    row = (pid // steps) * 16 + tl.arange(0, 16)
    k = (pid % steps) * (UNITS * 32) + tl.arange(0, UNITS * 32)
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    tl.store(code_ptr + at, code.to(tl.uint8), mask=(row < out)[:, None] & (k < width)[None, :])
