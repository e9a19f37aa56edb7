"""Launchers of the screened encode: the same bytes as `gpu.encode`, reading a quarter of the data.

docs/how/screen.md derives the bound; its section "On a GPU" lists the roundings that differ here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gemmascope_fast.backends.gpu.encode import SLOTS, FixedLatents, Weights, Words, compressed, fixed, widenable
from gemmascope_fast.backends.gpu.launch import cdiv, check_devices, grid, kernels, on, refuse_while_capturing
from gemmascope_fast.ops.encode import check_encode
from gemmascope_fast.ops.screen_rows import rows_of, up32
from gemmascope_fast.ops.screen_terms import GPU_ERROR_STEPS, TILE_COLUMNS, TILE_ROWS, Row, U, dot_kappa, table_stride

REFINE_WORDS = 4  # words per refine program: 128 features, of which 2 to 3 remain, so one batch of pairs
PAIRS = 8
DIGITS_BLOCK = 1024


@dataclass(frozen=True)
class ScreenConfig:
    BT: int
    BF: int
    BK: int
    warps: int
    stages: int


# Up to 16 tokens: 32 features a program make 512 programs at 16,384, each with four stages of 4 KiB in flight.  More
# tokens: 64 x 64 pairs, each with two int32 accumulators, take 32 registers a thread of 8 warps.
CONFIGS = (ScreenConfig(16, 32, 128, 4, 4), ScreenConfig(64, 64, 64, 8, 3))
# Tiles of 64 x 32 and 32 x 64 pairs take half the registers but read 1.7 and 1.3 times as much from L2 per product. On
# an A100 (5 KiB a clock), by the model, L2 is then as busy as the tensor cores.  `maxnreg` 128 works on sm_80 only; on
# sm_86, sm_100 and sm_120 the epilogue then spills (168, 32 and 296 bytes).
FEW_WARPS = (
    "bound by tensor cores and L2, whose loads run 3 stages ahead: smaller tiles read up to 1.7 times as much from L2,"
    " and at 128 registers a thread the epilogue spills, but for sm_80"
)


def config_for(T: int) -> ScreenConfig:
    return CONFIGS[0] if T <= CONFIGS[0].BT else CONFIGS[1]


@dataclass(frozen=True)
class SecondDigit:
    """The second digit: w is close to scale * (code - zero) + this scale * this code."""

    code: Tensor  # int8 [F, d]
    scale: Tensor  # fp32 [F]
    error_norm: Tensor  # fp32 [F], error after both digits plus GPU_ERROR_STEPS u of the first's, rounded up


@dataclass(frozen=True)
class ScreenArrays:
    """The screen in the form that the kernels read, on the device of the activations.

    error_norm and row_norm are rounded up. slack is β; it is infinite if the norm of a row is outside [2⁻⁶⁰, 2⁶⁰]
    and not 0, so that such a feature is always computed exactly.
    """

    code: Tensor  # int8 [F, d]: w is close to scale * (code - zero)
    scale: Tensor  # fp32 [F]
    zero: Tensor  # int32 [F]
    error_norm: Tensor  # fp32 [F]
    row_norm: Tensor  # fp32 [F]
    bias: Tensor  # fp32 [F], b_enc + W_enc · centre
    slack: Tensor  # fp32 [F]
    centre: Tensor | None = None  # fp32 [d]
    second: SecondDigit | None = None
    scales: Tensor | None = None  # fp32 [d]: rows and norms are those of W_enc times scales, x is divided by them

    @classmethod
    def of_rows(
        cls,
        code: Tensor,
        code2: Tensor | None,
        table: Tensor,
        centre: Tensor | None,
        shape: tuple[int, int],
        scales: Tensor | None = None,
    ) -> ScreenArrays:
        """Build from the results of op `screen_rows` for W_enc of this shape [d_in, d_sae]: codes by rows, signed.

        Raises ValueError or TypeError if the tensors do not fit the shape, because the device does not check.
        """
        d, F = shape
        _check_rows(code, code2, table, centre, scales, d, F)
        t = table[:, :F]
        # START is infinite if a row is out of range; its other entries are then meaningless
        slack = torch.where(t[Row.START] == torch.inf, torch.inf, t[Row.SLACK])
        second = None
        if code2 is not None and code2.numel():
            error2 = up32(t[Row.ERROR2].double() + GPU_ERROR_STEPS * U * t[Row.ERROR].double())
            second = SecondDigit(_signed(code2, F, d), t[Row.SCALE2].contiguous(), error2)
        zero = t[Row.ZERO].to(torch.int32) - 128
        scale, error, norm, bias = (t[row].contiguous() for row in (Row.SCALE, Row.ERROR, Row.NORM, Row.CENTRED_BIAS))
        centre, scales = (None if v is None else v.contiguous() for v in (centre, scales))
        return cls(_signed(code, F, d), scale, zero, error, norm, bias, slack, centre, second, scales)


def _check_rows(
    code: Tensor, code2: Tensor | None, table: Tensor, centre: Tensor | None, scales: Tensor | None, d: int, F: int
) -> None:
    check_devices(code, code2, table, centre, scales)
    tiled = (cdiv(F, TILE_ROWS), cdiv(d, TILE_COLUMNS), TILE_ROWS, TILE_COLUMNS)
    named: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [("code", code, tiled, torch.uint8)]
    named += [("code2", code2, tiled, torch.uint8)] if code2 is not None and code2.numel() else []
    named += [("centre", centre, (d,), torch.float32)] if centre is not None else []
    named += [("scales", scales, (d,), torch.float32)] if scales is not None else []
    for name, tensor, want, dtype in named:
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.shape != want:
            raise ValueError(f"{name}: expected {want} for d_in = {d}, d_sae = {F}, got {tuple(tensor.shape)}")
    if table.dim() != 2 or table.shape[0] < len(Row) or table.shape[1] != table_stride(F):
        raise ValueError(f"table: expected [{len(Row)} or more, {table_stride(F)}], got {tuple(table.shape)}")


def _signed(tiles: Tensor, F: int, d: int) -> Tensor:
    """uint8 tiles of `screen_rows` → int8 [F, d], minus 128."""
    return (rows_of(tiles)[:F, :d] ^ 128).view(torch.int8).contiguous()


# A screen's codes by rows, kept as long as its tiles: GPU kernels read rows, the tiles are made for CPU cache lines.
_ARRAYS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _arrays(
    device: torch.device,
    W_enc: Tensor,
    code: Tensor,
    code2: Tensor | None,
    table: Tensor,
    centre: Tensor | None,
    scales: Tensor | None,
) -> ScreenArrays:
    """The result of `of_rows` on the device, made once.  The tensors are there, or in host memory with the rows."""
    tensors, fixed_by = (code2, table, centre, scales), (device, W_enc.shape)
    known = _ARRAYS.get(code)
    if known is None or any(a is not b for a, b in zip(known[0], tensors, strict=True)) or known[1] != fixed_by:
        refuse_while_capturing(device, "the screen's codes by rows")
        own = W_enc.device != device and all(t is None or t.device == W_enc.device for t in (code, *tensors))
        there = device if own else code.device
        second, rest, middle, powers = (None if t is None else t.to(there) if own else t for t in tensors)
        assert rest is not None
        made = ScreenArrays.of_rows(code.to(there), second, rest, middle, (W_enc.shape[0], W_enc.shape[1]), powers)
        known = _ARRAYS[code] = (tensors, fixed_by, made)
    return known[2]


def encode_screened(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    code: Tensor,
    code2: Tensor | None,
    table: Tensor,
    centre: Tensor | None,
    digits: int = 0,
    bandwidth: float | None = None,
    directions: Tensor | None = None,
    mapped: bool = False,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Op `encode_screened` (see ops/encode_screened.py) in Triton. It always uses two digits of the activations,
    whatever `digits` is, because the second costs no bytes. It does not use the directions, which would then help
    little. `mapped` has no effect on a device.  The statistics are summed on the device.

    W_enc may be the transposed view of rows [d_sae, d_in] in pinned host memory, with everything else on the device.
    Then the screen's tensors may be in host memory too (they are copied once), and only the rows that the screen leaves
    are read.  Raises StaleScreenError if an exact pre-activation is outside its bound.
    """
    weights = checked(x, W_enc, b_enc, threshold, bandwidth)
    arrays = _arrays(x.device, W_enc, code, code2, table, centre, scales)
    stats = torch.zeros(4, dtype=torch.int64, device=x.device)
    csr = compressed(widenable(x), weights, lambda part, w: fill_screened(part, w, arrays, bandwidth, stats))
    return (*csr, stats)


