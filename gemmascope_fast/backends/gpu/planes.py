"""Launchers of the ops that convert between codes, bit planes and weights: pack, slice, dequantise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu.launch import cdiv, grid, kernels, on
from gemmascope_fast.ops._planes import EXTRA, PREFIX, ROWS, UNIT, WIDTHS, check_planes, check_scales, stored_bits
from gemmascope_fast.ops.matryoshka_pack import check_pack

# Units per program: 256 codes of a row are eight sectors of 32 bytes, and 32 registers a thread as 32-bit values.
UNITS = 8
WARPS = 4


def matryoshka_pack(codes: Tensor, stored: int) -> list[Tensor]:
    """Op `matryoshka_pack` (see ops/matryoshka_pack.py) in Triton."""
    check_pack(codes, stored)
    module = kernels("matryoshka_pack", codes)
    out, width = codes.shape
    blocks, units, widths = cdiv(out, ROWS), cdiv(width, UNIT), WIDTHS[stored]
    planes = [torch.empty(blocks, units, 64 * w, dtype=torch.uint8, device=codes.device) for w in widths]
    if blocks * units == 0:
        return planes
    with on(codes):
        module.matryoshka_pack_kernel[grid(blocks * cdiv(units, UNITS), "matryoshka_pack")](
            codes.contiguous(), *five(planes), out, width, units, **widths_of(widths), UNITS=UNITS, num_warps=WARPS,
        )  # fmt: skip
    return planes


def matryoshka_slice(planes: list[Tensor], out_features: int, in_features: int, bits: int, rule: int) -> Tensor:
    """Op `matryoshka_slice` (see ops/matryoshka_slice.py) in Triton."""
    check_planes(planes, out_features, in_features, bits, rule)
    module = kernels("matryoshka_slice", *planes)
    code = torch.empty(out_features, in_features, dtype=torch.uint8, device=planes[0].device)
    if code.numel() == 0:
        return code
    blocks, units, constants = what(planes, bits, rule)
    with on(code):
        module.matryoshka_slice_kernel[grid(blocks * cdiv(units, UNITS), "matryoshka_slice")](
            *five(planes), code, out_features, in_features, blocks, units, top_code(bits, rule), **constants,
            UNITS=UNITS, num_warps=WARPS,
        )  # fmt: skip
    return code


def matryoshka_dequantize(
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int,
    rule: int,
) -> Tensor:
    """Op `matryoshka_dequantize` (see ops/matryoshka_dequantize.py) in Triton: the same bytes as the reference."""
    check_planes(planes, out_features, in_features, bits, rule)
    check_scales(scale, zero_point, out_features, in_features, group_size)
    module = kernels("matryoshka_dequantize", *planes, scale, zero_point)
    weight = torch.empty(out_features, in_features, device=scale.device)
    if weight.numel() == 0:
        return weight
    blocks, units, constants = what(planes, bits, rule)
    group_units = group_size // UNIT if group_size else units
    with on(weight):
        module.matryoshka_dequantize_kernel[grid(blocks * cdiv(units, UNITS), "matryoshka_dequantize")](
            *five(planes), scale.contiguous(), zero_point.contiguous(), weight, out_features, in_features, blocks,
            units, scale.shape[1], group_units, top_code(bits, rule), middle(bits, rule), **constants, BITS=bits,
            UNITS=UNITS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return weight


def what(planes: list[Tensor], bits: int, rule: int) -> tuple[int, int, dict[str, Any]]:
    """Number of blocks and units, and the constants of a slice that reads all planes it is given."""
    stored = stored_bits(planes)
    drop = stored - bits
    constants = {**widths_of(WIDTHS[stored]), "DROP": drop, "ROUNDS": rule != PREFIX and drop > 0}
    return planes[0].shape[0], planes[0].shape[1], constants


def five(planes: list[Tensor]) -> list[Tensor]:
    """One pointer for each plane that a kernel can read; a plane of width 0 is not read."""
    whole = [p.contiguous() for p in planes]
    return whole + whole[:1] * (5 - len(planes))


def widths_of(widths: tuple[int, ...]) -> dict[str, int]:
    return {f"W{i}": widths[i] if i < len(widths) else 0 for i in range(5)}


def top_code(bits: int, rule: int) -> int:
    """The largest code of a slice that rounds."""
    return (1 << bits) - (rule != EXTRA)


def middle(bits: int, rule: int) -> float:
    """What the "prefix" slice adds on the 8-bit grid."""
    return ((1 << (8 - bits)) - 1) / 2 if rule == PREFIX else 0.0
