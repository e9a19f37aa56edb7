"""Launchers of exact encode: a GEMM in the fixed order of summation whose epilogue compacts, a scan and a gather.

There are two forms.  `encode` is the op: it reads back one number (how many latents there are) to allocate tensors
of exactly that size.  `encode_fixed` reads nothing back and can be captured in a CUDA graph: its tensors have the
requested capacity, and the true count stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu.launch import cdiv, grid, kernels, on
from gemmascope_fast.errors import BackendError, StaleScreenError
from gemmascope_fast.ops.encode import check_encode
from gemmascope_fast.ops.latents import SparseLatents

SLOTS = 4  # values stored per word of 32 features: at L0 500 of 16,384 (a BOS token) 1 word in 300 holds more
GATHER_WORDS = 16  # words of one gather program: [16, 32] lanes, two a thread of GATHER_WARPS warps
GATHER_WARPS = 8
FEW = 16  # tokens up to which the gather also scans and encode is limited by memory bandwidth
CHUNK_BYTES = 16 << 20  # size of the bitmap; slots take four times as much
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Config:
    """One configuration of a kernel: tile and warps. A kernel has at most four."""

    BT: int
    warps: int
    stages: int


# Tokens per tile.  Up to 16 tokens every weight is read once; with more, 16 x 32 pairs are 64 accumulators a thread.
CONFIGS = (Config(1, 4, 4), Config(4, 4, 4), Config(16, 4, 3))


def config_for(T: int) -> Config:
    return next((c for c in CONFIGS if c.BT >= T), CONFIGS[-1])


@dataclass(frozen=True)
class Words:
    """Output of the encode kernel, per token and word of 32 features."""

    bitmap: Tensor  # int32 [T, words]
    count: Tensor  # int32 [T, words]
    slots: Tensor  # fp32 [T, words, SLOTS]
    stale: Tensor | None = None  # int32 [1], not 0 if the check of the screen's bound failed
    lift: bool = False  # found with tensor cores: a value that is recomputed must stay above its threshold

    @classmethod
    def empty(cls, x: Tensor, F: int, stale: Tensor | None = None, lift: bool = False) -> Words:
        bitmap = torch.empty(x.shape[0], cdiv(F, 32), dtype=torch.int32, device=x.device)
        return cls(bitmap, torch.empty_like(bitmap), torch.empty(*bitmap.shape, SLOTS, device=x.device), stale, lift)

    def read(self, number: Tensor) -> int:
        """Read one int64 scalar and the check of the bound from the device.  StaleScreenError if it failed."""
        if self.stale is None:
            return int(number)
        found, stale = torch.cat((number.reshape(1), self.stale.long())).tolist()
        check_certificate(stale)
        return found


def check_certificate(stale: int) -> None:
    if stale:
        raise StaleScreenError("W_enc: a pre-activation is outside the screen's bound; rebuild the screen")


@dataclass(frozen=True)
class Weights:
    """The encoder in the form that the kernels read."""

    rows: Tensor  # [F, d], fp32, bf16 or fp16, contiguous
    bias: Tensor  # fp32 [F]
    threshold: Tensor  # fp32 [F]

    @classmethod
    def of(cls, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> Weights:
        if W_enc.dtype not in FLOATS:
            raise TypeError(f"W_enc: expected float32, bfloat16 or float16, got {W_enc.dtype}")
        return cls(W_enc.t().contiguous(), b_enc.float().contiguous(), threshold.float().contiguous())


def widenable(x: Tensor) -> Tensor:
    """x in the form that a kernel reads: contiguous fp32, bf16 or fp16 (float64 is rounded to fp32)."""
    return (x if x.dtype in FLOATS else x.float()).contiguous()


def chunk_tokens(F: int) -> int:
    """Tokens per pass, such that the bitmap stays within CHUNK_BYTES and its index fits 31 bits."""
    return max(FEW, CHUNK_BYTES // (4 * max(1, cdiv(F, 32))))


Fill = Callable[[Tensor, Weights], Words]


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Op `encode` (see ops/encode.py) in Triton: the same bytes as the native CPU kernel."""
    check_encode(x, W_enc, b_enc, threshold, bandwidth)
    weights = Weights.of(W_enc, b_enc, threshold)
    return compressed(widenable(x), weights, lambda part, w: fill_words(part, w, bandwidth))


def compressed(x: Tensor, weights: Weights, fill: Fill) -> tuple[Tensor, Tensor, Tensor]:
    """(crow, col, values) of exactly the needed size, computed in chunks of tokens; reads back once per chunk."""
    F = weights.rows.shape[0]
    if x.shape[0] == 0 or F == 0:
        empty = SparseLatents.empty((x.shape[0], F), device=x.device)
        return empty.crow_indices, empty.col_indices, empty.values
    parts = []
    for part in x.split(chunk_tokens(F)):
        words = fill(part, weights)
        total = words.count.flatten().cumsum(0)
        nnz = words.read(total[-1])
        parts.append(SparseLatents(*gather(part, weights, words, total, nnz), (part.shape[0], F)))
    whole = parts[0] if len(parts) == 1 else SparseLatents.cat(parts)
    return whole.crow_indices, whole.col_indices, whole.values


