"""Constants and checks shared by the ops on bit planes. gemmascope_fast/quant/planes.py describes the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import row_indices

ROWS = 16  # rows of a block: the int32 lanes of a 512-bit register
UNIT = 32  # weights of one row that are stored together in a plane: the smallest group

# Planes that store a code of this many bits.  Those for 2, 3, 4 and 6 bits are the first planes of those for 8.
WIDTHS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (2, 1, 1),
    5: (2, 1, 1, 1),
    6: (2, 1, 1, 2),
    7: (2, 1, 1, 2, 1),
    8: (2, 1, 1, 2, 2),
}

PREFIX, MATQUANT, EXTRA = 0, 1, 2  # `rule`: what happens to stored bits below the slice


def rule_of(mode: str, extra_precision: bool = False) -> int:
    """The `rule` number for a slicing mode."""
    return PREFIX if mode == "prefix" else EXTRA if extra_precision else MATQUANT


def mode_of(rule: int) -> str:
    return "prefix" if rule == PREFIX else "matquant"


def stored_bits(planes: Sequence[Tensor]) -> int:
    # int(): the planes' widths are constants under dynamic shapes too
    return sum(int(p.shape[-1]) for p in planes) // 64


def check_planes(planes: Sequence[Tensor], out_features: int, in_features: int, bits: int, rule: int) -> None:
    """Raise ValueError for wrong shapes of planes, or a width or rule they lack; TypeError for a wrong dtype."""
    blocks, units = -(-out_features // ROWS), -(-in_features // UNIT)
    stored = stored_bits(planes)
    if not 1 <= bits <= stored <= 8:
        raise ValueError(f"bits: expected a width from 1 to the {stored} stored, got {bits}")
    if rule not in (PREFIX, MATQUANT, EXTRA):
        raise ValueError(f"rule: expected 0, 1 or 2, got {rule}")
    if [p.shape for p in planes] != [(blocks, units, 64 * w) for w in WIDTHS[stored]]:
        shapes = [tuple(p.shape) for p in planes]
        raise ValueError(f"planes: expected {out_features} × {in_features} in {stored} bits, got {shapes}")
    for p in planes:
        if p.dtype != torch.uint8:
            raise TypeError(f"planes: expected uint8, got {p.dtype}")


def check_scales(scale: Tensor, zero_point: Tensor, out_features: int, in_features: int, group_size: int) -> None:
    """ValueError if groups are not whole units, or scales and zero points are not [out/16, groups, 16]."""
    if group_size < 0 or group_size % UNIT:
        raise ValueError(f"group_size: expected 0 or a multiple of {UNIT}, got {group_size}")
    groups = -(-in_features // group_size) if group_size else 1
    shape = (-(-out_features // ROWS), groups, ROWS)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if scale.dtype not in (torch.float16, torch.float32):
        raise TypeError(f"scale: expected float16 or float32, got {scale.dtype}")
    if zero_point.dtype != torch.uint8:
        raise TypeError(f"zero_point: expected uint8, got {zero_point.dtype}")


def unblocked(value: Tensor, rows: int) -> Tensor:
    """[out/16, groups, 16] → [out, groups]."""
    return value.transpose(1, 2).reshape(-1, value.shape[1])[:rows]


def add_overflow(code: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """r-bit codes, with one added to the weights in the list."""
    code = code.clone()
    code[row_indices(crow), col.long()] += 1
    return code