def encode_screened_fixed(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    code: Tensor,
    code2: Tensor | None,
    table: Tensor,
    centre: Tensor | None,
    capacity: int,
    scales: Tensor | None = None,
) -> FixedLatents:
    """The same without host synchronisation, in tensors of the given capacity: four launches up to 16 tokens, with more
    tokens also a scan.  `FixedLatents.sparse` reads the check of the bound."""
    weights = checked(x, W_enc, b_enc, threshold, None)
    arrays = _arrays(x.device, W_enc, code, code2, table, centre, scales)
    return fixed(widenable(x), weights, lambda part, w: fill_screened(part, w, arrays, None), capacity)


def checked(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None) -> Weights:
    """The encoder in the form that the kernels read.  ValueError or TypeError if the arguments do not fit together."""
    here = W_enc
    if W_enc.device != x.device:
        if not in_host_memory(W_enc):
            raise ValueError(
                f"W_enc: expected a tensor on {x.device} or in pinned host memory, got one on {W_enc.device}"
            )
        if not W_enc.t().is_contiguous():  # a contiguous copy would not be pinned
            raise ValueError("W_enc: expected the transposed view of contiguous rows in pinned host memory")
        here = x.new_empty(1).expand(W_enc.shape)
    check_encode(x, here, b_enc, threshold, bandwidth)
    return Weights.of(W_enc, b_enc, threshold)


