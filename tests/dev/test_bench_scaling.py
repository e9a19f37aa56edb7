"""Scaling: exponents and the reasons of bends from rows alone; the suite's own SAEs, memory and refusals."""

from dataclasses import replace

import pytest
import torch

from gemmascope_fast.dev.bench import exponents as growth
from gemmascope_fast.dev.bench import suite_scaling as scaling
from gemmascope_fast.dev.bench.engine import time_bench
from gemmascope_fast.dev.bench.exponents import exponents, reason
from gemmascope_fast.dev.bench.rows import Row
from gemmascope_fast.dev.testing import compare_support

ROOF = {"read_gb_s": 10.0, "fma_gflop_s": 100.0, "int8_gop_s": 1000.0}
BASE = Row("scaling", "width", "ours", 1, 64, 256, 5.0, "fp32", 2, 1.0, 0.9, 1.1, 10**7, 10**6, 1.0, None, None, None)


EAGER = {"impl": "eager fp32", "roof_share": 0.2, "median_ms": 5.0}


def at(width, ms, spread=0.01):
    return replace(BASE, d_sae=width, median_ms=ms, p20_ms=ms * (1 - spread), p80_ms=ms * (1 + spread))


def test_a_bend_that_the_spread_of_its_ends_explains_is_called_noise():
    def said(spread):
        (curve,) = exponents([at(1024, 1.0, spread), at(2048, 1.0, spread), at(4096, 8.0, spread)], ROOF)
        return [bend.split(", ", 1)[1] for bend in curve["bends"]]

    assert not any("noise" in bend for bend in said(0.1))
    assert all("allow" in bend and "within the noise" in bend for bend in said(0.6))


def test_exponents_are_slopes_of_each_curve():
    (curve,) = exponents([at(2**k, 2.0 ** (k - 10)) for k in range(14, 18)], ROOF)
    assert curve["exponent"] == pytest.approx(1)
    assert curve["bends"] == []
    (curve,) = exponents([at(4096, 8.0), at(1024, 1.0), at(2048, 1.0)], ROOF)
    assert curve["exponent"] == pytest.approx(1.5)
    assert [bend.split(",")[0] for bend in curve["bends"]] == ["1024 → 2048: 0.00", "2048 → 4096: 3.00"]


def test_the_number_of_saes_is_an_axis():
    rows = [replace(BASE, op=f"layers {k}", median_ms=float(k)) for k in (1, 4, 2)]
    (curve,) = exponents(rows, ROOF)
    assert [p[0] for p in curve["points"]] == [1, 2, 4]
    assert (curve["op"], curve["at"], curve["exponent"]) == ("layers", "64 × 256", pytest.approx(1))


def test_l0_is_an_axis_by_what_fires(small):
    rows = [replace(BASE, op=f"l0 {k}", l0=k + 0.5, median_ms=k + 0.5) for k in (1, 4, 2)]
    (curve,) = exponents(rows, ROOF)
    assert [p[0] for p in curve["points"]] == [1.5, 2.5, 4.5]
    assert (curve["op"], curve["at"], curve["exponent"]) == ("l0", "T = 1", pytest.approx(1))
    plans = [plan for plan in scaling.scaling_suite([small]) if plan.op.startswith("l0")]
    assert len({plan.name for plan in plans}) == len(plans) == 2 * len(scaling.L0S)
    few, many = (plan.build().l0 for plan in plans if plan.T == 256 and plan.op in ("l0 10", "l0 160"))
    assert 5 < few < many / 8


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        # 50 GB/s and 10: five times what memory gives, then its roof
        ({"median_ms": 0.2, "roof_share": 5.0}, {"bytes": 10**8, "median_ms": 10.0}, "100 MB leave the caches"),
        # memory's second is its bytes', the other's its operations'
        ({}, {"flops": 10**9, "median_ms": 10.0}, "memory bounds the first, arithmetic the second"),
        ({"roof_share": 0.2, "median_ms": 5.0}, {}, "what every call costs weighs less: 20% and 100%"),
        ({}, {"roof_share": 0.2, "median_ms": 5.0}, "further from the roof: 100% and 20%"),
        (
            {"impl": "eager fp32"},
            {**EAGER, "T": 64, "d_sae": 2**20},
            "its dense latents take 268 MB, which each of its",
        ),
        ({"impl": "eager fp32"}, {**EAGER, "T": 64, "d_sae": 2**20}, "writes to memory"),
        ({"impl": "eager fp32"}, {**EAGER, "T": 64, "d_sae": 2**16}, "a cache that cores share"),
        ({"impl": "eager fp32"}, EAGER, "the rows do not show why"),
        ({"T": 9}, {"T": 9, "roof_share": 0.2, "median_ms": 5.0}, "candidates that do not fire"),
        ({"threads": 1}, {}, "threads share one memory"),
        ({}, {"bytes": 2 * 10**7, "median_ms": 2.0}, "the bytes grow like this"),
        ({"roof_share": None}, {}, "no roof was measured"),
    ],
)
def test_a_bend_is_explained_by_what_the_rows_say(monkeypatch, before, after, said):
    monkeypatch.setattr(growth, "last_level_cache", lambda: 32 << 20)
    assert said in reason(replace(BASE, **before), replace(BASE, **after), ROOF)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(scaling, "PART", 256)
    return scaling.Drawn("64x640", 64, 640, 20.0)


def test_a_wide_sae_is_drawn_in_parts_and_fires_as_often(small):
    assert not small.made
    sae, x = small.sae, small.x(200)
    assert small.made
    assert (sae.d_in, sae.d_sae) == (64, 640)
    latents = sae.encode_sparse(x)
    assert 10 < latents.nnz / 200 < 40
    assert compare_support(latents, x, sae).equal
    thirds = torch.bincount(latents.col_indices // 256, minlength=3)
    assert bool((thirds > 0).all())
    rows = sae.W_enc.t()
    assert not torch.equal(rows[:256], rows[256:512])


def test_what_does_not_fit_is_a_row_of_the_missing_that_says_so(small, monkeypatch):
    monkeypatch.setattr(scaling, "available_memory", lambda: 10_000)
    bench = scaling._bench("width", small, 64)
    assert not small.made
    missing = time_bench(bench, None, 2, 0).missing
    assert set(missing) == {"scaling/width/T=64/64x640/ours", "scaling/width/T=64/64x640/eager fp32"}
    assert all("GB are free" in why for why in missing.values())


def test_an_sae_that_was_made_is_not_counted_twice(small):
    before = scaling.memory_needed(small, 1)
    sae = small.sae.prepare()
    held = sum(p.numel() * 4 for p in sae.parameters()) + sae.packed_bytes()
    assert 0.9 * held < before - scaling.memory_needed(small, 1) < 1.3 * held


def test_memory_is_what_the_tensors_hold(small):
    bench = scaling._bench("width", small, 1)
    (held,) = time_bench(bench, None, 2, 0).memory
    assert held["fp32_bytes"] == 4 * (2 * 64 * 640 + 640 + 640 + 64)
    assert held["screen_bytes"] == small.sae.packed_bytes() > 2 * 64 * 640


def test_saes_in_turn_are_timed_together(small):
    bench = scaling._layers_bench("layers 3", small, 3)
    one, three = (scaling._layers_bench(f"layers {k}", small, k).candidates for k in (1, 3))
    assert [c.work.bytes for c in three] == [3 * c.work.bytes for c in one]
    outs = bench.candidates[0].call()
    assert len(outs) == 3
    assert torch.equal(outs[0], small.sae(small.x(1)))
