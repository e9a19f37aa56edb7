"""Triton kernel of exact op `encode`: one program per tile of BT tokens and 32 features.

The epilogue adds the bias, compares with the threshold in registers and writes, per token and word of 32
features, one bitmap word, the count and up to SLOTS values.  If a word has more than SLOTS hits,
`compact.gather_kernel` computes its values again, so nothing is lost.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.lanes import canonical, dot_tile


@triton.jit
def fires(z, theta, half_bandwidth, HAS_BANDWIDTH: tl.constexpr):
    """z > max(theta, 0), or z is NaN; with a bandwidth also |z - theta| < half of it."""
    keep = (z > tl.maximum(theta, 0.0)) | (z != z)  # noqa: PLR0124  NaN
    if HAS_BANDWIDTH:
        keep = keep | (tl.abs(z - theta) < half_bandwidth)
    return keep


@triton.jit
def write_hits(
    z, keep, t, word, T, words, bitmap_ptr, count_ptr, slot_ptr,
    SLOTS: tl.constexpr, BT: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """z, keep: [BT, 32 * WORDS] of tokens t [BT] and consecutive words of features, word [WORDS].

    bitmap_ptr, count_ptr: int32 [T, words]; slot_ptr: fp32 [T, words, SLOTS].
    """
    hit = tl.reshape(keep.to(tl.int32), [BT, WORDS, 32])
    at = t.to(tl.int64)[:, None] * words + word[None, :]
    inside = (t < T)[:, None] & (word < words)[None, :]
    tl.store(bitmap_ptr + at, tl.sum(hit << tl.arange(0, 32)[None, None, :], axis=2), mask=inside)
    tl.store(count_ptr + at, tl.sum(hit, axis=2), mask=inside)
    rank = tl.cumsum(hit, axis=2) - 1
    value = tl.reshape(canonical(z), [BT, WORDS, 32])
    stored = (hit != 0) & inside[:, :, None] & (rank < SLOTS)
    tl.store(slot_ptr + at[:, :, None] * SLOTS + rank, value, mask=stored)


@triton.jit
def encode_kernel(
    x_ptr,  # [T, d] fp32, bf16 or fp16
    w_ptr,  # [F, d] fp32, bf16 or fp16: the encoder's rows
    bias_ptr,  # fp32 [F]
    threshold_ptr,  # fp32 [F], finite
    bitmap_ptr,  # int32 [T, words]
    count_ptr,  # int32 [T, words]
    slot_ptr,  # fp32 [T, words, SLOTS]
    T,
    F,
    d,
    words,
    half_bandwidth,
    HAS_BANDWIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BT: tl.constexpr,
):
    # tokens vary fastest, so that all programs that read one block of weights run at about the same time
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    word = pid // blocks
    t = (pid % blocks) * BT + tl.arange(0, BT)
    f = word * 32 + tl.arange(0, 32)
    f_in = f < F
    z = dot_tile(x_ptr, w_ptr, t, f, T, F, d, BT, 32)
    z += tl.load(bias_ptr + f, mask=f_in, other=0.0)[None, :]
    theta = tl.load(threshold_ptr + f, mask=f_in, other=0.0)[None, :]
    keep = fires(z, theta, half_bandwidth, HAS_BANDWIDTH) & f_in[None, :]
    write_hits(z, keep, t, word + tl.arange(0, 1), T, words, bitmap_ptr, count_ptr, slot_ptr, SLOTS, BT, 1)
