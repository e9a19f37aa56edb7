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
    d,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < d
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(tl.load(crow_ptr + n), tl.load(crow_ptr + n + 1)):
        feature = tl.load(col_ptr + i).to(tl.int64)
        value = tl.load(values_ptr + i)
        if HAS_SCALE:
            value *= tl.load(scale_ptr + feature)
        row = tl.load(w_ptr + feature * d + k, mask=inside, other=0.0).to(tl.float32)
        acc = tl.fma(tl.full([BLOCK], 0.0, tl.float32) + value, row, acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=inside, other=0.0)
    tl.store(out_ptr + n * d + k, acc, mask=inside)
