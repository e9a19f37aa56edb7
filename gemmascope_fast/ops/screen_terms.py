"""The numbers of the screen's bound and the layout of its arrays, under the names that docs/how/screen.md gives them.

`csrc/cpu/screen_terms.h` holds the same names and numbers for C++ (`TOKEN_STEPS` is `kTokenSteps` there);
tests/ops/test_screen_terms.py reads both files and the page and compares them.  The numbers that begin with GPU are
those of the Triton kernels (kernels/screen.py), whose epilogue rounds in other places.
"""

from __future__ import annotations

import math
from enum import IntEnum

# ---- rounding
U = 2.0**-24  # half an ulp of 1 in fp32
SECOND_ORDER = 1.01  # what (1 + u)^n and the like add to n u
DIRECTION_ORDER = 1.02  # the same where a sum over directions is rounded as well
DOT_STEPS = 6  # of the deciding dot beside d/16: four folds, the bias, one spare
TOKEN_STEPS = 7  # the epilogue's roundings of P, into R and E
START_STEPS = 5  # its roundings of `start`, into β
DIRECTION_STEPS = 4  # of the products along the directions, beside k
UP = 1 + 8 * U  # its roundings of B itself: a factor of R, E, ‖w‖, ‖e‖ and β
SUM_UP = 1 + 2.0**-30  # fp64 sums of d squares err by 2⁻³⁶; roots halve that
CANCEL = 2.0**-50  # what fp64 loses where e and e_r are formed
DOT_LOSS = 9.1e-13  # above 2⁻⁴⁰: fp64 sums of d products
DIRECTION_LOSS = 2.9e-14  # above 2⁻⁴⁵: fp64 sums of k products
UNDERFLOW = 2.0**-125  # a column: subnormal products and s·t
DIGIT2 = 2.0**-8  # the second digit's scale is that of the first's

# ---- what skips the screen
TINY, HUGE = 2.0**-60, 2.0**60  # norms outside are not screened
MOST_BIAS = 1e38  # of |b| and |b'|: sums stay finite
LEAST_GIVEN, MOST_GIVEN = 2.0**-80, 2.0**43  # of given codes: up to there their rows' norms are below HUGE
MOST_SCALE = 2**20  # scales of columns are powers of two from 1 to this
MOST_INPUTS = 66_000  # 255 · 127 · 66,000 < 2^31: integer dots fit 32 bits
MOST_DIRECTIONS = 128  # DIRECTION_LOSS counts so many

# ---- layout
TILE_ROWS, TILE_COLUMNS = 4, 64  # of a tile of codes or digits
TILE_STEP = TILE_ROWS * TILE_COLUMNS
TABLE_LINE = 16  # columns of the table in a cache line

# ---- the epilogue of the Triton kernels (docs/how/screen.md, "On a GPU")
GPU_TOKEN_STEPS = 9  # of ‖r‖ + ‖r̂‖, into E
GPU_EDGE_STEPS = 8  # of |θ| + ε/2, where a bandwidth moves the edge
GPU_ERROR_STEPS = 8  # of ‖e‖, into ‖e₂‖
GPU_UP = 1 + 2.0**-20  # the epilogue's roundings of B itself: a factor of R and E
GPU_LOST = 2.0**-54  # the root of all squares of x that underflow
GPU_LARGEST = 127 * 256  # an activation's code in units: both digits of it fit int8


class Row(IntEnum):
    """First rows of the table (`ScreenRow` in C++); those after them belong to the directions."""

    SCALE = 0  # s: the row is about s (code − zero)
    ZERO = 1  # an integer in [0, 255]
    ERROR = 2  # ‖e‖, rounded up
    NORM = 3  # ‖w‖, or ‖p‖ of its products with the directions where that is more, rounded up
    CENTRED_BIAS = 4  # b'
    SLACK = 5  # β
    START = 6  # b' + β − τ, rounded up; +inf: never discarded
    SCALE2 = 7  # s₂: e is about s₂ (code2 − 128)
    ERROR2 = 8  # ‖e₂‖, rounded up


def table_stride(d_sae: int) -> int:
    """Columns of the table: d_sae rounded up to an odd number of cache lines of 16.

    A kernel reads one line of every row at once.  An even number of them, 65,536 bytes for 16,384 features, would put
    all of them into the same set of the first cache.
    """
    return (-(-d_sae // TABLE_LINE) | 1) * TABLE_LINE


def dot_kappa(d: int) -> float:
    """κ, the relative bound of the deciding dot of length d; `ops.encode.kappa` is the same."""
    return SECOND_ORDER * (math.ceil(d / 16) + DOT_STEPS) * U


def direction_steps(k: int) -> float:
    """k fused steps of the epilogue, each a rounding of what is summed so far."""
    return DIRECTION_ORDER * k * U


def token_steps(k: int) -> float:
    """What R and E gain of R̂ = ‖r̂₁‖ + ‖r̂₂‖."""
    return TOKEN_STEPS * U + direction_steps(k)


def start_steps(k: int) -> float:
    """What β gains of |b'| + τ, and START of |edge| where a bandwidth moves the edge."""
    return START_STEPS * U + direction_steps(k)


def coefficient_steps(k: int, frobenius: float) -> float:
    """What E gains of ‖c‖: the products p_j as rounded, and their steps in the epilogue."""
    return DIRECTION_ORDER * (k + DIRECTION_STEPS) * U + DOT_LOSS * frobenius
