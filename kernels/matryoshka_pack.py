"""Triton kernel of op `matryoshka_pack`: codes to bit planes (layout: gemmascope_fast/quant/planes.py)."""

import triton
import triton.language as tl


@triton.jit
def store_plane(plane_ptr, code, tile, there, LEFT: tl.constexpr, WIDTH: tl.constexpr, UNITS: tl.constexpr):
    """WIDTH bits of code int32 [UNITS, 8, 64], with LEFT bits below them -> 64 * WIDTH bytes at tile [UNITS]."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    field = tl.reshape((code >> LEFT) & ((1 << WIDTH) - 1), [UNITS, WIDTH, PER_BYTE, 64])
    shift = (tl.arange(0, PER_BYTE) * WIDTH)[None, None, :, None]
    folded = tl.sum(field << shift, axis=2)  # fields do not overlap, so the sum is exact in any order
    v = tl.arange(0, WIDTH)
    at = (tile * (64 * WIDTH))[:, None, None] + (v * 64)[None, :, None] + tl.arange(0, 64)[None, None, :]
    tl.store(plane_ptr + at, folded.to(tl.uint8), mask=there[:, None, None])


@triton.jit
def matryoshka_pack_kernel(
    code_ptr,  # uint8 [out, width]
    p0,  # uint8 [blocks, units, 64 * W0]
    p1,
    p2,
    p3,
    p4,
    out,
    width,
    units,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    W4: tl.constexpr,
    UNITS: tl.constexpr,
):
    """A program: UNITS units of one block of 16 rows; width 0 means that there is no such plane."""
    steps = tl.cdiv(units, UNITS)
    pid = tl.program_id(0)
    row = (pid // steps) * 16 + tl.arange(0, 16)
    k = (pid % steps) * (UNITS * 32) + tl.arange(0, UNITS * 32)
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    code = tl.load(code_ptr + at, mask=(row < out)[:, None] & (k < width)[None, :], other=0).to(tl.int32)
    # [lane, unit, quad, c] -> [unit, quad, lane, c]
    code = tl.reshape(tl.permute(tl.reshape(code, [16, UNITS, 8, 4]), [1, 2, 0, 3]), [UNITS, 8, 64])
    unit = (pid % steps) * UNITS + tl.arange(0, UNITS)
    tile = (pid // steps).to(tl.int64) * units + unit
    there = unit < units
    store_plane(p0, code, tile, there, W1 + W2 + W3 + W4, W0, UNITS)
    if W1 > 0:
        store_plane(p1, code, tile, there, W2 + W3 + W4, W1, UNITS)
    if W2 > 0:
        store_plane(p2, code, tile, there, W3 + W4, W2, UNITS)
    if W3 > 0:
        store_plane(p3, code, tile, there, W4, W3, UNITS)
    if W4 > 0:
        store_plane(p4, code, tile, there, 0, W4, UNITS)
