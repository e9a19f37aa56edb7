"""The certified screen: the bytes of the unscreened encode for every input, and a bound whose every term is needed."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.matryoshka.codes import quantize
from gemmascope_fast.ops.screen_rows import Row, rows_of, table_stride
from gemmascope_fast.screen import Screen, weights_digest
from gemmascope_fast.testing import make_activations, make_sae, same_bytes, threads

SOME = (1, 17)  # tokens: one, and more than the 16 from which AMX multiplies
FORMS = list(itertools.product((1, 2), (True, False)))  # digits of the activations, second digit of the rows


def screened(x, W, b, theta, screen, digits=0, second=True, bandwidth=None):
    """(csr, stats) of the op itself."""
    code2 = screen.code2 if second else None
    *csr, stats = ops.encode_screened(
        x,
        W,
        b,
        theta,
        screen.code,
        code2,
        screen.table,
        screen.centre,
        digits,
        bandwidth,
        screen.directions,
        False,
        screen.scales,
    )
    return tuple(csr), dict(zip(("survivors", "refined", "violations", "rest"), stats.tolist(), strict=True))


def arrays(screen):
    return screen.code, screen.code2, screen.table, screen.centre


def assert_same(x, W, b, theta, centre=None, bandwidth=None):
    """Every form of the screen gives the bytes of the full encode, and no pair lies outside its bound."""
    want = ops.encode(x, W, b, theta, bandwidth)
    for k in (min(3, W.shape[0]), 0):
        directions = torch.eye(W.shape[0])[:k] + 0.1 if k else None
        scales = torch.exp2(torch.arange(W.shape[0]) % 7) if k else None
        screen = Screen.build(W, b, theta, centre=centre, directions=directions, scales=scales)
        for digits, second in FORMS:
            got, stats = screened(x, W, b, theta, screen, digits, second, bandwidth)
            assert same_bytes(got, want), (k, digits, second)
            assert stats["violations"] == 0
            assert len(want[1]) <= stats["refined"] + stats["rest"] * W.shape[1]
    return stats


def problem(T, d, F, dtype=torch.float32, seed=0, theta=1.5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    W = draw(d, F) / math.sqrt(max(d, 1))
    return draw(T, d).to(dtype), W.to(dtype), (0.1 * draw(F)).to(dtype), (theta + 0.3 * draw(F)).to(dtype)


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
        screen = sae._prepared.screen
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


# ---- the bound: one term at a time --------------------------------------------------------------------


def with_row(screen, row, factor):
    """The screen with one row of its table scaled, START included where it is built from it."""
    table = screen.table.clone()
    table[row] *= factor
    return Screen(screen.code, screen.code2, table, screen.centre, screen.directions)


def just_below(z):
    return torch.nextafter(z, torch.full_like(z, -math.inf))


def fired(csr):
    return csr[1].numel()


@pytest.mark.parametrize("T", SOME)
@pytest.mark.parametrize("digits", [1, 2])
def test_the_weights_error_alone(isa, digits, T):
    """The token lies along the row's error and on the grid of its digits: z - ẑ is nearly |e| |r̂|."""
    g = torch.Generator().manual_seed(5)
    W = torch.randn(256, 1, generator=g)
    b = torch.full((1,), 3000.0)  # z is positive
    e = W[:, 0] - quantize(W.t()).dequantize()[0]
    steps = (e / e.abs().max() * 127).round()
    steps[steps.abs().argmax()] = 127.0 * steps[steps.abs().argmax()].sign()
    x = steps.repeat(T, 1)  # digits are the steps themselves, scale 1
    z = gsf.SparseLatents(*ops.encode(x[:1], W, b, torch.tensor([-1e9]), 4e9), (1, 1)).values
    theta = just_below(z)
    screen = Screen.build(W, b, theta)
    csr, stats = screened(x, W, b, theta, screen, digits, second=False)
    assert fired(csr) == T
    assert stats["violations"] == 0
    # without half of the term the feature would be lost, or found outside the bound
    assert fired(screened(x, W, b, theta, with_row(screen, Row.ERROR, 0.5), digits, second=False)[0]) == 0


