"""Triton kernel of op `sampled_dot`: dots of selected (token, feature) pairs in the fixed order of summation.

One program per token and share of its row's pairs: PAIRS at a time, each with a 16-lane accumulator.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.lanes import dot_tile


@triton.jit
def sampled_dot_kernel(
    x_ptr,  # [N, d]
    w_ptr,  # [F, d]
    bias_ptr,  # fp32 [F], read if HAS_BIAS
    crow_ptr,  # int64 [N+1]
    col_ptr,  # int32 [nnz]
    out_ptr,  # fp32 [nnz]
    N,
    F,
    d,
    shares,  # programs per row
    HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    pid = tl.program_id(0)
    n = pid // shares
    begin = tl.load(crow_ptr + n)
    end = tl.load(crow_ptr + n + 1)
    t = n + tl.arange(0, 1)
    for i in range(begin + (pid % shares) * PAIRS, end, shares * PAIRS):
        at = i + tl.arange(0, PAIRS)
        there = at < end
        # an invalid pair reads nothing, because its feature index is out of range
        feature = tl.load(col_ptr + at, mask=there, other=F)
        z = dot_tile(x_ptr, w_ptr, t, feature, N, F, d, 1, PAIRS)
        if HAS_BIAS:
            z += tl.load(bias_ptr + feature, mask=there, other=0.0)[None, :]
        tl.store(out_ptr + at[None, :], z, mask=there[None, :])
