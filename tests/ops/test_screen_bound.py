"""The bound of the certified screen: each of its terms alone is needed."""

import itertools
import math

import pytest
import torch
from screen_problems import FORMS, SOME, screened

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.ops.screen_rows import Row, rows_of
from gemmascope_fast.sae.screen import Screen


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
    """Rows and tokens on their grids: what is left of the bound is its rounding, written again from
    docs/how/screen.md.  A
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


def on_grids(d, F, size):
    """(W [d, F], x [1, d]) that equal their first digits: rows of scale `size` and zero point 128, an activation of
    scale 1."""
    g = torch.Generator().manual_seed(11)
    steps = torch.randint(-127, 128, (d, F), generator=g).float()
    steps[0], steps[1] = -128.0, 127.0
    digit = torch.randint(-127, 128, (1, d), generator=g).float()
    digit[0, 1] = 127.0
    return steps * size, digit


def kappa(d):
    return 1.01 * (math.ceil(d / 16) + 6) * 2.0**-24


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("k", [0, 3])
def test_underflow_alone(isa, digits, k):
    """s t is subnormal and rounded down by nearly half its last bit: a part in 2^16 of ẑ, where all other terms of the
    bound are parts in 2^20."""
    W, digit = on_grids(64, 8, 2.0**-68)
    digit = digit.abs() * W[:, 0].sign()  # the first row's pre-activation is large, as is what its ẑ loses
    t = (1 + 7 * 2.0**-19) * 2.0**-66  # s t = t 2^-68: a multiple of 2^-149 and 7/16 of it
    x = t * digit
    x[0, :k] *= 1000 * 2.0**-10  # what the directions take out is not on the grid
    b = torch.zeros(8)
    z = gsf.SparseLatents(*ops.encode(x, W, b, torch.full((8,), -1.0), 4.0), (1, 8)).to_dense()[0]
    assert float(z[0]) > 0
    assert float(z.abs().max()) < 2.0**-110
    theta = just_below(z)
    screen = Screen.build(W, b, theta, directions=torch.eye(64)[:k] if k else None)
    assert int(screen.table[Row.START, :8].isinf().sum()) == 0
    for times in SOME:
        csr, stats = screened(x.repeat(times, 1), W, b, theta, screen, digits)
        assert stats["rest"] == 0
        assert same_bytes(csr, ops.encode(x.repeat(times, 1), W, b, theta, None))
        assert fired(csr) >= times


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("k", [0, 4])
def test_the_epilogues_rounding_is_bounded_by_what_the_page_derives(isa, digits, k):
    """As above without a large centre, beside which the epilogue's own seven roundings are nothing: here they are a
    third of the bound."""
    d, F, u = 64, 24, 2.0**-24
    W, x = on_grids(d, F, 1 / 128)
    W[2 : 2 + k] = 0.0  # the directions lie where neither rows nor activations have anything
    x[0, 2 : 2 + k] = 0.0
    b, norm_x = torch.zeros(F), x.double().norm()
    exact = (x.double() @ W.double())[0]
    error = (kappa(d) + 1.01 * u * (2 if k else 1) + (7 + 1.02 * k) * u) * norm_x
    bound = W.double().norm(dim=0) * error + (5 + 1.02 * k) * u * exact.clamp(min=0)
    positive = int((exact > bound).sum())
    assert positive > 6
    for share, left in ((0.96, positive), (1.04, 0)):
        theta = (exact + share * bound).float()
        theta[exact <= bound] = 1e9
        screen = Screen.build(W, b, theta, directions=torch.eye(d)[2 : 2 + k] if k else None)
        for times in SOME:
            _, stats = screened(x.repeat(times, 1), W, b, theta, screen, digits, second=False)
            assert stats["survivors"] == times * left


@pytest.mark.parametrize("digits", [1, 2])
def test_the_second_digits_bound_has_the_norm_of_both_digits(isa, digits):
    """B₂ = ‖e₂‖R + ‖w‖E + β with both digits of the activations, as docs/how/screen.md writes it.  Most entries of this
    token are 1.496 steps, so that a tenth of its norm is in its second digits."""
    d, F, u = 4096, 8, 2.0**-24
    g = torch.Generator().manual_seed(12)
    W, b = torch.randn(d, F, generator=g), torch.full((F,), 1000.0)
    first, second = torch.randn(1, d, generator=g).sign(), torch.full((1, d), 127.0)
    first[0, 0], second[0, 0] = 127.0, 0.0
    x = first + first.sign() * second / 256
    norm1, norm2, norm = (v.double().norm() for v in (first, second / 256, x))
    screen = Screen.build(W, b, torch.zeros(F))
    s2, error2, norm_w, slack = (screen.table[r, :F].double() for r in (Row.SCALE2, Row.ERROR2, Row.NORM, Row.SLACK))
    codes = (rows_of(c)[:F, :d].double() for c in (screen.code, screen.code2))
    near = screen.table[Row.SCALE, :F].double()[:, None] * (next(codes) - screen.table[Row.ZERO, :F, None])
    near = near + s2[:, None] * (next(codes) - 128)
    estimate = (near @ x[0].double()) + b
    reach = norm + 7 * u * (norm1 + norm2)
    error = (kappa(d) + 1.01 * u) * norm + 7 * u * (norm1 + norm2)
    bound = error2 * reach + norm_w * error + slack
    assert bool((error2 * reach > 0.4 * bound).all())
    for share, left in ((0.98, F), (1.02, 0)):
        theta = (estimate + share * bound).float()
        screen = Screen.build(W, b, theta)
        for times in SOME:
            _, stats = screened(x.repeat(times, 1), W, b, theta, screen, digits)
            assert (stats["survivors"], stats["refined"]) == (times * F, times * left)


@pytest.mark.parametrize("digits", [1, 2])
def test_a_bandwidth_has_the_epilogues_rounding_too(isa, digits):
    """Pre-activations far below zero and an edge θ − ε/2 beside them: its five roundings are a quarter of the bound."""
    d, u = 16, 2.0**-24
    W, _ = on_grids(d, 1, 1 / 128)
    x = (-128 * W.t()).clamp(-127, 127)
    z = float(x.double() @ W.double())
    bound = float(W.double().norm() * x.double().norm()) * (kappa(d) + 8.01 * u) - 5 * u * z
    b = theta = torch.zeros(1)
    screen = Screen.build(W, b, theta)
    for share, left in ((0.92, 1), (1.15, 0)):
        half = torch.tensor(-(z + share * bound)).float()
        for times in SOME:
            rows = x.repeat(times, 1)
            csr, stats = screened(rows, W, b, theta, screen, digits, bandwidth=2 * float(half))
            assert stats["survivors"] == times * left
            assert same_bytes(csr, ops.encode(rows, W, b, theta, 2 * float(half)))


@pytest.mark.parametrize(("digits", "second"), FORMS)
def test_the_certificate_is_as_tight_as_the_bound(isa, digits, second):
    """A bias edited by half the bound is within it, by twice the bound every refined pair says so."""
    d, F, u = 64, 8, 2.0**-24
    W, x = on_grids(d, F, 1 / 128)
    b, theta = torch.full((F,), 500.0), torch.full((F,), -1e9)
    bound = W.double().norm(dim=0) * x.double().norm() * (kappa(d) + 8.01 * u)
    bound += kappa(d) * 500 + 5 * u * 500
    screen = Screen.build(W, b, theta.clamp(min=0))
    assert float(screen.table[Row.ERROR, :F].max()) < 1e-12
    for share, outside in ((0.5, False), (2.0, True)):
        for times in SOME:
            edited = b + (share * bound).float()
            _, stats = screened(x.repeat(times, 1), W, edited, theta.clamp(min=0), screen, digits, second)
            assert stats["refined"] > 0
            assert stats["violations"] == (stats["refined"] if outside else 0)
