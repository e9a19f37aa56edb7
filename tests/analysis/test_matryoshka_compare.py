"""Mix'n'Match and the comparison: budgets, patterns, frontiers, the grid's runs, resumed."""

import itertools
import json

import pytest
import torch
from tiny_model import two_blocks

from gemmascope_fast import quant as matryoshka
from gemmascope_fast.analysis.widths import grid, measure, mixnmatch
from gemmascope_fast.analysis.widths.mixnmatch import Point, Unit

pytest.importorskip("transformers")
IDS = torch.randint(1, 64, (12, 16), generator=torch.Generator().manual_seed(1))


def test_patterns_put_the_wide_blocks_where_they_say():
    assert mixnmatch.pattern("pyramid", 6, 2, 8, 0.5) == [2, 8, 8, 8, 2, 2]
    assert mixnmatch.pattern("reverse-pyramid", 6, 2, 8, 1 / 3) == [8, 2, 2, 2, 2, 8]
    assert mixnmatch.pattern("increasing", 4, 2, 4, 0.25) == [2, 2, 2, 4]
    assert mixnmatch.pattern("decreasing", 4, 2, 4, 0.5) == [4, 4, 2, 2]
    for kind in mixnmatch.PATTERNS:
        for share in (0, 0.3, 1):
            assert mixnmatch.pattern(kind, 10, 3, 6, share).count(6) == round(10 * share)
    for options in (("other", 4, 2, 8, 0.5), ("pyramid", 4, 0, 8, 0.5), ("pyramid", 4, 2, 8, 1.5)):
        with pytest.raises(ValueError, match=r"kind|narrow|share"):
            mixnmatch.pattern(*options)


def made_up(seed):
    """Units whose losses are convex in their bytes, as the search assumes."""
    noise = torch.Generator().manual_seed(seed)
    parts, added = [], {}
    for i in range(4):
        size = int(torch.randint(1, 5, (), generator=noise)) * 100
        slopes = torch.rand(2, generator=noise).sort().values.tolist()
        parts.append(Unit(f"b{i}", (f"b{i}.x",), {8: 8 * size, 4: 4 * size, 2: 2 * size}))
        four = slopes[0] * 4 * size
        added[f"b{i}"] = {8: 0.0, 4: four, 2: four + slopes[1] * 2 * size}
    return parts, added


@pytest.mark.parametrize("seed", range(5))
def test_the_search_is_the_best_of_all_choices_of_its_size(seed):
    parts, added = made_up(seed)

    def loss(choice):
        return sum(added[name][bits] for name, bits in choice.items())

    every = [dict(zip(added, bits, strict=True)) for bits in itertools.product((8, 4, 2), repeat=4)]
    for choice in mixnmatch.path(parts, added):
        size = mixnmatch.total(choice, parts)
        best = min(loss(c) for c in every if mixnmatch.total(c, parts) <= size)
        assert loss(choice) == pytest.approx(best)
        assert mixnmatch.search(parts, added, size) == choice
    least = mixnmatch.total(dict.fromkeys(added, 2), parts)
    with pytest.raises(ValueError, match=f"at least {least}"):
        mixnmatch.search(parts, added, least - 1)


def test_a_width_worse_than_a_mixture_is_skipped():
    parts = [Unit("a", ("a",), {8: 800, 4: 400, 2: 200})]
    choices = mixnmatch.path(parts, {"a": {8: 0.0, 4: 5.0, 2: 5.5}})
    assert choices == [{"a": 8}, {"a": 2}]


def test_the_frontier_drops_what_is_beaten():
    points = [Point("a", {}, 10, 3.0), Point("b", {}, 20, 4.0), Point("c", {}, 20, 2.0), Point("d", {}, 30, 2.0)]
    assert [p.label for p in mixnmatch.frontier(points)] == ["a", "c"]


def test_units_are_blocks_and_their_bytes_those_of_the_layers():
    model = matryoshka.quantize_(two_blocks())
    parts = mixnmatch.units(model)
    assert [p.name for p in parts] == ["model.layers.0", "model.layers.1"]
    assert all(len(p.layers) == 3 for p in parts)
    for bits in mixnmatch.WIDTHS:
        matryoshka.set_bits(model, bits)
        assert mixnmatch.total(dict.fromkeys([p.name for p in parts], bits), parts) == matryoshka.nbytes(model)
    mixnmatch.apply(model, {"model.layers.0": 8, "model.layers.1": 2}, parts)
    assert {n.split(".")[2]: m.bits for n, m in matryoshka.layers(model).items()} == {"0": 8, "1": 2}


def test_plots_and_json(tmp_path):
    points = [Point("uniform int2", {"a": 2}, 10, 3.0), Point("search 15", {"a": 4}, 15, 2.0)]
    mixnmatch.plot(points, tmp_path / "p.svg", "title")
    assert "<svg" in (tmp_path / "p.svg").read_text()
    mixnmatch.save_json(points, tmp_path / "p.json", {"scope": "ffn"})
    assert json.loads((tmp_path / "p.json").read_text())["points"][0]["widths"] == {"a": 2}


