"""Bit planes in Triton: a tile of codes from the planes that a slice reads (layout: quant/planes.py)."""

import triton
import triton.language as tl


@triton.jit
def plane_field(plane_ptr, block, unit, blocks, units, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr):
    """One plane's bits of BLOCKS x UNITS tiles: int32 [BLOCKS, UNITS, 8, 64], byte 4*lane + c of quad q.

    plane_ptr: uint8 [blocks, units, 64 * WIDTH] (gemmascope_fast/quant/planes.py).
    """
    tile = (block.to(tl.int64)[:, None] * units + unit[None, :]) * (64 * WIDTH)
    there = (block < blocks)[:, None] & (unit < units)[None, :]
    v = tl.arange(0, WIDTH)
    byte = tl.arange(0, 64)
    at = tile[:, :, None, None, None] + (v * 64)[None, None, :, None, None] + byte[None, None, None, None, :]
    seen = tl.load(plane_ptr + at, mask=there[:, :, None, None, None], other=0).to(tl.int32)
    PER_BYTE: tl.constexpr = 8 // WIDTH
    shift = (tl.arange(0, PER_BYTE) * WIDTH)[None, None, None, :, None]
    field = (tl.broadcast_to(seen, [BLOCKS, UNITS, WIDTH, PER_BYTE, 64]) >> shift) & ((1 << WIDTH) - 1)
    return tl.reshape(field, [BLOCKS, UNITS, 8, 64])


@triton.jit
def codes_tile(
    p0, p1, p2, p3, p4, block, unit, blocks, units, top,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, W3: tl.constexpr, W4: tl.constexpr,
    DROP: tl.constexpr, ROUNDS: tl.constexpr, BLOCKS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Codes of the slice, int32 [16 * BLOCKS, 32 * UNITS]; a plane of width 0 is not read."""
    code = plane_field(p0, block, unit, blocks, units, W0, BLOCKS, UNITS)
    if W1 > 0:
        code = (code << W1) | plane_field(p1, block, unit, blocks, units, W1, BLOCKS, UNITS)
    if W2 > 0:
        code = (code << W2) | plane_field(p2, block, unit, blocks, units, W2, BLOCKS, UNITS)
    if W3 > 0:
        code = (code << W3) | plane_field(p3, block, unit, blocks, units, W3, BLOCKS, UNITS)
    if W4 > 0:
        code = (code << W4) | plane_field(p4, block, unit, blocks, units, W4, BLOCKS, UNITS)
    if DROP > 0:
        code = tl.minimum((code + ((1 << DROP) >> 1)) >> DROP, top) if ROUNDS else code >> DROP
    # [block, unit, quad, lane, c] -> [block, lane, unit, quad, c]
    tiles = tl.permute(tl.reshape(code, [BLOCKS, UNITS, 8, 16, 4]), [0, 3, 1, 2, 4])
    return tl.reshape(tiles, [BLOCKS * 16, UNITS * 32])
