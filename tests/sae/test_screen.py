"""The certified screen: the bytes of the unscreened encode for every input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from screen_problems import FORMS, SOME, assert_same, problem, screened

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes, threads
from gemmascope_fast.ops.screen_rows import Row, rows_of
from gemmascope_fast.sae.screen import Screen

SHAPES = [
    (0, 7, 5),
    (1, 1, 1),
    (1, 16, 4),
    (2, 15, 3),
    (3, 63, 67),
    (5, 65, 130),
    (9, 128, 64),
    (37, 100, 251),
    (33, 30, 2300),
    (4, 0, 6),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "d", "F"), SHAPES)
def test_bytes_are_those_of_the_full_encode(isa, T, d, F, dtype):
    x, W, b, theta = problem(T, d, F, dtype)
    assert_same(x, W, b, theta)
    assert_same(x, W, b, theta, centre=torch.linspace(-1, 1, d), bandwidth=0.4)


def test_every_number_of_tokens(isa):
    x, W, b, theta = problem(71, 70, 22)
    screen = Screen.build(W, b, theta)
    whole = gsf.SparseLatents(*ops.encode(x, W, b, theta, None), (71, 22))
    for T in range(71):
        for digits, second in FORMS:
            got, _ = screened(x[:T], W, b, theta, screen, digits, second)
            assert same_bytes(got, ops.encode(x[:T], W, b, theta, None))
    alone = [gsf.SparseLatents(*screened(x[n : n + 1], W, b, theta, screen)[0], (1, 22)) for n in range(71)]
    assert gsf.SparseLatents.cat(alone) == whole


def test_threads_give_the_same_bytes():
    sae, x = make_sae(1, 640, 1500, 30), make_activations(2, 33, 640)
    results = []
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        with gsf.backends.forced_isa(name), threads(count):
            results += [sae.encode_sparse(x, screen=True).detach(), sae.encode_sparse(x, screen=False).detach()]
    assert len(results) >= 12
    assert all(r == results[0] for r in results)


def test_activations_like_gemmas(isa):
    """The massive dimension, and a BOS-like outlier whose bound leaves nearly everything."""
    sae, x = make_sae(3, 640, 1024, 18).requires_grad_(False), make_activations(4, 70, 640)
    x[5] *= 40
    x[6] = 0.0
    x[6, 163] = 3e5
    stats = assert_same(x, sae.W_enc, sae.b_enc, sae.threshold, centre=sae.b_dec)
    assert stats["rest"] == 0


def test_directions_leave_fewer_candidates():
    """Activations that vary along a few directions far more than elsewhere, as Gemma's do, and one digit for them."""
    sae, x = make_sae(3, 640, 4096, 73).requires_grad_(False), make_activations(4, 1024, 640)
    g = torch.Generator().manual_seed(1)
    x = x + 50 * x.std() * torch.randn(1024, 1, generator=g) * torch.nn.functional.normalize(
        torch.randn(640, generator=g), dim=0
    )
    left = []
    for k in (0, 4):
        sae.prepare(sample=x, directions=k)
        screen = sae.screen_cache.screen
        csr, stats = screened(x[:64], sae.W_enc, sae.b_enc, sae.threshold, screen, digits=1)
        assert same_bytes(csr, ops.encode(x[:64], sae.W_enc, sae.b_enc, sae.threshold, None))
        left.append(stats["survivors"] - len(csr[1]))
    assert left[1] < 0.5 * left[0]


def test_few_false_candidates_on_activations_like_gemmas():
    """What the speed rests on, guarded on synthetic activations: few pairs are left that do not fire."""
    sae, x = make_sae(3, 640, 4096, 73).requires_grad_(False), make_activations(4, 64, 640)
    screen = Screen.build(sae.W_enc, sae.b_enc, sae.threshold, centre=sae.b_dec)
    pairs = 64 * 4096
    csr, stats = screened(x, sae.W_enc, sae.b_enc, sae.threshold, screen, digits=2)
    active = len(csr[1])
    assert (stats["survivors"] - active) / pairs <= 0.012
    assert (stats["refined"] - active) / pairs <= 0.0002


