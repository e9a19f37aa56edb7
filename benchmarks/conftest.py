"""What the pytest-benchmark files share: each times candidates of a bench of `gemmascope-fast dev bench`, whose cases,
peers and checks are in gemmascope_fast/dev/bench.

GSF_BENCH_CASES=640x4096,real chooses the cases, of those in gemmascope_fast/dev/bench/cases.py.
"""

import functools
import os

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.dev.bench.cases import CASES
from gemmascope_fast.dev.bench.machine import describe

CHOSEN = os.environ.get("GSF_BENCH_CASES", "640x4096,2304x16384").split(",")
TOKENS = (1, 16, 256)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        runs = [(CASES[name], tokens) for name in CHOSEN for tokens in CASES[name].tokens if tokens in TOKENS]
        metafunc.parametrize(("case", "tokens"), runs, ids=[f"{case.name}-T{tokens}" for case, tokens in runs])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@functools.lru_cache(maxsize=1)  # the candidates of a bench follow each other
def built(make, *args):
    return make(*args)


@pytest.fixture
def timed(benchmark):
    """Time one candidate of the bench that `make(*args)` gives; skips where it is not installed or answers wrongly."""

    def run(impl, make, *args):
        bench = built(make, *args)
        if impl in bench.missing:
            pytest.skip(bench.missing[impl])
        (candidate,) = (c for c in bench.candidates if c.impl == impl)
        benchmark.group = bench.name
        work = candidate.work._asdict() if candidate.work else {}
        benchmark.extra_info.update(l0=bench.l0, **work, **candidate.verdict._asdict())
        benchmark(candidate.call)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(describe(torch.get_num_threads()), gemmascope_fast=gsf.__version__)