def fill_words(x: Tensor, w: Weights, bandwidth: float | None) -> Words:
    """First launch: computes dots, thresholds, bitmap, counts and slots.  x [T, d] → Words."""
    module = kernels("encode", x, w.rows, w.bias, w.threshold)
    (T, d), F = x.shape, w.rows.shape[0]
    config, out = config_for(T), Words.empty(x, F)
    words = out.bitmap.shape[1]
    with on(x):
        module.encode_kernel[grid(cdiv(T, config.BT) * words, "encode")](
            x, w.rows, w.bias, w.threshold, out.bitmap, out.count, out.slots, T, F, d, words,
            0.0 if bandwidth is None else bandwidth / 2,
            HAS_BANDWIDTH=bandwidth is not None, SLOTS=SLOTS, BT=config.BT,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def gather(x: Tensor, w: Weights, words: Words, total: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Last launch: (crow int64 [T+1], col int32 [capacity], values fp32 [capacity]).

    total: inclusive sums of the counts, int64 [T * words], or None: then the kernel sums them.
    """
    module = kernels("compact", x, words.bitmap)  # rows may be in pinned host memory
    T, count = words.count.shape
    crow = torch.empty(T + 1, dtype=torch.int64, device=x.device)
    col = torch.empty(capacity, dtype=torch.int32, device=x.device)
    value = torch.empty(capacity, device=x.device)
    with on(x):
        module.gather_kernel[grid(T * cdiv(count, GATHER_WORDS), "gather")](
            x, w.rows, w.bias, w.threshold, words.bitmap, words.count, crow if total is None else total, words.slots,
            crow, col, value, T, w.rows.shape[0], x.shape[1], count, capacity,
            SCAN=total is None, LIFT=words.lift, SLOTS=SLOTS, WORDS=GATHER_WORDS,
            num_warps=GATHER_WARPS, num_stages=2, enable_fp_fusion=False,
        )  # fmt: skip
    return crow, col, value


@dataclass(frozen=True)
class FixedLatents:
    """Latents in tensors of a fixed capacity, for CUDA graphs: nothing is read back to the host.

    crow_indices int64 [N+1] has the true offsets, even beyond the capacity; col_indices and values have the first
    `capacity` latents.  If a row does not fit, its decode gives NaN and `sparse()` raises an error.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    d_sae: int
    stale: Tensor | None = None  # of a screened encode: int32 [1], not 0 if the check of its bound failed

    @property
    def capacity(self) -> int:
        return self.col_indices.numel()

    @property
    def count(self) -> Tensor:
        """The true number of latents, int64 scalar on the device."""
        return self.crow_indices[-1]

    @property
    def overflow(self) -> Tensor:
        """Whether some latents did not fit, bool scalar on the device."""
        return self.count > self.capacity

    def sparse(self) -> SparseLatents:
        """Convert to SparseLatents; reads back the count. BackendError if it exceeds the capacity, StaleScreenError if
        the screen does not fit the weights."""
        count, stale = int(self.count), 0 if self.stale is None else int(self.stale)
        check_certificate(stale)
        if count > self.capacity:
            raise BackendError(f"capacity: {count} latents do not fit {self.capacity}; encode again with more")
        shape = (self.crow_indices.numel() - 1, self.d_sae)
        return SparseLatents(self.crow_indices, self.col_indices[:count], self.values[:count], shape)


def encode_fixed(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int) -> FixedLatents:
    """Exact encode without any host synchronisation: two launches up to 16 tokens, with more tokens also a scan."""
    check_encode(x, W_enc, b_enc, threshold, None)
    weights = Weights.of(W_enc, b_enc, threshold)
    return fixed(widenable(x), weights, lambda part, w: fill_words(part, w, None), capacity)


def fixed(x: Tensor, weights: Weights, fill: Fill, capacity: int) -> FixedLatents:
    """Latents of one pass in tensors of the given capacity.  A capacity of T * F cannot overflow."""
    T, F = x.shape[0], weights.rows.shape[0]
    if capacity < 0:
        raise ValueError(f"capacity: expected 0 or more, got {capacity}")
    if T == 0 or F == 0 or chunk_tokens(F) < T:
        raise ValueError(f"x: expected from 1 to {chunk_tokens(F)} tokens for a fixed capacity, got {T}")
    words = fill(x, weights)
    total = None if T <= FEW else words.count.flatten().cumsum(0)
    return FixedLatents(*gather(x, weights, words, total, capacity), F, words.stale)
