"""Nested 8-bit codes: asymmetric min–max quantisation, and slices of the codes to 1 … 8 bits.

A weight w of a group with scale α and zero point z has the code q = clamp(round(w/α) + z, 0, 255).  A slice to r bits
keeps α and z, and places its code on the 8-bit grid as follows:

* "matquant", exactly the slice of Matryoshka Quantization:
  S(q, r) = clamp(floor(q / 2^(8−r) + 1/2), 0, 2^r − 1) · 2^(8−r); "extra precision" omits the clamp.  It rounds,
  so it needs bit 8−r−1 of q, and rounding twice (8 → 4 → 2) differs from rounding once.
* "prefix", mid-rise: (q >> (8−r)) · 2^(8−r) + (2^(8−r) − 1)/2. It keeps the first r bits of q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.ops._planes import UNIT

MODES = ("prefix", "matquant")
# below 2^-14 float16 has steps of 2^-24: if a row's largest scale is below this, its grid would be coarser by 1/64
NARROW = 2.0**-18


def check_bits(bits: int, name: str = "bits") -> int:
    """Return `bits`; ValueError if not in 1 … 8, TypeError if not an integer."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name}: expected an integer from 1 to 8, got {bits!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"{name}: expected a width from 1 to 8, got {bits}")
    return bits


def check_mode(mode: str, extra_precision: bool = False) -> str:
    """Return `mode`; ValueError unless it is "prefix" or "matquant", or for extra precision with "prefix"."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if extra_precision and mode != "matquant":
        raise ValueError('extra_precision: expected mode "matquant"; a prefix slice has no clamp to omit')
    return mode


def slice_codes(q: Tensor, bits: int, mode: str = "prefix", extra_precision: bool = False) -> Tensor:
    """8-bit codes (uint8, any shape) → r-bit codes (uint8) in 0 … 2^r − 1; with extra precision 2^r is possible too."""
    check_bits(bits)
    check_mode(mode, extra_precision)
    if q.dtype != torch.uint8:
        raise TypeError(f"q: expected uint8 codes, got {q.dtype}")
    if bits == 8:
        return q
    if mode == "prefix":
        return q >> (8 - bits)
    top = 1 << bits if extra_precision else (1 << bits) - 1
    return ((q.to(torch.int16) + (1 << (7 - bits))) >> (8 - bits)).clamp(max=top).to(torch.uint8)


def offset(bits: int, mode: str) -> float:
    """What the "prefix" slice adds on the 8-bit grid: the middle of the dropped bits. 0 for "matquant"."""
    return ((1 << (8 - bits)) - 1) / 2 if mode == "prefix" else 0.0


def grid(sliced: Tensor, bits: int, mode: str = "prefix") -> Tensor:
    """r-bit codes → their position on the 8-bit grid, fp32, exact (a multiple of 1/2)."""
    return sliced.float() * (1 << (8 - bits)) + offset(bits, mode)


@dataclass(frozen=True)
class Codes:
    """A weight matrix stored as nested codes.

    q uint8 [out_features, in_features]; scale float16 or float32 and zero_point uint8, both [out_features, groups];
    group_size: number of weights of a row that share a scale (the last group may be shorter); None: one group a row.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.q.dtype != torch.uint8 or self.q.dim() != 2:
            raise ValueError(f"q: expected uint8 [out_features, in_features], got {self.q.dtype} {tuple(self.q.shape)}")
        check_group_size(self.group_size)
        want = (self.q.shape[0], group_count(self.q.shape[1], self.group_size))
        if self.scale.dtype not in (torch.float16, torch.float32):
            raise TypeError(f"scale: expected float16 or float32, got {self.scale.dtype}")
        if self.zero_point.dtype != torch.uint8:
            raise TypeError(f"zero_point: expected uint8, got {self.zero_point.dtype}")
        for name, tensor in (("scale", self.scale), ("zero_point", self.zero_point)):
            if tensor.shape != want:
                raise ValueError(
                    f"{name}: expected {want} for codes {tuple(self.q.shape)}"
                    f" in groups of {self.group_size}, got {tuple(tensor.shape)}"
                )

    def per_weight(self, value: Tensor) -> Tensor:
        """Spread each group's value [out_features, groups] over its weights [out_features, in_features]."""
        return spread(value, self.group_size, self.q.shape[1])

    def dequantize(self, bits: int = 8, mode: str = "prefix", extra_precision: bool = False) -> Tensor:
        """The weights of the slice to `bits`, fp32 [out_features, in_features]: α · (grid − z)."""
        level = grid(slice_codes(self.q, bits, mode, extra_precision), bits, mode)
        return self.per_weight(self.scale.float()) * (level - self.per_weight(self.zero_point.float()))


def check_group_size(group_size: int | None) -> None:
    """Raise ValueError unless every group is a whole number of units of a plane."""
    if group_size is not None and (group_size <= 0 or group_size % UNIT):
        raise ValueError(f"group_size: expected None (per channel) or a positive multiple of {UNIT}, got {group_size}")


