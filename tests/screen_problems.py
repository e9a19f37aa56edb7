"""Helpers for the tests of the certified screen: random problems, and every form of the screen on one of them."""

import itertools
import math

import torch

from gemmascope_fast import ops
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.sae.screen import Screen

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