@pytest.mark.parametrize("T", SOME)
@pytest.mark.parametrize("digits", [1, 2])
def test_the_activations_error_alone(isa, digits, T):
    """The row lies on its grid, the token is off its digits' grid along the row: z - ẑ is nearly |w| |e_r|."""
    g = torch.Generator().manual_seed(6)
    up = torch.rand(256, generator=g) < 0.5
    up[0], up[1] = True, False
    W = torch.where(up, 127 / 128, -1.0)[:, None]
    b = torch.zeros(1)
    digit = torch.randint(0, 100, (256,), generator=g) * W[:, 0].sign()  # towards the row: z is positive
    digit[7] = 127.0
    off = 0.49 * W[:, 0].sign() * (1.0 if digits == 1 else 1 / 256)
    off[7] = 0.0
    x = (digit + off).repeat(T, 1)
    z = gsf.SparseLatents(*ops.encode(x[:1], W, b, torch.tensor([-1e9]), 4e9), (1, 1)).values
    theta = just_below(z)
    screen = Screen.build(W, b, theta)
    assert float(screen.table[Row.ERROR, 0]) < 1e-12
    csr, stats = screened(x, W, b, theta, screen, digits, second=False)
    assert fired(csr) == T
    assert stats["violations"] == 0
    assert fired(screened(x, W, b, theta, with_row(screen, Row.NORM, 0.5), digits, second=False)[0]) == 0


def test_rounding_alone(isa):
    """Rows and tokens on their grids and a huge mean: only the rounding of the deciding dot is left, and it decides.

    The exact z lies at or below a threshold that the fp32 dot exceeds: Cauchy–Schwarz alone would discard what fires.
    """
    g = torch.Generator().manual_seed(7)
    d, F, T = 640, 64, 32
    W = torch.randint(0, 256, (d, F), generator=g).float() - 128
    W[0], W[1] = -128.0, 127.0
    W /= 128
    mu = (torch.randn(d, generator=g) * 3000 * 64).round() / 64
    mu[163] = 11_700.0
    digit = torch.randint(-127, 128, (T, d), generator=g).float()
    digit[:, 0] = 127.0
    x = mu + digit  # exact: 64ths below 2^18
    b = torch.zeros(F)
    z = gsf.SparseLatents(*ops.encode(x, W, b, torch.full((F,), -1e9), 4e9), (T, F)).to_dense()
    exact = x.double() @ W.double()
    decided = 0
    for t, f in itertools.product(range(T), range(F)):
        if float(z[t, f]) <= float(exact[t, f]) or float(z[t, f]) <= 0:
            continue
        theta = just_below(z[t, f : f + 1])
        if float(theta) < float(exact[t, f]):
            continue
        screen = Screen.build(W[:, f : f + 1], b[:1], theta, centre=mu)
        for (digits, second), times in itertools.product(FORMS, SOME):
            again = x[t : t + 1].repeat(times, 1)
            csr, stats = screened(again, W[:, f : f + 1], b[:1], theta, screen, digits, second)
            assert fired(csr) == times
            assert stats["violations"] == 0
        decided += 1
        if decided == 60:
            return
    raise AssertionError(f"only {decided} trials stood on the bound")


