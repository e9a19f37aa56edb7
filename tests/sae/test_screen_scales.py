"""Scales of the screen: powers of two that balance dimensions, change no byte and leave fewer candidates."""

import math

import pytest
import torch
from screen_problems import problem, screened

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes
from gemmascope_fast.ops.screen_rows import screen_rows_reference
from gemmascope_fast.sae.screen import Screen, balancing_scales, decoder_spread


def powers(d, most=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.randint(0, most + 1, (d,), generator=g).float())


# 2^57: the token's norm is above the 2^60 from which it would skip the screen, over its scales it is below
@pytest.mark.parametrize("size", [1.0, 2.0**57])
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("digits", [1, 2])
def test_a_scaled_screen_is_the_screen_of_scaled_weights_and_activations(isa, T, digits, size):
    """Bit for bit, table and decisions, where nothing under- or overflows."""
    x, W, b, theta = problem(T, 100, 67)
    x, W = x * size, W / size
    s, centre = powers(100, 8), torch.linspace(-size, size, 100)
    scaled = Screen.build(W, b, theta, centre=centre, scales=s)
    plain = Screen.build(W * s[:, None], b, theta, centre=centre / s)
    for name in ("code", "code2", "table"):
        assert torch.equal(getattr(scaled, name), getattr(plain, name))
    got, stats = screened(x, W, b, theta, scaled, digits)
    _, want = screened(x / s, W * s[:, None], b, theta, plain, digits)
    assert stats == want
    assert stats["rest"] == 0
    assert size == 1 or bool((x.norm(dim=1) > 2.0**60).any())
    assert same_bytes(got, ops.encode(x, W, b, theta, None))


@pytest.mark.parametrize("size_x", [1e-44, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("size_w", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_scales_that_leave_the_range_of_fp32_change_no_byte(isa, size_x, size_w):
    x, W, b, theta = problem(20, 70, 30)
    x, W = x.clamp(-1, 1) * size_x, W.clamp(-1, 1) * size_w
    b, theta = b * size_x * size_w, (theta - 1.5) * size_x * size_w
    for some in (1, 20):
        for digits in (1, 2):
            screen = Screen.build(W, b, theta, scales=powers(70))
            got, stats = screened(x[:some], W, b, theta, screen, digits)
            assert same_bytes(got, ops.encode(x[:some], W, b, theta, None))
            assert stats["violations"] == 0


@pytest.mark.parametrize("bad", [3.0, 0.5, 2.0**21, -1.0, 0.0, math.nan, math.inf])
def test_other_scales_are_refused(bad):
    x, W, b, theta = problem(2, 9, 5)
    s = torch.ones(9)
    screen = Screen.build(W, b, theta, scales=s)
    s = s.clone()
    s[4] = bad
    with pytest.raises(ValueError, match="expected powers of two"):
        Screen.build(W, b, theta, scales=s)
    with pytest.raises(ValueError, match="expected powers of two"):
        screen_rows_reference(W, b, theta, None, True, None, s)
    with pytest.raises(ValueError, match="expected powers of two"):
        ops.encode_screened(
            x, W, b, theta, screen.code, screen.code2, screen.table, None, 0, None, None, False, s
        )  # fmt: skip
    with pytest.raises(ValueError, match="scales"):
        Screen.build(W, b, theta, scales=torch.ones(8))


def test_rows_against_their_reference_with_scales(isa):
    _, W, b, theta = problem(1, 70, 130)
    s, centre = powers(70), torch.linspace(-1, 1, 70)
    directions = torch.nn.functional.one_hot(torch.tensor([3, 8]), 70).float()
    code, code2, table = ops.screen_rows(W, b, theta, centre, True, directions, s)
    want, want2, table_want = screen_rows_reference(W, b, theta, centre, True, directions, s)
    assert (code.int() - want.int()).abs().max() <= 1
    assert torch.allclose(table, table_want, rtol=1e-4, equal_nan=True)
    assert code2.shape == want2.shape


def test_balancing_leaves_fewer_candidates():
    """Dimensions of unequal spread, as a residual stream's, whose rows are unequal the other way."""
    g = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.randn(640, generator=g))
    sae, x = make_sae(3, 640, 2048, 40).requires_grad_(False), make_activations(4, 300, 640)
    x = x * spread
    W = (sae.W_enc.t() / spread).t()
    b_dec = sae.b_dec * spread
    scales = balancing_scales(W, x[100:].std(0))
    left = []
    for s in (None, scales):
        screen = Screen.build(W, sae.b_enc, sae.threshold, centre=b_dec, scales=s)
        csr, stats = screened(x[:64], W, sae.b_enc, sae.threshold, screen, digits=1)
        assert same_bytes(csr, ops.encode(x[:64], W, sae.b_enc, sae.threshold, None))
        left.append(stats["survivors"] - len(csr[1]))
    assert left[1] < 0.4 * left[0]


def test_a_module_balances_by_its_decoder_or_by_a_sample():
    sae = make_sae(3, 64, 256, 10).requires_grad_(False)
    sae.W_dec.mul_(torch.linspace(0.01, 3, 64))
    sae.prepare()
    want = balancing_scales(sae.W_enc, decoder_spread(sae.W_dec), sae.screen_directions())
    assert torch.equal(sae.screen_cache.screen.scales, want)
    assert want.unique().numel() > 3
    x = make_activations(4, 300, 64) * torch.linspace(0.01, 3, 64)
    sae.prepare(sample=x)
    held = sae.screen_cache.screen.scales
    assert torch.equal(held, balancing_scales(sae.W_enc, x.std(0, correction=0), sae.screen_directions()))
    assert not torch.equal(held, want)
    sae.W_enc.mul_(2)  # a rebuild keeps the sample
    sae.encode_sparse(x[:2], screen=True)
    assert torch.equal(sae.screen_cache.screen.scales, held)
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    assert gsf.JumpReLUTranscoder.from_weights(**weights).screen_scales() is None  # its decoder writes elsewhere


def test_what_the_scales_are():
    W = torch.ones(6, 10)
    spread = torch.tensor([1.0, 2.0**8, 2.0**-8, 2.0**80, 0.0, math.nan])
    massive = torch.nn.functional.one_hot(torch.tensor([3]), 6).float()
    assert balancing_scales(W, spread).tolist() == [2.0**6, 2.0**9, 2.0**3, 2.0**12, 1.0, 2.0**6]
    assert balancing_scales(W, spread, massive).tolist() == [2.0**6, 2.0**9, 2.0**3, 2.0**6, 1.0, 2.0**6]
    W[1] *= 2.0**8  # the rows' size counts against the activations'
    assert balancing_scales(W, spread)[1] == 2.0**6
    assert decoder_spread(torch.tensor([[1.0, 3.0], [1.0, 0.0]])).tolist() == pytest.approx([1.0, 4.5])
