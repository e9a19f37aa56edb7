"""Triton kernels of the screened encode (docs/how/screen.md): int8 finds what may fire, fp32 computes it exactly.

Three launches before the gather: `digits_kernel` quantises the tokens, `screen_kernel` is an int8 GEMM on tensor
cores whose epilogue compares ẑ + B with the threshold and stores one bit per pair, `refine_kernel` computes what is
left in the fixed order of summation.  Integers are exact; docs/how/screen.md, "On a GPU", derives how much the fp32
steps may round, and `ops.screen_terms` has the numbers.
"""

import triton
import triton.language as tl

from gemmascope_fast.kernels.encode import fires
from gemmascope_fast.kernels.lanes import canonical, dot_tile
from gemmascope_fast.ops import screen_terms as terms

LARGEST: tl.constexpr = tl.constexpr(float(terms.GPU_LARGEST))
LEAST: tl.constexpr = tl.constexpr(terms.TINY)
MOST: tl.constexpr = tl.constexpr(terms.HUGE)
TOKEN_STEPS: tl.constexpr = tl.constexpr(terms.GPU_TOKEN_STEPS * terms.U)
EDGE_STEPS: tl.constexpr = tl.constexpr(terms.GPU_EDGE_STEPS * terms.U)
UP: tl.constexpr = tl.constexpr(terms.GPU_UP)
LOST: tl.constexpr = tl.constexpr(terms.GPU_LOST)


@triton.jit
def centred(x_ptr, centre_ptr, scale_ptr, row, k, d, HAS_CENTRE: tl.constexpr, HAS_SCALES: tl.constexpr):
    """(x, r): a token's entries in fp32, and minus the centre, both divided by the scales, 0 beyond the end."""
    x = tl.load(x_ptr + row + k, mask=k < d, other=0.0).to(tl.float32)
    r = x
    if HAS_CENTRE:
        r = x - tl.load(centre_ptr + k, mask=k < d, other=0.0)
    if HAS_SCALES:
        # invert the power of two through its bits, because a device's division may round
        scale = tl.load(scale_ptr + k, mask=k < d, other=1.0).to(tl.int32, bitcast=True)
        inverse = (0x7F000000 - scale).to(tl.float32, bitcast=True)
        x, r = x * inverse, r * inverse
    return x, r