# ---- the grid ---------------------------------------------------------------------------------------------


def test_the_grid_has_every_cell_once():
    found = grid.runs()
    keys = [case.key() for run in found for case in run.cases()]
    assert len(keys) == len(set(keys))
    for method in ("omniquant", "qat"):
        for bits in (8, 6, 4, 3, 2):
            assert f"ffn/channel/{method}-8,4,2-prefix/prefix/int{bits}/int8" in keys
            assert f"ffn/channel/{method}-{bits}-alone/alone/int{bits}/exact" in keys
            if bits < 8:
                assert f"ffn/channel/{method}-8,4,2-matquant/matquant-extra/int{bits}/exact" in keys
    assert "all-linear/group32/omniquant-8,4,2-prefix-dithered/prefix/int2/exact" in keys
    assert set(grid.runs(quick=True)) < set(found)


def test_dithering_stays_within_the_cells():
    levels = torch.randint(-8, 8, (6, 96), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(32, 1) + 0.1
    weight = levels * scale
    moved = grid.dither(weight, 0)
    assert bool(((moved - weight).abs() <= scale / 2 * (1 + 1e-5)).all())
    assert bool(((moved - weight).abs() > scale / 8).float().mean() > 0.6)
    assert torch.equal((moved / scale).round(), levels.float())
    assert torch.equal(grid.dither(torch.zeros(2, 40), 0), torch.zeros(2, 40))


@pytest.mark.parametrize(
    "run",
    [
        grid.Run("ffn", None, "minmax", widths=(8, 2)),
        grid.Run("ffn", 32, "omniquant", (8, 2), "matquant", dithered=True, widths=(8, 2)),
        grid.Run("ffn", None, "qat", (2,), "alone"),
    ],
    ids=lambda run: run.label,
)
def test_a_run_gives_its_figures_and_is_not_done_twice(tmp_path, monkeypatch, run):
    model = two_blocks()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    comparison = grid.Comparison(model, IDS[:8], IDS[8:], tmp_path, {"epochs": 1}, steps=1)
    comparison.do(run)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    keys = {case.key() for case in run.cases()}
    assert keys <= set(comparison.results.figures)
    assert comparison.results.figures["full"]["loss"] == measure.mean_loss(model, IDS[8:])
    monkeypatch.setattr(measure, "mean_loss", None)  # would be called for anything not stored
    again = grid.Comparison(model, IDS[:8], IDS[8:], tmp_path, {"epochs": 1}, steps=1)
    again.do(run)
    assert again.results.figures == comparison.results.figures
    with pytest.raises(ValueError, match="started with another recipe"):
        grid.Comparison(model, IDS[:8], IDS[8:], tmp_path, {"epochs": 2}, steps=1)
    assert f"{run.scope} " in grid.markdown(again.results.figures)


def test_alone_is_stored_at_its_own_width(tmp_path):
    run = grid.Run("ffn", None, "omniquant", (2,), "alone")
    comparison = grid.Comparison(two_blocks(), IDS[:8], IDS[8:], tmp_path, {"epochs": 1})
    comparison.do(run)
    figure = comparison.results.figures[run.cases()[0].key()]
    weights, rows = 2 * 3 * 64 * 32, 2 * (64 + 64 + 32)
    assert figure["bits_per_weight"] == pytest.approx(2 + 8 * 5 * rows / weights)


def test_mixing_measures_candidates_and_finds_the_frontier(tmp_path):
    model = two_blocks()
    comparison = grid.Comparison(model, IDS[:4], IDS[8:], tmp_path)
    points = comparison.mix(grid.Run("ffn", None, "minmax"), points=2, windows=2)
    assert not matryoshka.layers(model)
    held = json.loads((tmp_path / "mixnmatch.json").read_text())
    assert len(held["points"]) == len(points) >= 5 + 12
    best = [p for p in held["points"] if p["frontier"]]
    assert best == sorted(best, key=lambda p: p["nbytes"])
    assert [p["loss"] for p in best] == sorted((p["loss"] for p in best), reverse=True)
    # recomputed
    served = matryoshka.quantize_(two_blocks(), activations="exact")
    for point in held["points"][::7]:
        matryoshka.set_bits(served, point["widths"])
        assert measure.mean_loss(served, IDS[8:]) == pytest.approx(point["loss"], rel=1e-6)
        assert matryoshka.nbytes(served) == point["nbytes"]


@pytest.mark.parametrize(
    ("option", "value"), [("--only", "sae,all"), ("--methods", "omniquant,gptq"), ("--methods", "")]
)
def test_unknown_parts_and_methods_are_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, option, value):
    from gemmascope_fast.analysis import pair
    from gemmascope_fast.cli import main as cli

    monkeypatch.setattr(pair, "load_pair", None)
    assert cli.main(["quantize", "tables", "--work", str(tmp_path / "work"), option, value]) == 1
    assert f"{option}: expected some of" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
