"""Op `matryoshka_slice`: bit planes → the codes of a slice to r bits.

The planes hold s ≥ r bits of a code.  "prefix" drops the low s − r bits. "matquant" rounds once and clamps to
2^r − 1, or to 2^r with extra precision.  If s = r, nothing is dropped or rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._library import Cost, register
from gemmascope_fast.ops._planes import EXTRA, PREFIX, ROWS, UNIT, WIDTHS, check_planes, stored_bits

SCHEMA = "matryoshka_slice(Tensor[] planes, int out_features, int in_features, int bits, int rule) -> Tensor"


def matryoshka_slice_reference(
    planes: list[Tensor], out_features: int, in_features: int, bits: int, rule: int
) -> Tensor:
    """planes uint8 [out/16, in/32, 64·width], as many as the slice reads → codes uint8 [out, in].

    rule: 0 prefix, 1 matquant, 2 matquant with extra precision.
    """
    check_planes(planes, out_features, in_features, bits, rule)
    stored = stored_bits(planes)
    code = unpack(tuple(planes), WIDTHS[stored])[:out_features, :in_features]
    return resliced(code, stored, bits, rule).contiguous()


def unpack(planes: tuple[Tensor, ...], widths: tuple[int, ...]) -> Tensor:
    """Planes [blocks, units, 64·width] → codes uint8 [16·blocks, 32·units]."""
    blocks, units = planes[0].shape[:2]
    code = torch.zeros(blocks, units, 8, ROWS, 4, dtype=torch.uint8, device=planes[0].device)
    for plane, width in zip(planes, widths, strict=True):
        per_byte = 8 // width
        shifts = (torch.arange(per_byte, dtype=torch.uint8, device=plane.device) * width).reshape(-1, 1, 1)
        field = (plane.reshape(blocks, units, width, 1, ROWS, 4) >> shifts) & ((1 << width) - 1)
        code = (code << width) | field.reshape(code.shape)
    return code.permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, units * UNIT)


def resliced(codes: Tensor, held: int, bits: int, rule: int) -> Tensor:
    """`held`-bit codes → r-bit codes: the low bits are dropped, or rounded once."""
    if held == bits:
        return codes
    if rule == PREFIX:
        return codes >> (held - bits)
    top = 1 << bits if rule == EXTRA else (1 << bits) - 1
    shift = held - bits
    return ((codes.to(torch.int16) + (1 << (shift - 1))) >> shift).clamp(max=top).to(torch.uint8)


def _fake(planes: list[Tensor], out_features: int, in_features: int, *_: object) -> Tensor:
    return planes[0].new_empty(out_features, in_features)


def _cost(planes: list[Tensor], out_features: int, in_features: int, *_: object) -> Cost:
    return Cost(bytes=sum(p.numel() for p in planes) + out_features * in_features, flops=0)


matryoshka_slice = register(SCHEMA, matryoshka_slice_reference, _fake, _cost)