@triton.jit
def digits_kernel(
    x_ptr,  # [T, d] fp32, bf16 or fp16
    centre_ptr,  # fp32 [d], read if HAS_CENTRE
    scale_ptr,  # fp32 [d], powers of two, read if HAS_SCALES
    high_ptr,  # int8 [T, padded]: r is close to unit * (256 * high + low)
    low_ptr,  # int8 [T, padded]
    sum_ptr,  # int32 [T, 2]: sums of high and of low
    token_ptr,  # fp32 [T, 3]: unit (a power of two), R, E
    d,
    padded,
    kappa,
    root,  # the square root of d, or slightly more
    grow,  # 1 + the relative error of fp32 sums of d squares
    HAS_CENTRE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for k0 in range(0, d, BLOCK):
        x, r = centred(x_ptr, centre_ptr, scale_ptr, t * d, k0 + tl.arange(0, BLOCK), d, HAS_CENTRE, HAS_SCALES)
        largest = tl.maximum(largest, tl.abs(r))
        squares += x * x
    most = tl.max(largest, axis=0)
    size = tl.sum(squares, axis=0)
    # false for NaN, infinity and squares that overflow: such a token is not screened
    usable = (size < float("inf")) & (most >= LEAST) & (most <= MOST)

    # the power of two at or above most / 32512, so that dividing by it is exact
    bits = (tl.where(usable, most, 1.0) * (1 / LARGEST)).to(tl.int32, bitcast=True)
    exponent = (bits + 0x7FFFFF) & 0x7F800000
    unit = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    lengths = tl.zeros([BLOCK], dtype=tl.float32)
    highs = tl.zeros([BLOCK], dtype=tl.int32)
    lows = tl.zeros([BLOCK], dtype=tl.int32)
    for k0 in range(0, padded, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        x, r = centred(x_ptr, centre_ptr, scale_ptr, t * d, k, d, HAS_CENTRE, HAS_SCALES)
        # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even
        near = (tl.where(usable, r, 0.0) * inverse + 12582912.0) - 12582912.0
        code = near.to(tl.int32)
        high = (code + 128) >> 8
        low = code - high * 256
        lengths += near * near
        highs += high
        lows += low
        tl.store(high_ptr + t * padded + k, high.to(tl.int8), mask=k < padded)
        tl.store(low_ptr + t * padded + k, low.to(tl.int8), mask=k < padded)
    tl.store(sum_ptr + 2 * t, tl.sum(highs, axis=0))
    tl.store(sum_ptr + 2 * t + 1, tl.sum(lows, axis=0))

    rounding = 0.5 * unit * root  # the error of each entry is at most half a unit
    R = unit * tl.sqrt_rn(tl.sum(lengths, axis=0)) * grow
    E = rounding + kappa * (tl.sqrt_rn(size) + LOST) * grow + TOKEN_STEPS * (2 * R + rounding)
    tl.store(token_ptr + 3 * t, unit)
    tl.store(token_ptr + 3 * t + 1, R * UP)
    tl.store(token_ptr + 3 * t + 2, tl.where(usable, E * UP, float("inf")))


@triton.jit
def scaled(high, low, unit):
    """unit * (256 * high + low) of int32 sums, rounded once."""
    return (high.to(tl.int64) * 256 + low.to(tl.int64)).to(tl.float32) * unit


@triton.jit
def screen_kernel(
    high_ptr,  # int8 [T, padded]
    low_ptr,  # int8 [T, padded]
    sum_ptr,  # int32 [T, 2]
    token_ptr,  # fp32 [T, 3]
    code_ptr,  # int8 [F, d]: a row is close to scale * (code - zero)
    scale_ptr,  # fp32 [F]
    zero_ptr,  # int32 [F]
    error_ptr,  # fp32 [F]
    norm_ptr,  # fp32 [F]
    bias_ptr,  # fp32 [F], including the centre's part
    slack_ptr,  # fp32 [F]
    threshold_ptr,  # fp32 [F]
    bitmap_ptr,  # int32 [T, words]: what may fire
    guess_ptr,  # fp32 [T, words, SLOTS]: ẑ of the first candidates of a word
    T,
    F,
    d,
    padded,
    words,
    half_bandwidth,
    HAS_BANDWIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    # tokens vary fastest, so that all programs that read one block of codes run at about the same time
    blocks = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    t = (pid % blocks) * BT + tl.arange(0, BT)
    f = (pid // blocks) * BF + tl.arange(0, BF)
    t_in = t < T
    f_in = f < F
    row = t.to(tl.int64)[:, None] * padded
    high = tl.zeros([BT, BF], dtype=tl.int32)
    low = tl.zeros([BT, BF], dtype=tl.int32)
    for k0 in range(0, d, BK):
        k = k0 + tl.arange(0, BK)
        code = tl.load(
            code_ptr + f.to(tl.int64)[:, None] * d + k[None, :], mask=f_in[:, None] & (k < d)[None, :], other=0
        )
        columns = tl.trans(code)
        high = tl.dot(tl.load(high_ptr + row + k[None, :], mask=t_in[:, None], other=0), columns, high)
        low = tl.dot(tl.load(low_ptr + row + k[None, :], mask=t_in[:, None], other=0), columns, low)
    zero = tl.load(zero_ptr + f, mask=f_in, other=0)[None, :]
    high -= zero * tl.load(sum_ptr + 2 * t, mask=t_in, other=0)[:, None]
    low -= zero * tl.load(sum_ptr + 2 * t + 1, mask=t_in, other=0)[:, None]
    unit = tl.load(token_ptr + 3 * t, mask=t_in, other=0.0)[:, None]
    scale = tl.load(scale_ptr + f, mask=f_in, other=0.0)[None, :]
    bias = tl.load(bias_ptr + f, mask=f_in, other=0.0)[None, :]
    z = tl.fma(scaled(high, low, unit), tl.broadcast_to(scale, [BT, BF]), tl.broadcast_to(bias, [BT, BF]))
    bound = bounds(token_ptr, t, t_in, error_ptr, norm_ptr, slack_ptr, f, f_in, BT, BF)
    theta = tl.load(threshold_ptr + f, mask=f_in, other=0.0)[None, :]
    keep = may_fire(z, bound, theta, half_bandwidth, HAS_BANDWIDTH) & f_in[None, :] & t_in[:, None]

    WORDS: tl.constexpr = BF // 32
    bit = tl.arange(0, 32)[None, None, :]
    hit = tl.reshape(keep.to(tl.int32), [BT, WORDS, 32])
    word = (pid // blocks) * WORDS + tl.arange(0, WORDS)
    at = t.to(tl.int64)[:, None] * words + word[None, :]
    tl.store(bitmap_ptr + at, tl.sum(hit << bit, axis=2), mask=t_in[:, None] & (word < words)[None, :])
    rank = tl.cumsum(hit, axis=2) - 1
    z = tl.reshape(z, [BT, WORDS, 32])
    tl.store(guess_ptr + at[:, :, None] * SLOTS + rank, z, mask=(hit != 0) & (rank < SLOTS))


@triton.jit
def bounds(
    token_ptr, t, t_in, error_ptr, norm_ptr, slack_ptr, f, f_in, BT: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """B = ‖e‖R + ‖w‖E + β of tokens t [BT] and features f [BF]."""
    R = tl.load(token_ptr + 3 * t + 1, mask=t_in, other=0.0)[:, None]
    E = tl.load(token_ptr + 3 * t + 2, mask=t_in, other=0.0)[:, None]
    error = tl.load(error_ptr + f, mask=f_in, other=0.0)[None, :]
    norm = tl.load(norm_ptr + f, mask=f_in, other=0.0)[None, :]
    slack = tl.load(slack_ptr + f, mask=f_in, other=0.0)[None, :]
    B = tl.fma(tl.broadcast_to(norm, [BT, BF]), tl.broadcast_to(E, [BT, BF]), tl.broadcast_to(slack, [BT, BF]))
    return tl.fma(tl.broadcast_to(error, [BT, BF]), tl.broadcast_to(R, [BT, BF]), B)


@triton.jit
def may_fire(z, bound, theta, half_bandwidth, HAS_BANDWIDTH: tl.constexpr):
    """False if z is certainly at or below what `fires` needs; NaN may fire."""
    if HAS_BANDWIDTH:
        lowest = theta - half_bandwidth
        bound += EDGE_STEPS * (tl.abs(theta) + half_bandwidth)
    else:
        lowest = tl.maximum(theta, 0.0)
    return (z + bound <= lowest) == 0


@triton.jit
def nth_candidate(bits, n, end, i, WORDS: tl.constexpr):
    """The i-th [PAIRS] set bit of words bits [WORDS] -> (its word or WORDS, its rank in the word, its bit).

    n and end: the words' popcounts and their inclusive sums.  Everything is in registers, with no memory latency.
    """
    bit = tl.arange(0, 32)
    before = end[None, :] <= i[:, None]
    word = tl.sum(before.to(tl.int32), axis=1)
    rank = i - tl.sum(tl.where(before, n[None, :], 0), axis=1)
    mine = tl.arange(0, WORDS)[None, :] == word[:, None]
    seen = tl.sum(tl.where(mine, bits[None, :], 0), axis=1)
    hit = (seen[:, None] >> bit[None, :]) & 1
    chosen = (hit != 0) & (tl.cumsum(hit, axis=1) - 1 == rank[:, None])
    return word, rank, tl.sum(tl.where(chosen, bit[None, :], 0), axis=1)


@triton.jit
def second_digit(
    high_ptr, low_ptr, token_ptr, code_ptr, scale_ptr, guess, t, f, F, d, padded,
    PAIRS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """guess plus what the second digit of rows f [PAIRS] adds; a pair with f = F reads nothing."""
    high = tl.zeros([PAIRS], dtype=tl.int32)
    low = tl.zeros([PAIRS], dtype=tl.int32)
    for k0 in range(0, d, BK):
        k = k0 + tl.arange(0, BK)
        inside = (f < F)[:, None] & (k < d)[None, :]
        code = tl.load(code_ptr + f.to(tl.int64)[:, None] * d + k[None, :], mask=inside, other=0).to(tl.int32)
        high += tl.sum(code * tl.load(high_ptr + t.to(tl.int64) * padded + k).to(tl.int32)[None, :], axis=1)
        low += tl.sum(code * tl.load(low_ptr + t.to(tl.int64) * padded + k).to(tl.int32)[None, :], axis=1)
    scale = tl.load(scale_ptr + f, mask=f < F, other=0.0)
    return tl.fma(scaled(high, low, tl.load(token_ptr + 3 * t)), scale, guess)


@triton.jit
def refine_kernel(
    x_ptr,  # [T, d]
    w_ptr,  # [F, d], possibly in pinned host memory
    bias_ptr,  # fp32 [F], the encoder's
    threshold_ptr,  # fp32 [F]
    error_ptr,  # fp32 [F]
    norm_ptr,  # fp32 [F]
    slack_ptr,  # fp32 [F]
    token_ptr,  # fp32 [T, 3]
    candidate_ptr,  # int32 [T, words]
    guess_ptr,  # fp32 [T, words, SLOTS]
    high_ptr,  # int8 [T, padded]; this and the four below are read if HAS_SECOND
    low_ptr,  # int8 [T, padded]
    code_ptr,  # int8 [F, d]: the second digit, a row is close to scale * (code - zero) + scale2 * code2
    scale_ptr,  # fp32 [F]
    error2_ptr,  # fp32 [F]
    bitmap_ptr,  # int32 [T, words]: what fires
    count_ptr,  # int32 [T, words]
    slot_ptr,  # fp32 [T, words, SLOTS]
    stale_ptr,  # int32 [1], set if a pair is outside the bound
    left_ptr,  # int32 [2, T, groups], candidates and pairs computed exactly; written if COUNTS
    T,
    F,
    d,
    padded,
    words,
    half_bandwidth,
    HAS_BANDWIDTH: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    COUNTS: tl.constexpr,
    SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    PAIRS: tl.constexpr,
    BK: tl.constexpr,
):
    # one program: WORDS words of one token; tokens vary fastest, so that rows they share are read from L2
    pid = tl.program_id(0)
    t = pid % T
    first = (pid // T) * WORDS
    w = tl.arange(0, WORDS)
    w_in = first + w < words
    row = t.to(tl.int64) * words + first
    bits = tl.load(candidate_ptr + row + w, mask=w_in, other=0)
    n = tl.sum((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, axis=1)
    end = tl.cumsum(n, axis=0)
    total = tl.sum(n, axis=0)
    one = tl.arange(0, 1)
    pair = tl.arange(0, PAIRS)
    found = tl.zeros([WORDS], dtype=tl.int32)
    kept = tl.zeros([WORDS], dtype=tl.int32)
    refined = tl.zeros([PAIRS], dtype=tl.int32)
    for i0 in range(0, total, PAIRS):
        word, rank, position = nth_candidate(bits, n, end, i0 + pair, WORDS)
        there = i0 + pair < total
        f = tl.where(there, (first + word) * 32 + position, F)
        known = there & (rank < SLOTS)
        guess = tl.load(guess_ptr + (row + word) * SLOTS + rank, mask=known, other=0.0)
        theta = tl.load(threshold_ptr + f, mask=there, other=0.0)
        bound = bounds(token_ptr, t + one, one == 0, error_ptr, norm_ptr, slack_ptr, f, there, 1, PAIRS)
        if HAS_SECOND:
            fine = second_digit(
                high_ptr, low_ptr, token_ptr, code_ptr, scale_ptr, guess, t, tl.where(known, f, F), F, d,
                padded, PAIRS, BK,
            )  # fmt: skip
            finer = bounds(token_ptr, t + one, one == 0, error2_ptr, norm_ptr, slack_ptr, f, there, 1, PAIRS)
            alive = may_fire(fine, tl.reshape(finer, [PAIRS]), theta, half_bandwidth, HAS_BANDWIDTH)
            there = there & (alive | (rank >= SLOTS))
            f = tl.where(there, f, F)
        refined += there.to(tl.int32)
        z = tl.reshape(dot_tile(x_ptr, w_ptr, t + one, f, T, F, d, 1, PAIRS), [PAIRS])
        z += tl.load(bias_ptr + f, mask=there, other=0.0)
        # the check of the bound, which costs nothing; false for NaN, which the screen lets through
        outside = there & known & (tl.abs(z - guess) > tl.reshape(bound, [PAIRS]))
        tl.store(stale_ptr + tl.zeros([PAIRS], dtype=tl.int32), 1, mask=outside)

        keep = fires(z, theta, half_bandwidth, HAS_BANDWIDTH) & there
        mine = (w[None, :] == word[:, None]) & keep[:, None]
        earlier = (word[None, :] == word[:, None]) & (pair[None, :] < pair[:, None]) & keep[None, :]
        order = tl.sum(earlier.to(tl.int32), axis=1) + tl.sum(tl.where(mine, kept[None, :], 0), axis=1)
        tl.store(slot_ptr + (row + word) * SLOTS + order, canonical(z), mask=keep & (order < SLOTS))
        found += tl.sum(tl.where(mine, (1 << position)[:, None], 0), axis=0)
        kept += tl.sum(mine.to(tl.int32), axis=0)
    tl.store(bitmap_ptr + row + w, found, mask=w_in)
    tl.store(count_ptr + row + w, kept, mask=w_in)
    if COUNTS:
        tl.store(left_ptr + pid.to(tl.int64), total)
        tl.store(left_ptr + tl.num_programs(0).to(tl.int64) + pid, tl.sum(refined, axis=0))
