"""Triton kernel of the last launch of the fused loop: decode, edit, residual add.

One program per (token, block of columns).  An edit is stored as what it adds to a feature (its delta), as in attach.
The result is base + Σ delta · W_dec over the edited features, in ascending order, where base is the reconstruction
or, with the error term, the activation.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.decode import row_sum
from gemmascope_fast.kernels.lanes import canonical


@triton.jit
def latent_of(feature, begin, end, col_ptr, values_ptr):
    """The value of a feature in a row [begin, end) of ascending features; 0 if it did not fire."""
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if tl.load(col_ptr + middle) < feature:
            low = middle + 1
        else:
            high = middle
    there = low < end
    found = tl.load(col_ptr + low, mask=there, other=-1) == feature
    return tl.load(values_ptr + low, mask=found, other=0.0)


@triton.jit
def delta_of(kind, amount, old):
    """What an edit adds to a latent: SCALE 0, CLAMP 1, ADD 2, MIN_CLAMP 3 (gemmascope_fast/backends/gpu/loop.py)."""
    delta = tl.where(kind == 0, old * amount - old, amount - old)
    delta = tl.where(kind == 2, amount, delta)
    # NaN is not below a minimum, and infinity scaled by one stays
    nothing = ((kind == 3) & ((old < amount) == 0)) | ((kind == 0) & (amount == 1.0))
    return tl.where(nothing, 0.0, delta)


@triton.jit
def splice_kernel(
    x_ptr,  # fp32 [T, d], read if ERROR
    crow_ptr,  # int64 [T+1]
    col_ptr,  # int32 [capacity], ascending within a row
    values_ptr,  # fp32 [capacity]
    w_ptr,  # [F, d] fp32, bf16 or fp16: the decoder's rows
    bias_ptr,  # fp32 [d], read if not ERROR
    feature_ptr,  # int32 [edits], ascending
    kind_ptr,  # int32 [edits]
    amount_ptr,  # fp32 [edits]
    out_ptr,  # fp32 [T, d]
    T,
    d,
    capacity,  # a row that ends beyond it becomes NaN
    edits,
    ERROR: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    MANY: tl.constexpr,
):
    pid = tl.program_id(0)
    t = (pid % T).to(tl.int64)
    k = (pid // T) * BLOCK + tl.arange(0, BLOCK)
    inside = k < d
    begin = tl.load(crow_ptr + t)
    end = tl.load(crow_ptr + t + 1)
    fits = end <= capacity
    last = tl.where(fits, end, begin)
    if ERROR:
        base = tl.load(x_ptr + t * d + k, mask=inside, other=0.0)
    else:
        base = row_sum(begin, last, col_ptr, values_ptr, w_ptr, bias_ptr, d, k, False, BLOCK, AHEAD, MANY)
        base += tl.load(bias_ptr + k, mask=inside, other=0.0)
    extra = tl.zeros([BLOCK], dtype=tl.float32)
    changed = 0
    for e in range(0, edits):
        feature = tl.load(feature_ptr + e).to(tl.int64)
        delta = delta_of(
            tl.load(kind_ptr + e), tl.load(amount_ptr + e), latent_of(feature, begin, last, col_ptr, values_ptr)
        )
        if delta != 0.0:
            row = tl.load(w_ptr + feature * d + k, mask=inside, other=0.0).to(tl.float32)
            extra = tl.fma(tl.zeros([BLOCK], tl.float32) + delta, row, extra)
            changed = 1
    # without a change the base is returned bit for bit, because adding +0 would turn -0 into +0
    out = tl.where(changed != 0, canonical(base + extra), base if ERROR else canonical(base))
    tl.store(out_ptr + t * d + k, tl.where(fits, out, float("nan")), mask=inside)
