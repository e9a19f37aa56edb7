"""Op `matryoshka_pack`: codes of a matrix → bit planes, most significant first (layout: quant/planes.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._library import Cost, register
from gemmascope_fast.ops._planes import ROWS, UNIT, WIDTHS

SCHEMA = "matryoshka_pack(Tensor codes, int stored) -> Tensor[]"


def check_pack(codes: Tensor, stored: int) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes: expected uint8, got {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes: expected [out_features, in_features], got {tuple(codes.shape)}")
    if stored not in WIDTHS:
        raise ValueError(f"stored: expected a width from 1 to 8, got {stored}")


def matryoshka_pack_reference(codes: Tensor, stored: int) -> list[Tensor]:
    """codes uint8 [out, in], of which the low `stored` bits are used → planes uint8 [out/16, in/32, 64·width], one per
    width in WIDTHS[stored]. Rows and columns are padded with code 0.
    """
    check_pack(codes, stored)
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % UNIT, 0, -rows % ROWS))
    # [block, lane, unit, quad, c] → [block, unit, quad, lane, c]
    tiles = padded.reshape(-(-rows // ROWS), ROWS, -(-columns // UNIT), 8, 4).permute(0, 2, 3, 1, 4)
    planes, left = [], stored
    for width in WIDTHS[stored]:
        left -= width
        field = (tiles >> left) & ((1 << width) - 1)
        per_byte = 8 // width
        folded = field.reshape(*tiles.shape[:2], width, per_byte, ROWS, 4)
        shifts = (torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * width).reshape(-1, 1, 1)
        planes.append((folded << shifts).sum(3, dtype=torch.uint8).reshape(*tiles.shape[:2], 64 * width))
    return planes


def _fake(codes: Tensor, stored: int) -> list[Tensor]:
    blocks, units = -(-codes.shape[0] // ROWS), -(-codes.shape[1] // UNIT)
    return [codes.new_empty(blocks, units, 64 * width) for width in WIDTHS[stored]]


def _cost(codes: Tensor, stored: int) -> Cost:
    return Cost(bytes=codes.numel() + codes.numel() * stored // 8, flops=0)


matryoshka_pack = register(SCHEMA, matryoshka_pack_reference, _fake, _cost)
