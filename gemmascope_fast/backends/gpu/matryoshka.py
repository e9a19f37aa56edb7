"""Launcher of matryoshka_linear: nested codes at any width times int8 activations, on integer tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu.launch import cdiv, grid, kernels, on
from gemmascope_fast.backends.gpu.planes import five, middle, top_code, widths_of
from gemmascope_fast.errors import BackendError
from gemmascope_fast.ops._library import requested
from gemmascope_fast.ops._planes import PREFIX, stored_bits
from gemmascope_fast.ops.matryoshka_linear import check, matryoshka_linear_reference, quantize_tokens


@dataclass(frozen=True)
class MatryoshkaConfig:
    BT: int
    BLOCKS: int
    warps: int


# Up to 16 tokens it is limited by memory bandwidth: 16 outputs a program are 576 programs for 9,216 outputs.  With
# more tokens, tokens share an unpacked tile.
CONFIGS = (MatryoshkaConfig(16, 1, 1), MatryoshkaConfig(64, 4, 8))
UNITS = 2  # units of 32 columns per step: an int8 tensor-core product takes 64 columns


# The CUDA C++ kernel can run up to 16 tokens, and is used up to 4: dp4a costs a quarter of an instruction per weight
# and token; at 8 tokens and 4 bits the integer units would be the limit, not bandwidth (modelled by dev/gpu/nvcc.py).
CUDA_TOKENS, CUDA_PREFERRED = 16, 4
CUDA_BITS = (2, 3, 4, 6, 8)  # bits of the planes read; they must be the first planes of a nested code


def cuda_refuses(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    overflow_crow: Tensor | None,
    overflow_col: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    rule: int,
    exact: bool,
) -> str | None:
    """Why the CUDA C++ kernel cannot run this call, or None if it can."""
    if exact:
        return "fp32 activations"
    if overflow_crow is not None:
        return "an overflow list"
    if x.shape[0] > CUDA_TOKENS:
        return f"{x.shape[0]} tokens, more than {CUDA_TOKENS}"
    read, _ = planes_of([p.shape[-1] // 64 for p in planes], stored_bits(planes), bits, rule)
    return None if read in CUDA_BITS else f"planes of {read} bits, which are not the first ones of a nested code"


def config_for(T: int) -> MatryoshkaConfig:
    return CONFIGS[0] if T <= 16 else CONFIGS[1]


def matryoshka_linear(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    overflow_crow: Tensor | None,
    overflow_col: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    rule: int,
    exact: bool,
) -> Tensor:
    """Op `matryoshka_linear` in Triton, int8 activations: the same bytes as the native kernel.

    fp32 activations (`exact`) and flat copies with an overflow list have no GPU kernel. They run on the reference, and
    raise BackendError if Triton was requested by name.
    """
    if exact or overflow_crow is not None:
        if requested() == "triton":
            what = "fp32 activations" if exact else "an overflow list"
            raise BackendError(f"backend 'triton' cannot run matryoshka_linear with {what}")
        return matryoshka_linear_reference(
            x, planes, scale, zero_point, bias, mean, overflow_crow, overflow_col, out_features, group_size, bits,
            rule, exact,
        )  # fmt: skip
    check(x, planes, scale, zero_point, bias, mean, out_features, group_size, bits, rule)
    module = kernels("matryoshka_linear", x, *planes, scale, zero_point, bias, mean)
    T, width = x.shape
    y = torch.empty(T, out_features, device=x.device)
    if y.numel() == 0:
        return y
    units, blocks = cdiv(width, 32), cdiv(out_features, 16)
    group_units = group_size // 32 if group_size else max(1, units)
    q, s = quantize_tokens(x.float() if mean is None else x.float() - mean.float())
    # q keeps the strides of x, and padding by 0 does not copy
    q = torch.nn.functional.pad(q, (0, units * 32 - width)).contiguous()
    groups = scale.shape[1]
    padded = torch.nn.functional.pad(q, (0, groups * group_units * 32 - units * 32))
    sums = padded.reshape(T, groups, -1).sum(2, dtype=torch.int32).contiguous()
    stored = stored_bits(planes)
    widths = [p.shape[2] // 64 for p in planes]
    read, used = planes_of(widths, stored, bits, rule)
    config = config_for(T)
    with on(x):
        module.matryoshka_linear_kernel[grid(cdiv(blocks, config.BLOCKS) * cdiv(T, config.BT), "matryoshka_linear")](
            q, s, sums, *five(planes[:used]), scale.contiguous(), zero_point.contiguous(),
            y if bias is None else bias.float().contiguous(), y,
            T, out_features, blocks, units, groups, group_units,
            top_code(bits, rule), middle(bits, rule), **widths_of(tuple(widths[:used])),
            BITS=bits, DROP=read - bits, ROUNDS=rule != PREFIX and read > bits, WIDE=group_units > 16,
            HAS_BIAS=bias is not None, BLOCKS=config.BLOCKS, UNITS=1 if group_units == 1 else UNITS, BT=config.BT,
            num_warps=config.warps, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def planes_of(widths: list[int], stored: int, bits: int, rule: int) -> tuple[int, int]:
    """(bits in the planes that a slice reads, number of planes): whole planes, and one more bit if it rounds."""
    need = bits if rule == PREFIX or bits == stored else bits + 1
    read = used = 0
    while read < need and used < len(widths):
        read, used = read + widths[used], used + 1
    return read, used
