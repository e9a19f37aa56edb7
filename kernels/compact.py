"""Triton kernels of the compaction: convert bitmap words, counts and value slots to compressed sparse rows.

For many tokens, `torch.cumsum` of the counts runs between the two kernels; for few, `gather_kernel` itself sums the
counts before its own words, which saves a launch.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.lanes import canonical, dot_tile


@triton.jit
def sum_before(count_ptr, end, BLOCK: tl.constexpr):
    """Sum of count[0 : end] as int64."""
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for i in range(0, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(count_ptr + at, mask=at < end, other=0).to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def gather_kernel(
    x_ptr,  # [T, d], read only if a word overflowed its slots
    w_ptr,  # [F, d], same
    bias_ptr,  # fp32 [F], same
    threshold_ptr,  # fp32 [F], read if LIFT
    bitmap_ptr,  # int32 [T, words]
    count_ptr,  # int32 [T, words]
    total_ptr,  # int64 [T * words], inclusive sums of the counts; read if not SCAN
    slot_ptr,  # fp32 [T, words, SLOTS]
    crow_ptr,  # int64 [T + 1]
    col_ptr,  # int32 [capacity]
    value_ptr,  # fp32 [capacity]
    T,
    F,
    d,
    words,
    capacity,
    SCAN: tl.constexpr,
    LIFT: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    # one program: WORDS words of one token
    groups = tl.cdiv(words, WORDS)
    pid = tl.program_id(0)
    t = pid // groups
    first = (pid % groups) * WORDS
    word = first + tl.arange(0, WORDS)
    w_in = word < words
    row = t.to(tl.int64) * words
    count = tl.load(count_ptr + row + word, mask=w_in, other=0)
    if SCAN:
        base = sum_before(count_ptr, row + first, 1024)
    else:
        before = row + first
        base = tl.load(total_ptr + before - 1, mask=before > 0, other=0)
    if first == 0:
        tl.store(crow_ptr + t, base)
    if (t == T - 1) & (first + WORDS >= words):
        tl.store(crow_ptr + T, base + tl.sum(count, axis=0).to(tl.int64))

    start = base + (tl.cumsum(count, axis=0) - count).to(tl.int64)
    bit = tl.arange(0, 32)
    bits = tl.load(bitmap_ptr + row + word, mask=w_in, other=0)
    hit = (bits[:, None] >> bit[None, :]) & 1
    rank = tl.cumsum(hit, axis=1) - 1
    at = start[:, None] + rank
    stored = (hit != 0) & (at < capacity)
    tl.store(col_ptr + at, word[:, None] * 32 + bit[None, :], mask=stored)
    in_slot = stored & (rank < SLOTS)
    value = tl.load(slot_ptr + (row + word)[:, None] * SLOTS + rank, mask=in_slot, other=0.0)
    tl.store(value_ptr + at, value, mask=in_slot)

    if tl.max(count, axis=0) > SLOTS:
        redo_words(
            x_ptr, w_ptr, bias_ptr, threshold_ptr, bitmap_ptr, count_ptr, value_ptr, t, first, base, T, F, d, words,
            capacity, LIFT, SLOTS, WORDS,
        )  # fmt: skip


@triton.jit
def redo_words(
    x_ptr, w_ptr, bias_ptr, threshold_ptr, bitmap_ptr, count_ptr, value_ptr, t, first, base, T, F, d, words, capacity,
    LIFT: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The values beyond the slots: recomputes the word's dots in the same order, so the bytes are the same.

    LIFT: the bitmap comes from tensor cores, so a pair may have fired whose exact dot does not. Its value then becomes
    the next float above the threshold, which is between the two dots.
    """
    bit = tl.arange(0, 32)
    row = t.to(tl.int64) * words
    start = base
    for i in range(0, WORDS):
        word = first + i
        if word < words:
            count = tl.load(count_ptr + row + word)
            if count > SLOTS:
                f = word * 32 + bit
                z = dot_tile(x_ptr, w_ptr, t + tl.arange(0, 1), f, T, F, d, 1, 32)
                z += tl.load(bias_ptr + f, mask=f < F, other=0.0)[None, :]
                if LIFT:
                    theta = tl.maximum(tl.load(threshold_ptr + f, mask=f < F, other=0.0), 0.0)[None, :]
                    above = (theta.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
                    z = tl.where(z <= theta, above, z)
                hit = (tl.load(bitmap_ptr + row + word) >> bit) & 1
                rank = tl.cumsum(hit, axis=0) - 1
                at = start + rank
                late = (hit != 0) & (rank >= SLOTS) & (at < capacity)
                tl.store(value_ptr + at[None, :], canonical(z), mask=late[None, :])
            start += count
