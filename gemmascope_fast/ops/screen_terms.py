"""Constants of the screen's error bound and the layout of its arrays, with the names used in docs/how/screen.md.

`csrc/cpu/screen_terms.h` has the same names and numbers for C++ (`TOKEN_STEPS` is `kTokenSteps` there).
tests/ops/test_screen_terms.py reads both files and the page and compares them.  Names that begin with GPU are for
the Triton kernels (kernels/screen.py), whose epilogue rounds at different steps.
"""

from __future__ import annotations

import math
from enum import IntEnum

# ---- rounding
U = 2.0**-24  # half an ulp of 1 in fp32
SECOND_ORDER = 1.01  # covers the terms of second order, such as those of (1 + u)^n beyond n u
DIRECTION_ORDER = 1.02  # the same if a sum over directions is rounded too
DOT_STEPS = 6  # roundings of the exact dot in addition to d/16: four folds, the bias, one spare
TOKEN_STEPS = 7  # roundings of P in the epilogue; part of R and E
START_STEPS = 5  # roundings of `start` in the epilogue; part of β
DIRECTION_STEPS = 4  # roundings of the products along the directions, in addition to k
UP = 1 + 8 * U  # roundings of B itself in the epilogue: a factor of R, E, ‖w‖, ‖e‖ and β
SUM_UP = 1 + 2.0**-30  # fp64 sums of d squares have errors up to 2⁻³⁶; the root halves that
CANCEL = 2.0**-50  # error of fp64 when e and e_r are computed
DOT_LOSS = 9.1e-13  # above 2⁻⁴⁰: fp64 sums of d products
DIRECTION_LOSS = 2.9e-14  # above 2⁻⁴⁵: fp64 sums of k products
UNDERFLOW = 2.0**-125  # per column: subnormal products and s·t
DIGIT2 = 2.0**-8  # scale of the second digit relative to the first

# ---- what is not screened
TINY, HUGE = 2.0**-60, 2.0**60  # norms outside are not screened
MOST_BIAS = 1e38  # limit of |b| and |b'|: sums stay finite
LEAST_GIVEN, MOST_GIVEN = 2.0**-80, 2.0**43  # range of scales of given codes: norms of their rows stay below HUGE
MOST_SCALE = 2**20  # scales of columns are powers of two from 1 to this
MOST_INPUTS = 66_000  # 255 · 127 · 66,000 < 2^31: integer dots fit 32 bits
MOST_DIRECTIONS = 128  # DIRECTION_LOSS allows for this many

# ---- layout
TILE_ROWS, TILE_COLUMNS = 4, 64  # size of a tile of codes or digits
TILE_STEP = TILE_ROWS * TILE_COLUMNS
TABLE_LINE = 16  # columns of the table in a cache line

# ---- the epilogue of the Triton kernels (docs/how/screen.md, "On a GPU")
GPU_TOKEN_STEPS = 9  # roundings of ‖r‖ + ‖r̂‖; part of E
GPU_EDGE_STEPS = 8  # roundings of |θ| + ε/2, if a bandwidth moves the edge
GPU_ERROR_STEPS = 8  # roundings of ‖e‖; part of ‖e₂‖
GPU_UP = 1 + 2.0**-20  # roundings of B itself in the epilogue: a factor of R and E
GPU_LOST = 2.0**-54  # the root of the sum of all squares of x that underflow
GPU_LARGEST = 127 * 256  # largest code of an activation, in units: both of its digits fit int8


class Row(IntEnum):
    """First rows of the table (`ScreenRow` in C++); the rows after them are those of the directions."""

    SCALE = 0  # s: the row is about s (code − zero)
    ZERO = 1  # an integer in [0, 255]
    ERROR = 2  # ‖e‖, rounded up
    NORM = 3  # ‖w‖, or ‖p‖ of its products with the directions if that is larger, rounded up
    CENTRED_BIAS = 4  # b'
    SLACK = 5  # β
    START = 6  # b' + β − τ, rounded up; +inf: never discarded
    SCALE2 = 7  # s₂: e is about s₂ (code2 − 128)
    ERROR2 = 8  # ‖e₂‖, rounded up


def table_stride(d_sae: int) -> int:
    """Columns of the table: d_sae rounded up to an odd number of cache lines of 16.

    A kernel reads the same line of every row at once.  An even number of lines, such as 65,536 bytes for 16,384
    features, would put all of them into one set of the L1 cache.
    """
    return (-(-d_sae // TABLE_LINE) | 1) * TABLE_LINE


def dot_kappa(d: int) -> float:
    """κ, the relative error bound of the exact dot of length d; same as `ops.encode.kappa`."""
    return SECOND_ORDER * (math.ceil(d / 16) + DOT_STEPS) * U


def direction_steps(k: int) -> float:
    """Relative error of k fused steps of the epilogue; each rounds the sum so far."""
    return DIRECTION_ORDER * k * U


def token_steps(k: int) -> float:
    """What is added to R and E, relative to R̂ = ‖r̂₁‖ + ‖r̂₂‖."""
    return TOKEN_STEPS * U + direction_steps(k)


def start_steps(k: int) -> float:
    """What is added to β, relative to |b'| + τ, and to START, relative to |edge|, if a bandwidth moves the edge."""
    return START_STEPS * U + direction_steps(k)


def coefficient_steps(k: int, frobenius: float) -> float:
    """What is added to E, relative to ‖c‖: rounding of the products p_j, and their steps in the epilogue."""
    return DIRECTION_ORDER * (k + DIRECTION_STEPS) * U + DOT_LOSS * frobenius
