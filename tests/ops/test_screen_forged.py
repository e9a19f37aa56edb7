"""Tables and codes that no build would make: no kernel may return a feature that does not exist."""

import itertools
import math

import pytest
import torch
from screen_problems import FORMS, problem

from gemmascope_fast import ops
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.ops.screen_terms import TILE_ROWS, Row
from gemmascope_fast.sae.screen import Screen

# not multiples of a tile (4), a panel of AVX-512 (8), a row of the table (16), a chunk or a panel of AMX (64)
FEATURES = [1, 2, 3, 5, 15, 31, 65, 67, 126, 515]
TOKENS = [1, 3, 17, 40]
VALUES = [math.inf, math.nan, 3e38, -1.5, 0.0]


def encoded(x, weights, screen, digits, second, mapped=False, bandwidth=None, table=None):
    table = screen.table if table is None else table
    kept = (screen.code, screen.code2 if second else None, table, screen.centre, digits, bandwidth)
    return ops.encode_screened(x, *weights, *kept, screen.directions, mapped)


def beyond(screen, F, value):
    """The screen with every number past the last feature forged: the table's columns, and the codes of rows that only
    fill a tile."""
    table, code, code2 = screen.table.clone(), screen.code.clone(), screen.code2.clone()
    table[:, F:] = value
    for tiles in (code, code2):
        tiles[-1, :, (F - 1) % TILE_ROWS + 1 :] = 255
    return Screen(code, code2, table, screen.centre, screen.directions)


@pytest.mark.parametrize("F", FEATURES)
def test_what_lies_past_the_last_feature_is_never_one(isa, F):
    """Of every row of the table any value: the bytes and the pairs looked at are those of the honest screen."""
    x, *weights = problem(max(TOKENS), 70, F)
    honest = Screen.build(*weights, directions=torch.eye(70)[: F % 3] if F % 3 else None)
    forged = [beyond(honest, F, value) for value in (math.inf, math.nan)]
    for T, (digits, second) in itertools.product(TOKENS, ((0, True), *FORMS)):
        mapped, bandwidth = digits != 1, 0.3 if second else None
        want = encoded(x[:T], weights, honest, digits, second, mapped, bandwidth)
        assert same_bytes(want[:3], ops.encode(x[:T], *weights, bandwidth))
        for screen in forged:
            got = encoded(x[:T], weights, screen, digits, second, mapped, bandwidth)
            assert same_bytes(got[:3], want[:3])
            assert torch.equal(got[3], want[3])


@pytest.mark.parametrize("F", [3, 67])
@pytest.mark.parametrize("row", list(Row))
def test_features_that_a_forged_table_finds_are_there(isa, row, F):
    """A table that lies about features gives wrong answers, and a violation wherever a refined pair shows it; what it
    gives are still latents of this SAE."""
    x, *weights = problem(20, 70, F)
    screen = Screen.build(*weights)
    full = ops.encode(x, *weights)
    known = set(zip(torch.arange(20).repeat_interleave(full[0].diff()).tolist(), full[1].tolist(), strict=True))
    for value, T, (digits, second) in itertools.product(VALUES, (1, 3, 20), FORMS):
        table = screen.table.clone()
        table[row] = value
        crow, col, values, stats = encoded(x[:T], weights, screen, digits, second, table=table)
        assert crow.shape == (T + 1,)
        assert int(crow[-1]) == col.numel() == values.numel()
        assert bool((crow.diff() >= 0).all())
        rows = torch.arange(T).repeat_interleave(crow.diff()).tolist()
        pairs = list(zip(rows, col.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
        assert set(pairs) <= known  # a pair is stored only where the deciding dot says so
        assert 0 <= int(stats[1]) <= int(stats[0]) <= T * F