@pytest.mark.parametrize("digits", [1, 2])
def test_rounding_along_the_directions_alone(isa, digits):
    """Rows and tokens on their grids, a small token, and a centre so far away along the directions that the fp32 chain
    of their products, which cancel in the end, is rounded by more than all that separates z from its threshold."""
    g = torch.Generator().manual_seed(9)
    d, k, F = 128, 64, 8192
    W = torch.where(torch.rand(d, F, generator=g) < 0.5, 127 / 128, -1.0)
    W[-1], W[-2] = 127 / 128, -1.0
    far = torch.full((k,), 3e5) + torch.rand(k, generator=g) * 1e4
    # the first half of the chain climbs, the second comes down again
    W[: k // 2] = torch.where(torch.rand(k // 2, F, generator=g) < 0.02, -1.0, 127 / 128)
    W[k // 2 : k] = -W[: k // 2].flip(0)
    W = W.clamp(-1, 127 / 128)
    x, mu = torch.zeros(1, d), torch.zeros(d)
    mu[:k] = -far
    x[0, k:] = torch.randint(-127, 128, (d - k,), generator=g).float()
    x[0, k] = 127.0
    b = torch.zeros(F)
    z = gsf.SparseLatents(*ops.encode(x, W, b, torch.full((F,), -1e9), 4e9), (1, F)).to_dense()[0]
    theta = just_below(z)
    screen = Screen.build(W, b, theta, centre=mu, directions=torch.eye(d)[:k])
    assert torch.equal(screen.directions.abs(), torch.eye(d)[:k])
    for times in SOME:
        csr, stats = screened(x.repeat(times, 1), W, b, theta, screen, digits)
        assert fired(csr) == times * int((z > 0).sum())
        assert stats["violations"] == 0


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("k", [0, 4])
def test_rounding_is_bounded_by_what_the_page_derives(isa, digits, k):
    """Rows and tokens on their grids: what is left of the bound is its rounding, written again from docs/screen.md.  A
    pair a little nearer to its threshold than that survives the first stage, one a little further away does not."""
    g = torch.Generator().manual_seed(10)
    d, F, u = 64, 24, 2.0**-24
    W = torch.randint(0, 256, (d, F), generator=g).float() - 128
    W[0:4] = 0.0  # nothing of a row lies along the directions, or along the centre: z stays small beside them
    W[4], W[5] = -128.0, 127.0
    W /= 128
    far, digit = torch.zeros(d), torch.randint(-127, 128, (d,), generator=g).float()
    far[:4], digit[:4], digit[4] = 1e6, 0.0, 127.0
    x, b = (far + digit)[None], torch.full((F,), 3000.0)
    own = {"directions": torch.eye(d)[:4]} if k else {"centre": far}
    exact = (x.double() @ W.double())[0] + b
    error = 1.01 * (d // 16 + 6) * u * x.double().norm() + 1.01 * u * (x if k else digit).double().norm()
    if k:
        error += 1.02 * (k + 4) * u * far.double().norm() + 1.01 * u * digit.double().norm()
    error += (7 + 1.02 * k) * u * digit.double().norm()
    bound = W.double().norm(dim=0) * error
    for share, left in ((0.98, F), (1.02, 0)):
        theta = (exact + share * bound).float()
        screen = Screen.build(W, b, theta, **own)
        for times in SOME:
            _, stats = screened(x.repeat(times, 1), W, b, theta, screen, digits, second=False)
            assert stats["survivors"] == times * left


def test_the_second_digits_error(isa):
    """As the weights' error, one digit further: the token lies along e2, and θ is just below z."""
    g = torch.Generator().manual_seed(8)
    W = torch.randn(256, 1, generator=g)
    b = torch.full((1,), 3000.0)  # z is positive
    screen = Screen.build(W, b, torch.zeros(1))
    s, zero, s2 = (float(screen.table[r, 0]) for r in (Row.SCALE, Row.ZERO, Row.SCALE2))
    first, second = (rows_of(c)[0, :256].double() for c in (screen.code, screen.code2))
    e2 = W[:, 0].double() - s * (first - zero) - s2 * (second - 128)
    steps = (e2 / e2.abs().max() * 127).round().float()
    steps[steps.abs().argmax()] = 127.0 * steps[steps.abs().argmax()].sign()
    x = steps[None]
    z = gsf.SparseLatents(*ops.encode(x, W, b, torch.tensor([-1e9]), 4e9), (1, 1)).values
    theta = just_below(z)
    screen = Screen.build(W, b, theta)
    for times in SOME:
        csr, stats = screened(x.repeat(times, 1), W, b, theta, screen, 2)
        assert (fired(csr), stats["violations"]) == (times, 0)
    exact = float(e2 @ steps.double())
    assert exact > 0.9 * float(screen.table[Row.ERROR2, 0]) * float(steps.norm())


# ---- what is built ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 5])
def test_rows_against_their_reference(isa, dtype, k):
    _, W, b, theta = problem(1, 203, 77, dtype)
    W[:, 5] = 0.0
    W[3, 6] = math.nan
    mu = torch.linspace(-3, 3, 203)
    directions = torch.randn(k, 203, generator=torch.Generator().manual_seed(2)) if k else None
    for second in (True, False):
        code, code2, table = ops.screen_rows(W, b, theta, mu, second, directions)
        with gsf.backend("eager"):
            want = ops.screen_rows(W, b, theta, mu, second, directions)
        assert torch.equal(code, want[0])
        assert torch.equal(code2, want[1])
        exact = [Row.SCALE, Row.ZERO, Row.SCALE2]
        assert torch.equal(table[exact], want[2][exact])
        # norms and biases: sums in fp64 in another order, then one rounding upwards
        torch.testing.assert_close(table, want[2], rtol=3e-7, atol=1e-9)
        assert table.shape == (len(Row) + k, 80)
        assert table_stride(16_384) == 16_384 + 16
    never = table[Row.START, :77] == math.inf
    assert never.nonzero().flatten().tolist() == [5, 6]
    assert bool((table[Row.START, 77:] == -math.inf).all())


def test_the_first_digit_is_the_nested_code():
    _, W, b, theta = problem(1, 130, 50)
    screen, codes = Screen.build(W, b, theta), quantize(W.t())
    assert torch.equal(rows_of(screen.code)[:50, :130], codes.q)
    assert torch.equal(screen.table[Row.SCALE, :50], codes.scale[:, 0])
    assert torch.equal(screen.table[Row.ZERO, :50], codes.zero_point[:, 0].float())


def test_norms_are_rounded_up():
    _, W, b, theta = problem(1, 333, 200)
    screen = Screen.build(W, b, theta)
    s, zero, s2 = (screen.table[r, :200].double()[:, None] for r in (Row.SCALE, Row.ZERO, Row.SCALE2))
    first, second = (rows_of(c)[:200, :333].double() for c in (screen.code, screen.code2))
    e = W.t().double() - s * (first - zero)
    e2 = e - s2 * (second - 128)
    for row, exact in ((Row.NORM, W.t().double()), (Row.ERROR, e), (Row.ERROR2, e2)):
        kept, true = screen.table[row, :200].double(), exact.norm(dim=1)
        assert bool((kept >= true).all())
        assert bool((kept <= true * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("digits", [0, 1, 2])
def test_opcheck(digits):
    x, W, b, theta = problem(5, 40, 30)
    torch.library.opcheck(torch.ops.gemmascope_fast.screen_rows.default, (W, b, theta, x[0], True, x[1:3]))
    screen = Screen.build(W, b, theta, directions=x[1:3])
    args = (x, W, b, theta, screen.code, screen.code2, screen.table, None, digits, 0.3, screen.directions, digits == 1)
    torch.library.opcheck(torch.ops.gemmascope_fast.encode_screened.default, args)
    grad = [t.clone().requires_grad_() for t in (x, W, b)]
    # opcheck's own backward fails for any op whose first output is integer; compiled gradients are checked below
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.gemmascope_fast.encode_screened.default, (*grad, *args[3:]), test_utils=tests)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_into_one_graph_with_the_same_bytes_and_gradients():
    torch._dynamo.reset()
    x, W, b, theta = problem(6, 33, 40)
    screen = Screen.build(W, b, theta)

    def call(*leaves):
        args = (*leaves, theta, screen.code, screen.code2, screen.table, None, 0, None)
        return ops.encode_screened(*args)[:3]

    run = torch.compile(call, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (run, call):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        csr = f(*leaves)
        assert same_bytes(csr, ops.encode(x, W, b, theta, None))
        csr[2].square().sum().backward()
        gradients.append([t.grad for t in leaves])
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_gradients_equal_those_of_the_full_encode():
    x, W, b, theta = problem(7, 60, 90)
    screen = Screen.build(W, b, theta)
    grads = []
    for run in (
        lambda a: ops.encode(*a, theta, None)[2],
        lambda a: ops.encode_screened(*a, theta, screen.code, screen.code2, screen.table, None, 0, None)[2],
    ):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        run(leaves).square().sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("T", [1, 3, 17, 70])
def test_mapped_rows_give_the_same_bytes(isa, T):
    """Few candidates a chunk, which wait for all chunks, and many, which do not; tokens that skip the screen."""
    for l0 in (20, 600):
        sae, x = make_sae(3, 203, 901, l0).requires_grad_(False), make_activations(4, T, 203)
        x[T // 2, 7] = math.nan
        weights, screen = (sae.W_enc, sae.b_enc, sae.threshold), sae.prepare()._prepared.screen
        *csr, stats = ops.encode_screened(x, *weights, *arrays(screen), 0, 0.1, screen.directions, True)
        assert same_bytes(csr, ops.encode(x, *weights, 0.1))
        assert stats[2:].tolist() == [0, 1]


def test_of_mapped_rows_the_second_digit_is_always_read():
    """Otherwise it is given up where the first 256 pairs that it looks at fire; here the others do not."""
    sae, x = make_sae(3, 256, 2048, 20).requires_grad_(False), make_activations(4, 1, 256).repeat(64, 1)
    sae.b_enc += 1000 - (x[:1] @ sae.W_enc + sae.b_enc)[0]
    sae.threshold.fill_(1005.0)  # nearer than the bound of one digit, farther than that of two
    sae.threshold[:512] = 995.0
    weights, screen = (sae.W_enc, sae.b_enc, sae.threshold), sae.prepare()._prepared.screen
    with threads(1):
        stats = [
            ops.encode_screened(x, *weights, *arrays(screen), digits, None, screen.directions, mapped)[3].tolist()[:2]
            for digits, mapped in ((0, False), (1, False), (0, True))
        ]
    assert stats == [[64 * 2048, 64 * 2048], [64 * 2048, 64 * 512], [64 * 2048, 64 * 512]]


def test_bad_arguments():
    x, W, b, theta = problem(2, 40, 30)
    screen = Screen.build(W, b, theta)
    good = [x, W, b, theta, screen.code, screen.code2, screen.table, None, 0, None, None]

    def call(**changed):
        args = list(good)
        for place, value in changed.items():
            args[int(place[1:])] = value
        return ops.encode_screened(*args)

    for wrong, match in (
        ({"_4": screen.code[1:]}, "code"),
        ({"_5": screen.code2[1:]}, "code2"),
        ({"_6": screen.table[1:]}, "table"),
        ({"_7": torch.zeros(3)}, "centre"),
        ({"_8": 3}, "digits"),
        ({"_9": 0.0}, "bandwidth"),
        ({"_0": x[:, 1:]}, "x"),
        ({"_10": torch.zeros(1, 39)}, "directions"),
        ({"_10": torch.zeros(129, 40)}, "directions"),
        ({"_10": torch.zeros(1, 40)}, "table"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**wrong)
    with pytest.raises(TypeError, match="code"):
        call(_4=screen.code.to(torch.int8))
    with pytest.raises(ValueError, match="centre"):
        Screen.build(W, b, theta, centre=torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        Screen.build(W, b, theta, centre=torch.full((40,), math.nan))
    for wrong in (torch.zeros(40), torch.zeros(2, 39), torch.zeros(0, 40), torch.zeros(41, 40)):
        with pytest.raises(ValueError, match="directions"):
            Screen.build(W, b, theta, directions=wrong)
    with pytest.raises(ValueError, match="finite"):
        Screen.build(W, b, theta, directions=torch.full((2, 40), math.inf))


# ---- the module: when a screen is used, and when it is of other weights --------------------------------


def test_none_true_and_false_give_the_same_bytes():
    sae, x = make_sae(1, 200, 900, 20), make_activations(2, 20, 200)
    none, on, off = (sae.encode_sparse(x, screen=s) for s in (None, True, False))
    assert none == on == off
    assert sae.packed_bytes() > 2 * 900 * 200
    assert sae.encode_sparse(x, screen=True, bandwidth=0.5) == sae.encode_sparse(x, bandwidth=0.5)


def edit_parameter(sae):
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach() * 1.7)


def edit_data(sae):
    sae.W_enc.data = sae.W_enc.data * 1.7


def edit_in_place(sae):
    with torch.no_grad():
        sae.W_enc.mul_(1.7)


def edit_threshold(sae):
    with torch.no_grad():
        sae.threshold.mul_(0.5)


def edit_bias(sae):
    with torch.no_grad():
        sae.b_enc.add_(3.0)


def edit_by_assignment(sae):
    state = {k: v * 1.3 for k, v in sae.state_dict().items()}
    sae.load_state_dict(state, assign=True)


def edit_dtype(sae):
    sae.to(torch.bfloat16)


@pytest.mark.parametrize(
    "edit",
    [edit_parameter, edit_data, edit_in_place, edit_threshold, edit_bias, edit_by_assignment, edit_dtype],
    ids=lambda f: f.__name__,
)
def test_edits_are_noticed(edit):
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    before = sae.encode_sparse(x, screen=True)
    edit(sae)
    after = sae.encode_sparse(x, screen=True)
    assert after == sae.encode_sparse(x, screen=False)
    assert after != before


def test_weights_laid_out_where_the_old_ones_lay_are_noticed():
    """Gemma Scope's layout given by `.data =` is laid out anew, often at the address that was just given back."""
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    for _ in range(20):
        sae.encode_sparse(x, screen=True)
        sae.W_enc.data = (sae.W_enc.data * 1.1).contiguous()
        assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)


def test_weights_edited_at_each_step_are_not_packed_at_each_step(monkeypatch):
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    built = []
    build = Screen.build.__func__
    monkeypatch.setattr(Screen, "build", classmethod(lambda cls, *a, **k: built.append(1) or build(cls, *a, **k)))
    sae.encode_sparse(x)
    assert len(built) == 1
    for _ in range(3):
        edit_in_place(sae)
        assert sae.encode_sparse(x) == sae.encode_sparse(x, screen=False)
    assert len(built) == 1
    sae.encode_sparse(x)  # the same weights a second time
    assert len(built) == 2


def test_what_nobody_can_see_is_caught_by_the_bound():
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    sae.encode_sparse(x, screen=True)
    sae.W_enc.data.mul_(1.5)
    with pytest.raises(gsf.StaleScreenError, match="force=True"):
        sae.encode_sparse(x, screen=True)
    sae.prepare(force=True)
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)


def test_prepare_keeps_its_options():
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 40, 200)
    sae.prepare(sample=x, directions=3)
    centre, directions = sae._prepared.screen.centre, sae._prepared.screen.directions
    torch.testing.assert_close(directions @ directions.t(), torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(centre, x.double().mean(0).float())
    edit_in_place(sae)
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    assert torch.equal(sae._prepared.screen.centre, centre)
    assert torch.equal(sae._prepared.screen.directions, directions)
    sae.prepare(second_digit=False)
    assert sae._prepared.screen.code2 is None
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    for wrong, match in (
        ({"sample": x, "centre": x[0]}, "sample, centre: expected at most one"),
        ({"sample": x[:, 1:]}, "sample: expected"),
        ({"centre": x[0, 1:]}, "centre: expected"),
        ({"directions": 3}, "directions: 3 of them"),
    ):
        with pytest.raises(ValueError, match=match):
            sae.prepare(**wrong)


def test_massive_dimensions_are_taken_out_unless_told():
    sae, x = make_sae(1, 640, 300, 20), make_activations(2, 40, 640)
    assert torch.equal(sae.prepare()._prepared.screen.directions.abs(), torch.eye(640)[163:164])
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    edit_in_place(sae)
    sae.encode_sparse(x, screen=True)
    assert sae._prepared.screen.directions is not None
    assert sae.prepare(directions=0)._prepared.screen.directions is None
    edit_in_place(sae)
    sae.encode_sparse(x, screen=True)
    assert sae._prepared.screen.directions is None
    with torch.no_grad():
        sae.b_dec[163] = 0.0
    assert sae.prepare(directions=None)._prepared.screen.directions is None


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("k", [None, 3])
def test_a_stored_screen_is_taken_and_not_built(tmp_path, monkeypatch, second, k):
    sae, x = make_sae(1, 200, 302, 20), make_activations(2, 40, 200)
    sae.prepare(sample=x, directions=k, second_digit=second)
    save(sae, tmp_path / "sae.safetensors", screen=True)
    monkeypatch.setattr(Screen, "build", None)  # a build would fail
    loaded = gsf.SAE.from_pretrained(tmp_path)
    assert loaded.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    for name, tensor in sae._prepared.screen.tensors().items():
        assert torch.equal(loaded._prepared.screen.tensors()[name], tensor)


def test_a_stored_screen_follows_a_cast_by_being_built_anew(tmp_path):
    sae, x = make_sae(1, 200, 302, 20), make_activations(2, 40, 200)
    save(sae, tmp_path / "sae.safetensors", screen=True)
    loaded = gsf.SAE.from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded._prepared.screen is None
    assert loaded.encode_sparse(x, screen=True) == loaded.encode_sparse(x, screen=False)
    with pytest.raises(ValueError, match="screen"):
        save(sae, tmp_path / "other.safetensors", torch.bfloat16, screen=True)


@pytest.mark.parametrize("name", ["W_enc", "threshold", "screen.code", "screen.code2", "screen.table"])
def test_a_stored_screen_of_other_weights_is_refused(tmp_path, name):
    path = tmp_path / "sae.safetensors"
    save(make_sae(1, 200, 302, 20), path, screen=True)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    at = 8 + length + (begin + end) // 2 // 4 * 4
    data[at] ^= 1  # the lowest bit of a mantissa, or of a code
    path.write_bytes(data)
    with pytest.raises(gsf.CheckpointError, match="screen"):
        gsf.SAE.from_pretrained(tmp_path)


def test_digest_sees_every_array():
    _, W, b, theta = problem(1, 40, 30)
    first = weights_digest(W, b, theta)
    assert first == weights_digest(W.clone(), b, theta)
    for other in ((W + 1e-3, b, theta), (W, b + 1, theta), (W, b, theta + 1), (W.bfloat16(), b, theta)):
        assert weights_digest(*other) != first


def test_without_a_native_kernel_the_screen_still_answers():
    sae, x = make_sae(1, 64, 100, 10), make_activations(2, 5, 64)
    with gsf.backend("eager"):
        on, off = sae.encode_sparse(x, screen=True), sae.encode_sparse(x, screen=False)
    assert on == off
    assert isinstance(np.asarray(on.values.detach()), np.ndarray)


@pytest.mark.parametrize(("theta", "scale", "looks"), [(0.0, 1.0, False), (2.5, 20.0, True)])
def test_the_second_look_goes_where_few_candidates_are_false(isa, theta, scale, looks):
    """Many tokens: where more than half of the first candidates fire, all but the first are refined unlooked at."""
    x, W, b, threshold = problem(160, 64, 512, theta=theta)
    # a wide digit step for all dimensions and nothing for the sums: many false candidates
    x[:, 5] *= scale
    W[5] = 0
    screen = Screen.build(W, b, threshold)
    with threads(1):
        want = ops.encode(x, W, b, threshold)
        got, own = screened(x, W, b, threshold, screen, 0, second=False)
        _, always = screened(x, W, b, threshold, screen, 1, second=False)
        _, both = screened(x, W, b, threshold, screen, 2, second=False)
    assert same_bytes(got, want)
    assert own["violations"] == 0
    if isa == "amx":  # both digits at once, and nothing left to look at
        assert own == both
        assert own["survivors"] < always["survivors"]
        return
    assert own["survivors"] == always["survivors"]
    assert (own["refined"] == always["refined"]) == looks
    # the first chunk's are looked at, to see
    assert own["refined"] < own["survivors"]