def group_count(in_features: int, group_size: int | None) -> int:
    return 1 if group_size is None else -(-in_features // group_size)


def spread(value: Tensor, group_size: int | None, width: int) -> Tensor:
    """Each weight's group value, [out_features, width], from [out_features, groups]."""
    if group_size is None:
        return value.expand(-1, width)
    return value.repeat_interleave(group_size, 1)[:, :width]


def grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """[out_features, in_features] → [out_features, groups, group_size]; a shorter last group is padded with zeros."""
    if group_size is None:
        return weight[:, None, :]
    groups = group_count(weight.shape[1], group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - weight.shape[1]))
    return padded.reshape(-1, groups, group_size)


def group_range(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """(min, max) of each group, with zero included, [out_features, groups]; differentiable."""
    parts = grouped(weight, group_size)
    return parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)


def quantize(
    weight: Tensor,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Codes:
    """Asymmetric min–max codes of weight [out_features, in_features]: α = (high − low)/255, z = round(−low/α).

    low <= 0 <= high [out_features, groups]: a clipped range to use instead of each group's min and max.
    scale_dtype: the default is float32 per channel. For groups it is float16 if that can hold the scales of every row,
    and float32 if all weights of a row are too small for it (below 0.001) or a group's are too large.  α is rounded
    up to this dtype, so rounding the scale clips nothing.  Zero is on the grid.  Raises ValueError for weights that are
    not finite, or if the requested float16 cannot hold the scales.
    """
    check_group_size(group_size)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected a floating matrix, got {weight.dtype} {tuple(weight.shape)}")
    weight = weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight: expected finite values, got NaN or Inf")
    if (low is None) != (high is None):
        raise ValueError("low, high: expected both or neither")
    if low is None or high is None:
        low, high = group_range(weight, group_size)
    scale = (high.float() - low.float()) / 255
    scale = round_up(scale, scale_dtype or dtype_for(scale, group_size))
    zero = (-low.float() / scale.float()).round().clamp(0, 255)
    frame = Codes(torch.zeros(weight.shape, dtype=torch.uint8), scale, zero.to(torch.uint8), group_size)
    q = (weight / frame.per_weight(scale.float())).round() + frame.per_weight(zero)
    return Codes(q.clamp(0, 255).to(torch.uint8), scale, frame.zero_point, group_size)


def quantize_alone(
    weight: Tensor, bits: int, group_size: int | None = None, low: Tensor | None = None, high: Tensor | None = None
) -> Codes:
    """Ordinary min–max codes of `bits` bits, as int2 or int4 are quantised without Matryoshka: the grid spans the
    range with 2^bits − 1 steps.  They are stored on an 8-bit grid that is 2^(8−bits) times finer, so the "matquant"
    slice to `bits` gives the code itself. Scale and zero point are those of the 8-bit grid.
    """
    step, top = 1 << (8 - check_bits(bits)), (1 << bits) - 1
    weight = weight.detach().float()
    if low is None or high is None:
        low, high = group_range(weight, group_size)
    scale = (high - low).float() / top / step
    scale = round_up(scale, dtype_for(scale, group_size))
    coarse = scale.float() * step
    zero = (-low / coarse).round().clamp(0, top)
    frame = Codes(torch.zeros(weight.shape, dtype=torch.uint8), scale, (zero * step).to(torch.uint8), group_size)
    q = (weight / frame.per_weight(coarse)).round() + frame.per_weight(zero)
    return Codes((q.clamp(0, top) * step).to(torch.uint8), scale, frame.zero_point, group_size)


def dtype_for(scale: Tensor, group_size: int | None) -> torch.dtype:
    """Dtype for a matrix's scales [out_features, groups]: float32 per channel; for groups float16 if it can hold
    them."""
    return torch.float32 if group_size is None or _misfit(scale) else torch.float16


def _misfit(scale: Tensor) -> str | None:
    """What is wrong with float16 for these scales; None if it can hold them."""
    widest = scale.amax(-1) if scale.numel() else scale
    if bool((widest > torch.finfo(torch.float16).max).any()):
        return "too wide"
    return "too narrow" if bool(((widest > 0) & (widest < NARROW)).any()) else None


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Non-negative fp32 → the smallest positive value of `dtype` that is not below it."""
    if dtype == torch.float32:
        return scale.clamp(min=torch.finfo(torch.float32).tiny)
    if dtype != torch.float16:
        raise TypeError(f"scale_dtype: expected float16 or float32, got {dtype}")
    if wrong := _misfit(scale):
        raise ValueError(f"weight: a row's range is {wrong} for float16 scales; pass scale_dtype=torch.float32")
    near = scale.to(torch.float16)
    # for positive halves, the bit patterns are ordered like the values
    up = torch.where(near.float() < scale, near.view(torch.int16) + 1, near.view(torch.int16)).clamp(min=1)
    return up.to(torch.int16).view(torch.float16)
