"""Triton kernel of op `decode`: one program per (row, block of columns); adds features in ascending order with FMA.

The sum of an element has one order, so a long row cannot be split over programs.  Its loads can run ahead: MANY
entries at a time while that many are left, then AHEAD; and `order` starts the longest rows first.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.lanes import canonical


@triton.jit
def added(
    acc, i, there, col_ptr, values_ptr, w_ptr, scale_ptr, d, k, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """acc [BLOCK] plus entry i; unchanged if there is no entry i."""
    feature = tl.load(col_ptr + i, mask=there, other=0).to(tl.int64)
    value = tl.load(values_ptr + i, mask=there, other=0.0)
    if HAS_SCALE:
        value *= tl.load(scale_ptr + feature, mask=there, other=0.0)
    row = tl.load(w_ptr + feature * d + k, mask=k < tl.where(there, d, 0), other=0.0).to(tl.float32)
    # `where` instead of multiplying by 0, because adding +0 would turn -0 into +0
    return tl.where(there, tl.fma(tl.zeros([BLOCK], tl.float32) + value, row, acc), acc)


@triton.jit
def row_sum(
    begin, last, col_ptr, values_ptr, w_ptr, scale_ptr, d, k,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Add entries [begin, last) at columns k [BLOCK] to the sum, in order."""
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    whole = begin + (last - begin) // MANY * MANY
    # rows are loaded before the first is added: their addresses do not depend on the sum
    for i in range(begin, whole, MANY):
        for ahead in tl.static_range(MANY):
            acc = added(acc, i + ahead, i >= 0, col_ptr, values_ptr, w_ptr, scale_ptr, d, k, HAS_SCALE, BLOCK)
    for i in range(whole, last, AHEAD):
        for ahead in tl.static_range(AHEAD):
            there = i + ahead < last
            acc = added(acc, i + ahead, there, col_ptr, values_ptr, w_ptr, scale_ptr, d, k, HAS_SCALE, BLOCK)
    return acc


@triton.jit
def decode_kernel(
    crow_ptr,  # int64 [N+1]
    col_ptr,  # int32 [nnz], ascending within a row
    values_ptr,  # fp32 [nnz]
    w_ptr,  # [F, d] fp32, bf16, fp16 or int8
    scale_ptr,  # fp32 [F], read if HAS_SCALE
    bias_ptr,  # fp32 [d], read if HAS_BIAS
    order_ptr,  # int64 [N], rows in the order in which they start; read if HAS_ORDER
    out_ptr,  # fp32 [N, d]
    N,
    d,
    capacity,  # number of entries in col and values; a row that ends beyond it becomes NaN
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    MANY: tl.constexpr,
):
    # rows vary fastest, so that tokens that share features read the same columns at the same time
    pid = tl.program_id(0)
    n = (pid % N).to(tl.int64)
    if HAS_ORDER:
        n = tl.load(order_ptr + n)
    k = (pid // N) * BLOCK + tl.arange(0, BLOCK)
    inside = k < d
    begin = tl.load(crow_ptr + n)
    end = tl.load(crow_ptr + n + 1)
    fits = end <= capacity
    last = tl.where(fits, end, begin)
    acc = row_sum(begin, last, col_ptr, values_ptr, w_ptr, scale_ptr, d, k, HAS_SCALE, BLOCK, AHEAD, MANY)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=inside, other=0.0)
    acc = tl.where(fits, acc, float("nan"))
    # hardware NaNs have other bytes on NVIDIA than on x86
    tl.store(out_ptr + n * d + k, canonical(acc), mask=inside)
