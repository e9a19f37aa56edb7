"""The benchmark engine: verified before timed, paired, comparable, and able to say that something is wrong."""

import gc
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemmascope_fast.bank import Bank, BankedSAE
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev.bench import cases, command, compare, machine, peers, suite_modules, suite_ops, timing
from gemmascope_fast.dev.bench import run as run_module
from gemmascope_fast.dev.bench.cases import Case
from gemmascope_fast.dev.bench.checks import Truth, close
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Work, WrongAnswer, roof_share, time_bench
from gemmascope_fast.dev.bench.rows import Ratio, Results, Row
from gemmascope_fast.dev.bench.run import QUICK, few_copies, noise
from gemmascope_fast.dev.bench.suite_modules import modules_suite
from gemmascope_fast.dev.bench.suite_ops import ops_suite
from gemmascope_fast.dev.roof import Roof
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.errors import GemmaScopeFastError
from gemmascope_fast.ops.latents import SparseLatents

ROOF = Roof(2, "avx512", read_gb_s=10, fma_gflop_s=100, int8_gop_s=1000, spread=0)


def row(impl="ours", T=1, **more):
    base = Row("ops", "encode", impl, T, 64, 256, 5.0, "fp32", 2, 1.0, 0.9, 1.1, 10, 20, 0.5, 1e-6, True, 0)
    return replace(base, **more)


def test_every_round_times_every_call_and_the_order_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.interleave(calls, 0)
    assert {len(t) for t in times.values()} == {timing.LEAST_ROUNDS}
    rounds = ["".join(r) for r in itertools.zip_longest(*[iter(order[3:])] * 3)]  # three warm-up calls
    assert rounds[:4] == ["abc", "bca", "cab", "abc"]


def test_a_call_may_count_what_it_measured_itself():
    times = timing.interleave({"own": lambda: timing.Seconds(7.0), "clock": lambda: 7.0}, 0)
    assert set(times["own"]) == {7.0}
    assert max(times["clock"]) < 1


def test_paired_ratios_cancel_what_slows_a_whole_round():
    burst = np.array([1, 1, 5, 1, 3.0])
    ratio = timing.paired(4 * burst, 2 * burst)
    assert (ratio.median, ratio.p20, ratio.p80) == (2, 2, 2)


def test_copies_of_the_weights_fit_the_memory(monkeypatch):
    monkeypatch.setattr(cases, "last_level_cache", lambda: 300 << 20)
    monkeypatch.setattr(cases, "total_memory", lambda: 24 << 30)
    for weights in (640 * 4096, 2304 * 16384, 2304 * 65536):
        assert 18 * weights * (cases.sae_copies(weights, 1) + 1) > 11 << 30
        assert 18 * weights * cases.sae_copies(weights, 1) <= 12 << 30
    assert cases.sae_copies(640 * 4096, 17) == 1
    assert cases.copy_count(1 << 20, 1) == 1200  # nothing but the weights themselves in a copy
    results = Results(machine={}, rows=[row(T=1, d_in=640, d_sae=4096), row(T=64, d_in=2304, d_sae=65536)])
    (said,) = few_copies(results)
    assert "640 × 4096" in said
    assert "2.3 times" in said
    monkeypatch.setattr(cases, "last_level_cache", lambda: 32 << 20)
    assert cases.sae_copies(640 * 4096, 1) == 52
    assert few_copies(results) == []


