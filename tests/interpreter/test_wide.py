"""Offsets beyond 2^31: T * d_sae of 2^34, where slots alone are 2^31 numbers.  Pages that are not touched use no
memory; only the last program of each launch runs, which has the largest offsets."""

import pytest
import torch
from test_screen import screen_of

from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import encode, screen, tensor

T, F, D = 2**17 + 1, 2**17, 16


@pytest.fixture(scope="module")
def weights():
    g = torch.Generator().manual_seed(0)
    x, rows = torch.zeros(T, D), torch.randn(F, D, generator=g)
    x[-1] = torch.randn(D, generator=g)
    return x, encode.Weights(rows, torch.randn(F, generator=g), torch.rand(F, generator=g))


def check(words, x, w, exact=True):
    tail = slice(F - 32, F)
    crow, col, values = ops.encode(x[-1:], w.rows[tail].t(), w.bias[tail], w.threshold[tail], None)
    assert words.slots.numel() > 2**31
    n = int(crow[1])
    assert n > encode.SLOTS
    assert int(words.count[-1, -1]) == n
    bits = int(words.bitmap[-1, -1]) & 0xFFFFFFFF
    assert [i for i in range(32) if bits >> i & 1] == col.tolist()
    if exact:
        assert torch.equal(words.slots[-1, -1], values[: encode.SLOTS])
    else:  # products of tf32: both factors are off by a part in 2^11
        size = (x[-1].abs() @ w.rows[tail][col[: encode.SLOTS].long()].abs().t()) * 2**-10
        assert bool(((words.slots[-1, -1] - values[: encode.SLOTS]).abs() <= 1.01 * size + 1e-5).all())


def test_exact(last_program, weights):
    check(encode.fill_words(*weights, None), *weights)


def test_tensor(last_program, weights):
    check(tensor.fill_tensor(*weights), *weights, exact=False)


def test_screened(last_program, weights):
    x, w = weights
    check(screen.fill_screened(x, w, screen_of(w.rows, w.bias, w.threshold), None), x, w)


def test_gather(last_program, weights):
    x, w = weights
    words = encode.Words.empty(x, F)
    here = slice(-encode.GATHER_WORDS, None)
    words.bitmap[-1, here], words.count[-1, here], words.slots[-1, here] = 3, 2, 0.5
    total = torch.empty(words.count.numel(), dtype=torch.int64)
    total[-1 - encode.GATHER_WORDS] = 1
    crow, col, values = encode.gather(x, w, words, total, 1 + 2 * encode.GATHER_WORDS)
    assert int(crow[-1]) == 1 + 2 * encode.GATHER_WORDS
    first = F - 32 * encode.GATHER_WORDS
    assert col[1:].tolist() == [first + 32 * i + j for i in range(encode.GATHER_WORDS) for j in (0, 1)]
    assert bool((values[1:] == 0.5).all())
