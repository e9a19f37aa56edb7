"""Triton kernel of op `encode_tensor`: dots on tensor cores, and the epilogue of exact encode.

bf16, fp16 or tf32 products, with fp32 sums in the hardware's order: an inexact mode that must be requested.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.encode import fires, write_hits


@triton.jit
def encode_tensor_kernel(
    x_ptr,  # [T, d] of w's dtype: fp32 (multiplied as tf32), bf16 or fp16
    w_ptr,  # [F, d]
    bias_ptr,  # fp32 [F]
    threshold_ptr,  # fp32 [F], finite
    scale_ptr,  # fp32 [T], what x was divided by; read if HAS_SCALE
    bitmap_ptr,  # int32 [T, words]
    count_ptr,  # int32 [T, words]
    slot_ptr,  # fp32 [T, words, SLOTS]
    T,
    F,
    d,
    words,
    HAS_SCALE: tl.constexpr,
    SLOTS: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, whose 16-bit products are unreliable
):
    # tokens vary fastest, so that all programs that read one block of weights run at about the same time
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    t = (pid % blocks) * BT + tl.arange(0, BT)
    f = (pid // blocks) * BF + tl.arange(0, BF)
    t_in = t < T
    f_in = f < F
    x_row = x_ptr + t.to(tl.int64)[:, None] * d
    w_row = w_ptr + f.to(tl.int64)[:, None] * d
    z = tl.zeros([BT, BF], dtype=tl.float32)
    for k0 in range(0, d, BK):
        k = k0 + tl.arange(0, BK)
        inside = (k < d)[None, :]
        x = tl.load(x_row + k[None, :], mask=t_in[:, None] & inside, other=0.0)
        w = tl.load(w_row + k[None, :], mask=f_in[:, None] & inside, other=0.0)
        if UPCAST:
            z = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), z, input_precision="ieee")
        else:
            z = tl.dot(x, tl.trans(w), z, input_precision="tf32")
    if HAS_SCALE:
        z *= tl.load(scale_ptr + t, mask=t_in, other=0.0)[:, None]
    z += tl.load(bias_ptr + f, mask=f_in, other=0.0)[None, :]
    theta = tl.load(threshold_ptr + f, mask=f_in, other=0.0)[None, :]
    keep = fires(z, theta, 0.0, False) & f_in[None, :] & t_in[:, None]
    WORDS: tl.constexpr = BF // 32
    word = (pid // blocks) * WORDS + tl.arange(0, WORDS)
    write_hits(z, keep, t, word, T, words, bitmap_ptr, count_ptr, slot_ptr, SLOTS, BT, WORDS)
