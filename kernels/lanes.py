"""The fixed order of summation in Triton (docs/how/exact.md): 16 lanes, k ascending, one rounding per step, lanes
added 8-4-2-1.  The lanes are added explicitly, because `tl.reduce` guarantees no order."""

import triton
import triton.language as tl


@triton.jit
def halve(lanes, B0: tl.constexpr, B1: tl.constexpr, HALF: tl.constexpr):
    """[B0, B1, 2*HALF] -> [B0, B1, HALF]: lane i plus lane i + HALF."""
    low, high = tl.split(tl.permute(tl.reshape(lanes, [B0, B1, 2, HALF]), [0, 1, 3, 2]))
    return low + high


@triton.jit
def fold16(lanes, B0: tl.constexpr, B1: tl.constexpr):
    """[B0, B1, 16] -> [B0, B1]."""
    eight = halve(lanes, B0, B1, 8)
    four = halve(eight, B0, B1, 4)
    two = halve(four, B0, B1, 2)
    low, high = tl.split(two)
    return low + high


@triton.jit
def dot_tile(x_ptr, w_ptr, t, f, T, F, d, BT: tl.constexpr, BF: tl.constexpr):
    """x[t] . w[f] for token indices t [BT] and feature indices f [BF] -> fp32 [BT, BF].

    x_ptr: [T, d], w_ptr: [F, d], fp32, bf16 or fp16, widened first.  Outside T and F the result is 0.
    """
    lane = tl.arange(0, 16)[None, None, :]
    x_row = x_ptr + t.to(tl.int64)[:, None, None] * d
    w_row = w_ptr + f.to(tl.int64)[None, :, None] * d
    t_in = (t < T)[:, None, None]
    f_in = (f < F)[None, :, None]
    acc = tl.zeros([BT, BF, 16], dtype=tl.float32)
    for k in range(0, d, 16):
        inside = k + lane < d
        xk = tl.load(x_row + (k + lane), mask=t_in & inside, other=0.0).to(tl.float32)
        wk = tl.load(w_row + (k + lane), mask=f_in & inside, other=0.0).to(tl.float32)
        acc = tl.fma(tl.broadcast_to(xk, [BT, BF, 16]), tl.broadcast_to(wk, [BT, BF, 16]), acc)
    return fold16(acc, BT, BF)


@triton.jit
def canonical(z):
    """Replace every NaN by the canonical quiet one, as in stored latents."""
    return tl.where(z == z, z, float("nan"))  # noqa: PLR0124
