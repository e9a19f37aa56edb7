"""Launchers of decode and of the sampled dots for its backward. They use no float atomics.

The gradient of decode with respect to W_dec is decode again, on the transposed pattern (see ops/decode.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu.encode import FixedLatents, widenable
from gemmascope_fast.backends.gpu.launch import cdiv, check_devices, grid, kernels, on
from gemmascope_fast.ops.decode import check_decode
from gemmascope_fast.ops.sampled_dot import check_sampled_dot

AHEAD = 4  # rows in flight: 4 x 4 bytes x 32 lanes a warp, times the warps of an SM, hide DRAM latency
MANY = 16  # the same if a row has this many entries left: 16 columns' loads a thread of 4 warps are 64 registers
ORDERED_ROWS = 4096  # from here start the longest rows first: in a gradient of W_dec lengths differ by hundreds
PAIRS = 16  # pairs of a sampled-dot program: [16, 16] lanes are 2 accumulators a thread of 4 warps
SHARES = 4  # programs per row of sampled dots; a row has about 80 pairs


@dataclass(frozen=True)
class DecodeConfig:
    BLOCK: int
    warps: int


# Few rows: narrow blocks, so that one token's row uses the whole device (2304 / 64 = 36 programs a token).
# Many rows: wide blocks, 4 columns a thread, so that a row is read in 128-bit loads.
CONFIGS = (DecodeConfig(64, 1), DecodeConfig(512, 4))
FEW_ROWS = 32


def config_for(N: int) -> DecodeConfig:
    return CONFIGS[0] if N <= FEW_ROWS else CONFIGS[1]


def decode(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Op `decode` (see ops/decode.py) in Triton: the same bytes as the native CPU kernel.

    Checking the pattern reads it back to the host once, as in the native op; `decode_fixed` does not.
    """
    check_devices(W_dec, crow_indices, col_indices, values, b_dec, row_scale)  # before anything is read back
    check_decode(crow_indices, col_indices, values, W_dec, b_dec, row_scale)
    return _launch(crow_indices, col_indices, values, W_dec, b_dec, row_scale)


def decode_fixed(
    latents: FixedLatents, W_dec: Tensor, b_dec: Tensor | None = None, row_scale: Tensor | None = None
) -> Tensor:
    """Decode without any host synchronisation; rows beyond the capacity become NaN."""
    arguments = (latents.crow_indices, latents.col_indices, latents.values, W_dec, b_dec, row_scale)
    check_decode(*arguments, pattern=False)
    return _launch(*arguments)


def _launch(crow: Tensor, col: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, row_scale: Tensor | None):
    module = kernels("decode", W_dec, crow, col, values, b_dec, row_scale)
    N, d = crow.numel() - 1, W_dec.shape[1]
    out = torch.empty(N, d, device=W_dec.device)
    if out.numel() == 0:
        return out
    rows, config, crow = W_dec.contiguous(), config_for(N), crow.contiguous()
    scale = None if row_scale is None else row_scale.float().contiguous()
    bias = None if b_dec is None else b_dec.float().contiguous()
    # otherwise the longest rows could start last, and the rest of the device would be idle
    order = crow.diff().argsort(descending=True) if N >= ORDERED_ROWS else crow
    with on(W_dec):
        module.decode_kernel[grid(N * cdiv(d, config.BLOCK), "decode")](
            crow, col.contiguous(), values.float().contiguous(), rows,
            out if scale is None else scale, out if bias is None else bias, order, out, N, d,
            col.numel(),
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_ORDER=order is not crow,
            BLOCK=config.BLOCK, AHEAD=AHEAD, MANY=MANY,
            num_warps=config.warps, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def sampled_dot(x: Tensor, rows: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """Op `sampled_dot` (see ops/sampled_dot.py) in Triton: the same bytes as the native CPU kernel."""
    check_devices(x, rows, bias, crow_indices, col_indices)
    check_sampled_dot(x, rows, bias, crow_indices, col_indices)
    module = kernels("sampled_dot", x, rows, bias, crow_indices, col_indices)
    N, F = x.shape[0], rows.shape[0]
    out = torch.empty(col_indices.numel(), device=x.device)
    if out.numel() == 0:
        return out
    with on(x):
        module.sampled_dot_kernel[grid(N * SHARES, "sampled_dot")](
            widenable(x), rows.contiguous(), out if bias is None else bias.float().contiguous(),
            crow_indices.contiguous(), col_indices.contiguous(), out, N, F, x.shape[1], SHARES,
            HAS_BIAS=bias is not None, PAIRS=PAIRS,
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out
