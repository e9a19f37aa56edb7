"""Launchers of op `encode_tensor`: encode on tensor cores, within the tolerance that ops/encode_tensor.py derives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu.encode import SLOTS, FixedLatents, Weights, Words, compressed, fixed, widenable
from gemmascope_fast.backends.gpu.launch import cdiv, grid, interpreted, kernels, on
from gemmascope_fast.ops.encode import check_encode
from gemmascope_fast.ops.encode_tensor import rounded


@dataclass(frozen=True)
class TensorConfig:
    BT: int
    BF: int
    step: int  # bytes of a row that one step reads
    warps: int
    stages: int

    def BK(self, dtype: torch.dtype) -> int:
        return self.step // dtype.itemsize


# Up to 16 tokens (the minimum of a tensor-core product) it is limited by memory bandwidth: 32 features a program are
# 512 programs at 16,384.  With more, 64 x 64 pairs are 16 accumulators a thread of 8 warps.
CONFIGS = (TensorConfig(16, 32, 128, 4, 4), TensorConfig(64, 64, 128, 8, 3))


def config_for(T: int) -> TensorConfig:
    return CONFIGS[0] if T <= CONFIGS[0].BT else CONFIGS[1]


def encode_tensor(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Op `encode_tensor` (see ops/encode_tensor.py) in Triton."""
    check_encode(x, W_enc, b_enc, threshold, None)
    return compressed(widenable(x), Weights.of(W_enc, b_enc, threshold), fill_tensor)


def encode_tensor_fixed(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int
) -> FixedLatents:  # fmt: skip
    """The same without host synchronisation, in tensors of the given capacity."""
    check_encode(x, W_enc, b_enc, threshold, None)
    return fixed(widenable(x), Weights.of(W_enc, b_enc, threshold), fill_tensor, capacity)


def fill_tensor(x: Tensor, w: Weights) -> Words:
    module = kernels("encode_tensor", x, w.rows, w.bias, w.threshold)
    (T, d), F = x.shape, w.rows.shape[0]
    near, scale = rounded(x, w.rows.dtype)
    config, out = config_for(T), Words.empty(x, F, lift=True)
    with on(x):
        module.encode_tensor_kernel[grid(cdiv(T, config.BT) * cdiv(F, config.BF), "encode_tensor")](
            near.contiguous(), w.rows, w.bias, w.threshold, w.bias if scale is None else scale, out.bitmap, out.count,
            out.slots, T, F, d, out.bitmap.shape[1],
            HAS_SCALE=scale is not None, SLOTS=SLOTS, BT=config.BT, BF=config.BF, BK=config.BK(near.dtype),
            UPCAST=interpreted(), num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
