"""Triton kernel of op `decode`: one program a (token, block of columns); features ascending, fused multiply-add."""

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    crow_ptr,  # int64 [N+1]
    col_ptr,  # int32 [nnz], ascending within a row
    values_ptr,  # fp32 [nnz]
    w_ptr,  # [F, d] fp32, bf16, fp16 or int8
    scale_ptr,  # fp32 [F], read where HAS_SCALE
    bias_ptr,  # fp32 [d], read where HAS_BIAS
    out_ptr,  # fp32 [N, d]
    N,
    d,
    capacity,  # entries that col and values hold; a row that ends beyond becomes NaN
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    # rows vary fastest: tokens that share features read the same columns at the same time
    pid = tl.program_id(0)
    n = (pid % N).to(tl.int64)
    k = (pid // N) * BLOCK + tl.arange(0, BLOCK)
    inside = k < d
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    begin = tl.load(crow_ptr + n)
    end = tl.load(crow_ptr + n + 1)
    fits = end <= capacity
    last = tl.where(fits, end, begin)
    for i in range(begin, last, AHEAD):
        # AHEAD rows are asked for before the first is added: their addresses do not wait on the sum
        for ahead in tl.static_range(AHEAD):
            there = i + ahead < last
            feature = tl.load(col_ptr + i + ahead, mask=there, other=0).to(tl.int64)
            value = tl.load(values_ptr + i + ahead, mask=there, other=0.0)
            if HAS_SCALE:
                value *= tl.load(scale_ptr + feature, mask=there, other=0.0)
            row = tl.load(w_ptr + feature * d + k, mask=k < tl.where(there, d, 0), other=0.0).to(tl.float32)
            # where, and not a product with 0: adding +0 would turn a -0 into +0
            acc = tl.where(there, tl.fma(tl.zeros([BLOCK], tl.float32) + value, row, acc), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=inside, other=0.0)
    acc = tl.where(fits, acc, float("nan"))
    tl.store(out_ptr + n * d + k, acc, mask=inside)
