"""The roof: the loops do the work that they are credited with, on every instruction set; shares are sums done right."""

import json

import pytest
import torch

from gemmascope_fast import backends
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev import roof


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(roof, "MIN_READ_BYTES", 1 << 20)
    monkeypatch.setattr(roof, "last_level_cache", lambda: 1 << 16)


def test_the_loops_answer_on_every_instruction_set(isa):
    """The native side raises where a loop's sum is not that of the work it is credited with."""
    found = roof.measure(1)
    assert (found.threads, found.isa) == (1, isa)
    rates = (found.read_gb_s, found.fma_gflop_s, found.int8_gop_s)
    # physical limits, not expectations: no core of 2026 runs 1e5 Gop/s, reads 1e4 GB/s, or manages less than 1e-3
    assert all(1e-3 < rate < 1e5 for rate in rates)
    assert found.spread >= 0


def test_threads_are_restored_and_checked():
    before = torch.get_num_threads()
    roof.measure(1)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        roof.measure(0)


def test_share_takes_the_binding_limit():
    r = roof.Roof(2, "avx512", read_gb_s=10, fma_gflop_s=100, int8_gop_s=1000, spread=0)
    assert r.seconds(10e9) == 1
    assert r.seconds(10e9, flops=200e9) == 2
    assert r.seconds(10e9, flops=200e9, int_ops=4000e9) == 4
    assert r.share(8, 10e9, 200e9, 4000e9) == 0.5


def test_last_level_cache_is_a_size(monkeypatch):
    monkeypatch.undo()
    assert 1 << 18 <= roof.last_level_cache() < 1 << 40


def test_without_the_extension_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "NATIVE_MISSING", "not compiled here")
    with pytest.raises(backends.BackendError, match="not compiled here"):
        roof.measure()


def test_command_prints_one_row_per_thread_count(capsys):
    assert cli.main(["dev", "roof", "--threads", "1", "2", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["threads"] for row in rows] == [1, 2]
    assert {row["isa"] for row in rows} == {backends.isa()}