SPECIAL_X = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38, 1e-45, -1e-40, 1e-30, 0.0, -0.0, 2.0**60, 2.0**61]
SPECIAL_W = [0.0, 1e-45, 1e-30, 1e19, 3e38, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", SPECIAL_X)
def test_special_activations(isa, value):
    x, W, b, theta = problem(9, 70, 67)
    x[2, 3] = value
    x[4] = value
    x[5, ::2] = value
    assert_same(x, W, b, theta)


@pytest.mark.parametrize("value", SPECIAL_W)
def test_special_rows(isa, value):
    x, W, b, theta = problem(6, 70, 67)
    W[:, 3] = value
    W[1, 9] = value
    W[::2, 20] = value
    assert_same(x, W, b, theta)
    x[1, 4] = math.inf
    assert_same(x, W, b, theta)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_special_biases(isa, value):
    x, W, b, theta = problem(6, 70, 67)
    b[::5] = value
    assert_same(x, W, b, theta)


def test_a_bound_that_is_no_number_discards_nothing(isa):
    """Building leaves none (such rows are refined always); a pair whose bound nobody knows is still not dropped."""
    x, W, b, theta = problem(20, 70, 67)
    screen = Screen.build(W, b, theta)
    screen.table[Row.START, ::3] = math.nan
    for T, (digits, second) in itertools.product((*SOME, 20), FORMS):
        got, _ = screened(x[:T], W, b, theta, screen, digits, second)
        assert same_bytes(got, ops.encode(x[:T], W, b, theta, None))


def test_thresholds_of_every_size(isa):
    x, W, b, _ = problem(6, 70, 128)
    theta = torch.tensor([0.0, -0.0, -1.0, 1e-45, -3e38, 3e38, 1e30, 0.5]).repeat(16)
    assert_same(x, W, b, theta)


def test_activations_within_an_ulp_of_the_threshold(isa):
    x, W, b, _ = problem(1, 200, 300)
    z = gsf.SparseLatents(*ops.encode(x, W, b, torch.full((300,), -1e9), 4e9), (1, 300)).to_dense()[0]
    for theta in (z, torch.nextafter(z, z + 1), torch.nextafter(z, z - 1)):
        assert_same(x, W, b, theta)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(0, 12),
    d=st.integers(1, 150),
    F=st.integers(1, 140),
    seed=st.integers(0, 10**6),
    scale_x=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e15]),
    scale_w=st.sampled_from([1e-18, 1e-2, 1.0, 1e10]),
    mean=st.sampled_from([0.0, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    level=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_property_same_bytes(T, d, F, seed, scale_x, scale_w, mean, dtype, level):
    x, W, b, theta = problem(T, d, F, seed=seed, theta=level)
    mu = torch.full((d,), mean * scale_x)
    x, W = (x * scale_x + mu), W * scale_w
    b, theta = b * scale_x * scale_w - W.t() @ mu, theta * scale_x * scale_w
    args = [t.to(dtype) for t in (x, W, b, theta)]
    assert_same(*args, centre=None if seed % 2 else mu)


# ---- integers at their extremes -----------------------------------------------------------------------


@pytest.mark.parametrize("d", [64, 2304, 65984])
def test_codes_and_digits_at_their_extremes(isa, d):
    """Rows and tokens of ±1 that sit on their grids: the bound is next to nothing, so a wrong integer shows."""
    low, high = -1.0, 127 / 128  # codes 0 and 255 with scale 1/128 and zero point 128
    W = torch.full((d, 6), high)
    W[:, 1] = low
    W[::2, 2] = low
    W[: d // 2, 3] = low
    W[0, :] = low
    W[1, :] = high
    x = torch.full((5, d), 127.0)
    x[1] *= -1
    x[2, ::2] *= -1
    x[3, : d // 2] *= -1
    x = x.repeat(4, 1)
    screen = Screen.build(W, torch.zeros(6), torch.zeros(6))
    rows = rows_of(screen.code)[:6, :d]
    assert {0, 255} == set(rows.unique().tolist())
    want = ops.encode(x, W, torch.zeros(6), torch.zeros(6), None)
    for digits, second in FORMS:
        csr, stats = screened(x, W, torch.zeros(6), torch.zeros(6), screen, digits, second)
        assert stats["violations"] == 0
        assert same_bytes(csr, want)


def test_too_many_inputs_are_refused():
    W = torch.zeros(66_001, 1)
    with pytest.raises(ValueError, match="66000"):
        Screen.build(W, torch.zeros(1), torch.zeros(1))