def test_the_layers_of_a_linear_bench_fit_half_of_the_memory_together(monkeypatch):
    monkeypatch.setattr(cases, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(cases, "total_memory", lambda: 1 << 20)
    held = []  # bytes of each implementation's layers

    def counted(size, T, of):
        count = cases.copy_count(size, T, of)
        held.append(count * of // suite_ops.LINEAR_POOLS)
        return count

    monkeypatch.setattr(suite_ops, "copy_count", counted)
    bench = suite_ops.linear_bench(64, 64, 1)
    assert len(bench.candidates) >= 5
    assert len(held) <= suite_ops.LINEAR_POOLS
    assert max(held) > 1 << 14  # there is more than one of most
    assert sum(held) <= 1 << 19


def test_copies_of_one_shape_are_let_go_before_the_next(monkeypatch):
    monkeypatch.setattr(run_module, "measured_roof", lambda threads: None)
    monkeypatch.setattr(cases, "last_level_cache", lambda: 1 << 14)  # a few copies are enough
    held = []  # lists of copies that are kept, when a bench is built

    def plan(d_sae, keep):
        def build():
            held.append(cases._copies.cache_info().currsize)
            if keep:
                cases.rotated(make_sae(0, 16, d_sae, 2), 64)
            return Bench("ops", "nothing", 1, 16, d_sae, None)

        return Plan("ops", "nothing", 1, 16, d_sae, build)

    monkeypatch.setattr(run_module, "plans", lambda options: [plan(32, True), plan(32, True), plan(64, False)])
    cases.forget_copies()
    run_module.run_suites(QUICK, say=lambda name: None)
    assert held == [0, 1, 0]


@pytest.fixture
def tiny(monkeypatch):
    """One tiny shape with several copies of its weights, and torch.compile left out: it alone takes minutes."""
    monkeypatch.setattr(cases, "last_level_cache", lambda: 1 << 14)
    monkeypatch.setattr(suite_ops, "last_level_cache", lambda: 1 << 14)
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 3)
    return Case("64x256", 64, 256, 12, (1, 3))


@pytest.mark.parametrize("suite", [ops_suite, modules_suite])
def test_suites_verify_and_time_every_candidate(tiny, suite):
    results = Results(machine={})
    with torch.inference_mode():
        for plan in suite([tiny]):
            bench = plan.build()
            assert bench.name == plan.name
            part = time_bench(bench, ROOF, 2, 0)
            assert {r.impl for r in part.rows} >= {"eager fp32"}
            assert any(r.impl.startswith("ours") for r in part.rows)
            results.rows += part.rows
            results.ratios.update(part.ratios)
    assert all(0 < r.p20_ms <= r.median_ms <= r.p80_ms for r in results.rows)
    ours = [r for r in results.rows if r.op in ("encode", "encode (warm)") and r.impl.startswith("ours")]
    assert bool(ours) == (suite is ops_suite)
    assert all(r.support_equal for r in ours)
    # few tokens have a warm figure beside, which rests on one copy
    assert any(r.op.endswith("(warm)") for r in results.rows)
    assert all(r.key in results.ratios for r in results.rows if r.impl != "eager fp32")


def test_a_banks_calls_go_round_its_saes_by_the_route_that_is_named(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(suite_modules.tempfile, "tempdir", str(tmp_path))
    banks = []
    monkeypatch.setattr(suite_modules, "Bank", lambda *a, **k: banks.append(Bank(*a, **k)) or banks[-1])
    with torch.inference_mode():
        bench = suite_modules.bank_bench(tiny, 1)
        resident, one = banks
        assert bench.missing == {}
        ours, anew, eager = bench.candidates
        assert (ours.impl, anew.impl, eager.impl) == ("ours", "ours, budget of one", "eager fp32")
        assert len(resident) == cases.sae_copies(64 * 256, 1) == 4
        assert ours.verdict.support_equal
        assert ours.verdict.support_flips_vs_eager is not None
        for candidate, bank, loads in ((ours, resident, 0), (anew, one, 8)):
            before = bank.stats.loads
            for _ in range(8):
                assert torch.equal(candidate.call(), tiny.sae(tiny.x(1)))
            assert bank.stats.loads - before == loads
        assert len({resident[n].lease().module.W_enc.data_ptr() for n in resident}) == 4
        assert one.held()["device"]["peak"] == one.held()["device"]["budget"] < 2 * one[next(iter(one))].nbytes
        eager_calls = [eager.call() for _ in range(4)]
        assert all(torch.allclose(y, tiny.sae(tiny.x(1)), rtol=1e-4, atol=1e-3) for y in eager_calls)
        assert len(list(tmp_path.iterdir())) == 1
        del bench, ours, anew, eager, candidate, bank
        gc.collect()
        assert list(tmp_path.iterdir()) == []


def test_a_bank_that_answers_something_else_is_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(BankedSAE, "__call__", lambda self, x: torch.zeros_like(x))
    with torch.inference_mode():
        bench = suite_modules.bank_bench(tiny, 1)
    assert [c.impl for c in bench.candidates] == ["eager fp32"]
    assert all("differs from the SAE by itself" in why for why in bench.missing.values())
    assert set(bench.missing) == {"ours", "ours, budget of one"}


def test_a_wrong_answer_is_not_timed():
    sae = make_sae(0, 64, 256, 12).requires_grad_(False)
    x = make_activations(1, 4, 64)
    truth, latents = Truth(sae, x), sae.encode_sparse(x)
    assert truth.ours(latents).support_flips_vs_eager == 0
    dense = latents.to_dense()
    off = SparseLatents.from_dense(dense * (1 + 1e-3))
    with pytest.raises(WrongAnswer, match="times what fp32 arithmetic allows"):
        truth.ours(off)
    short = dense.clone()
    short[0, latents.col_indices[0]] = 0
    with pytest.raises(WrongAnswer, match="support"):
        truth.ours(SparseLatents.from_dense(short))
    assert truth.latents(short).support_flips_vs_eager == 1
    with pytest.raises(WrongAnswer, match="reconstruction"):
        truth.reconstruction(sae(x) - 2 * sae.b_dec)
    one = torch.ones(1, dtype=torch.float64)
    assert close(one.float(), one, one, 2).max_error == 0
    with pytest.raises(WrongAnswer):
        close(one.float() + 1e-6, one, one, 2)


def test_missing_and_wrong_peers_are_listed_with_the_reason():
    def absent():
        raise ModuleNotFoundError("x", name="sae_lens")

    def wrong():
        raise WrongAnswer("off by 7")

    bench = Bench("ops", "encode", 1, 4, 8, None)
    bench.add("SAELens", absent)
    bench.add("other", wrong)
    bench.add("eager fp32", lambda: Candidate("eager fp32", "fp32", lambda: None, None))
    results = time_bench(bench, None, 1, 0)
    assert results.missing == {
        "ops/encode/T=1/4x8/SAELens": "not installed: sae_lens",
        "ops/encode/T=1/4x8/other": "off by 7",
    }


def test_roof_share_is_of_the_binding_limit():
    assert roof_share(Work(10_000_000, 0), 2.0, ROOF) == pytest.approx(0.5)  # 1 ms of reading in 2 ms
    assert roof_share(Work(0, 100_000_000), 2.0, ROOF) == pytest.approx(0.5)
    assert roof_share(Work(0, 100_000_000, "int8"), 2.0, ROOF) == pytest.approx(0.05)
    assert roof_share(Work(1, 1, None), 2.0, ROOF) is None
    assert roof_share(Work(1, 1), 2.0, None) is None


def test_results_survive_the_file_and_other_files_are_refused(tmp_path):
    results = Results({"threads": 2}, [row()], {row().key: Ratio(2, 1, 3)}, {"a": "b"}, ["w"])
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results
    for text in ("{}", "[1]", "not json", json.dumps({"format": 99})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(GemmaScopeFastError, match=r"expected the JSON of gemmascope-fast dev bench"):
            Results.load(tmp_path / "bad.json")


def test_compare_names_only_what_left_the_noise():
    quiet, slower, peer = row().key, row(T=2).key, row("eager bf16").key
    old = Results({}, ratios={quiet: Ratio(4, 3, 5), slower: Ratio(4, 3.5, 4.5), peer: Ratio(4, 3.5, 4.5)})
    new = Results({}, ratios={quiet: Ratio(3, 2, 4), slower: Ratio(2, 1.5, 3), peer: Ratio(1, 1, 1)})
    changes = compare.compare(old, new)
    assert [(c.key, c.beyond_noise, c.factor) for c in changes] == [(slower, True, 0.5), (quiet, False, 0.75)]


def test_compare_by_command_fails_where_ours_got_slower_and_names_another_machine(monkeypatch, tmp_path, capsys):
    keys = [row(T=1).key, row(T=2).key]
    Results({"isa": "avx512"}, [row()], {k: Ratio(4, 3.8, 4.2) for k in keys}).save(tmp_path / "old.json")
    for medians, isa, status in (((4, 4), "avx512", 0), ((8, 4), "avx512", 0), ((4, 2), "avx2", 1)):
        ratios = {k: Ratio(m, m - 0.1, m + 0.1) for k, m in zip(keys, medians, strict=True)}
        found = Results({"isa": isa}, [], ratios)
        monkeypatch.setattr("gemmascope_fast.dev.bench.run.run_suites", lambda *_, found=found, **__: found)
        monkeypatch.setattr(command, "_show", lambda results: None)
        assert cli.main(["dev", "bench", "--compare", str(tmp_path / "old.json")]) == status
        said = capsys.readouterr().out
        assert ("SLOWER" in said) == bool(status)
        assert ("different machines, avx512 and avx2" in said) == (isa == "avx2")


def guard_run(monkeypatch, ratios, isa="avx512"):
    """The command's runs give these medians one after the other; returns what each was asked to keep."""
    asked = []

    def run(options, say, only=None, save=None):
        asked.append(only)
        rows = [row(T=1), row(T=2)]
        medians = ratios[len(asked) - 1]
        return Results({"isa": isa}, rows, {r.key: Ratio(m, m, m) for r, m in zip(rows, medians, strict=True)})

    monkeypatch.setattr("gemmascope_fast.dev.bench.run.run_suites", run)
    monkeypatch.setattr(command, "_show", lambda results: None)
    return asked


@pytest.mark.parametrize(
    ("ratios", "status"),
    [
        ([(4.0, 3.0)], 0),  # a third is allowed: 2.67 and 2
        ([(2.7, 2.1)], 0),
        ([(2.6, 3.0), (4.0, 3.0)], 0),  # once is noise
        ([(2.6, 3.0), (2.6, 3.0)], 1),
    ],
)
def test_guard_fails_where_a_ratio_falls_by_a_third_twice(monkeypatch, tmp_path, capsys, ratios, status):
    stored = tmp_path / "ratios.json"
    stored.write_text(json.dumps({"avx512": {row(T=1).key: 4.0, row(T=2).key: 3.0}}))
    asked = guard_run(monkeypatch, ratios)
    assert cli.main(["dev", "bench", "--quick", "--guard", str(stored)]) == status
    assert asked == [None, frozenset({"ops/encode/T=1/64x256"})][: len(ratios)]
    assert ("REGRESSION" in capsys.readouterr().out) == bool(status)


def test_guard_needs_every_stored_ratio(monkeypatch, tmp_path, capsys):
    stored = tmp_path / "ratios.json"
    stored.write_text(json.dumps({"avx512": {"ops/encode/ours/T=99/1x1/fp32/2": 4.0}}))
    guard_run(monkeypatch, [(4.0, 3.0)])
    assert cli.main(["dev", "bench", "--guard", str(stored)]) == 1
    assert "were not measured" in capsys.readouterr().err


def test_guard_says_where_nothing_is_stored(monkeypatch, tmp_path, capsys):
    stored = tmp_path / "ratios.json"
    stored.write_text(json.dumps({"avx512": {row(T=1).key: 4.0}}))
    guard_run(monkeypatch, [(1.0, 1.0)], isa="avx2")
    assert cli.main(["dev", "bench", "--guard", str(stored)]) == 0
    assert "none for avx2: nothing was compared" in capsys.readouterr().out


def test_guard_holds_a_machine_against_its_own_kind(monkeypatch, tmp_path, capsys):
    here = machine.describe(1)
    assert machine.kind(here).startswith(str(here["isa"]))
    assert machine.kind({"isa": "avx2", "core": ""}) == "avx2"
    stored = tmp_path / "ratios.json"
    stored.write_text(json.dumps({machine.kind({"isa": "avx512", "core": "A 1 2"}): {row(T=1).key: 4.0}}))
    guard_run(monkeypatch, [(1.0, 1.0)])
    assert cli.main(["dev", "bench", "--guard", str(stored)]) == 0
    assert "nothing was compared" in capsys.readouterr().out


def test_stored_ratios_are_ours_alone_and_beside_other_instruction_sets(tmp_path):
    path = tmp_path / "ratios.json"
    keys = [row().key, row("ours", op="encode (warm)").key, row("eager bf16").key]
    compare.store(path, "avx2", Results({}, ratios={k: Ratio(2, 1, 3) for k in keys}))
    compare.store(path, "avx512", Results({}, ratios={keys[0]: Ratio(4, 1, 9)}))
    assert compare.stored_ratios(path) == {"avx2": {keys[0]: 2.0}, "avx512": {keys[0]: 4.0}}


def test_noise_is_said():
    quiet = Results({"roof_before": {"read_gb_s": 10, "fma_gflop_s": 1, "int8_gop_s": 1}}, [row("eager fp32")])
    quiet.machine["roof_after"] = {"read_gb_s": 11, "fma_gflop_s": 1, "int8_gop_s": 1}
    assert noise(quiet) == []
    quiet.machine["roof_after"] = {"read_gb_s": 13, "fma_gflop_s": 1, "int8_gop_s": 1}
    assert any("read_gb_s 10.0 before, 13.0 after" in w for w in noise(quiet))
    quiet.rows = [row("eager fp32", p20_ms=1, p80_ms=2)]
    assert any("1 of 1" in w for w in noise(quiet))


def test_quick_is_small_and_unknown_names_are_refused(capsys):
    assert QUICK.cases == ("640x4096",)
    with pytest.raises(SystemExit) as refused:
        cli.main(["dev", "bench", "--suite", "nothing"])
    assert refused.value.code == 2
    assert "--suite" in capsys.readouterr().err
    assert cli.main(["dev", "bench", "--device", "cuda"]) == 1
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suite", "modules", "--op", "bank", "encod"], "op: expected among SAE, transcoder, bank, got encod"),
        (["--tokens", "4", "0"], "tokens: expected at least 1, got 0"),
        (["--seconds", "0"], "seconds: expected more than 0, got 0.0"),
        (["--json", "/dev/null/f.json"], "--json: expected a place in a folder"),
    ],
)
def test_what_cannot_be_timed_is_said_before_anything_is(monkeypatch, capsys, given, message):
    monkeypatch.setattr("gemmascope_fast.dev.bench.run.measured_roof", None)
    assert cli.main(["dev", "bench", *given]) == 1
    assert message in capsys.readouterr().err