def in_host_memory(rows: Tensor) -> bool:
    """Whether a device reads these rows directly from pinned host memory."""
    return rows.device.type == "cpu" and rows.is_pinned()


def fill_screened(
    x: Tensor, w: Weights, s: ScreenArrays, bandwidth: float | None, stats: Tensor | None = None
) -> Words:
    """Digits, screen, exact products: three launches.  x [T, d] → Words.

    Adds to stats int64 [4]: pairs left by the screen, pairs computed exactly, pairs outside the bound, unscreened
    tokens.
    """
    pinned = w.rows.device != x.device
    second_code = None if s.second is None else s.second.code
    module = kernels(
        "screen", x, None if pinned else w.rows, w.bias, w.threshold, s.code, s.scale, second_code, s.centre, s.scales
    )
    (T, d), F = x.shape, w.rows.shape[0]
    stale = torch.zeros(1, dtype=torch.int32, device=x.device)
    out = Words.empty(x, F, stale)
    config, words = config_for(T), out.bitmap.shape[1]
    padded = cdiv(d, config.BK) * config.BK
    high = torch.empty(T, padded, dtype=torch.int8, device=x.device)
    low, candidates, guess = torch.empty_like(high), torch.empty_like(out.bitmap), torch.empty_like(out.slots)
    sums = torch.empty(T, 2, dtype=torch.int32, device=x.device)
    token = torch.empty(T, 3, device=x.device)
    half, second = 0.0 if bandwidth is None else bandwidth / 2, s.second
    groups = cdiv(words, REFINE_WORDS)
    left = torch.empty(2, T, groups, dtype=torch.int32, device=x.device) if stats is not None else stale
    two = (s.code, s.scale, s.error_norm) if second is None else (second.code, second.scale, second.error_norm)
    with on(x):
        module.digits_kernel[grid(T, "digits")](
            x, token if s.centre is None else s.centre, token if s.scales is None else s.scales,
            high, low, sums, token, d, padded, dot_kappa(d), math.sqrt(d) * (1 + 4 * U), 1 + (d + 64) * 2 * U,
            HAS_CENTRE=s.centre is not None, HAS_SCALES=s.scales is not None, BLOCK=DIGITS_BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        module.screen_kernel[grid(cdiv(T, config.BT) * cdiv(F, config.BF), "screen")](
            high, low, sums, token, s.code, s.scale, s.zero, s.error_norm, s.row_norm, s.bias, s.slack, w.threshold,
            candidates, guess, T, F, d, padded, words, half,
            HAS_BANDWIDTH=bandwidth is not None, SLOTS=SLOTS, BT=config.BT, BF=config.BF, BK=config.BK,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip
        module.refine_kernel[grid(T * groups, "refine")](
            x, w.rows, w.bias, w.threshold, s.error_norm, s.row_norm, s.slack, token, candidates, guess,
            high, low, *two, out.bitmap, out.count, out.slots, stale, left, T, F, d, padded, words, half,
            HAS_BANDWIDTH=bandwidth is not None, COUNTS=stats is not None, HAS_SECOND=second is not None, SLOTS=SLOTS,
            WORDS=REFINE_WORDS, PAIRS=PAIRS, BK=64, num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    if stats is not None:
        stats += torch.cat((left.sum((1, 2)), stale.long(), token[:, 2].isinf().sum().reshape(1)))
    return out
