"""The profile of a real loop: our ops by name with their declared costs, layers told apart, a trace that loads."""

import json
import types

import attach_models
import pytest
import torch

from gemmascope_fast import Site, attach, ops
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev import profile
from gemmascope_fast.dev.profile import profile_loop
from gemmascope_fast.sae import screen_cache as prepare


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    model, sae = attach_models.gemma2(), attach_models.sae(site=Site("resid", 1)).requires_grad_(False)
    ids = attach_models.ids()
    trace = tmp_path_factory.mktemp("profile") / "trace.json"

    def loop():
        with torch.inference_mode(), attach(model, {1: sae}, mode="splice", tokens="all"):
            return model(input_ids=ids)

    layers = {str(i): block for i, block in enumerate(model.model.layers)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "pays", lambda x, W_enc: False)  # the full encode, whose cost is known from its shapes
        return profile_loop(loop, layers, trace), trace, sae, ids


def test_ops_carry_calls_and_declared_costs(found):
    result, _, sae, ids = found
    named = {op.name: op for op in result.ops}
    assert {"encode", "decode"} <= set(named)
    assert named["encode"].calls == named["decode"].calls == 1
    x = torch.zeros(ids.numel(), sae.d_in)
    cost = ops.encode.cost(x, sae.W_enc)
    assert (named["encode"].bytes, named["encode"].flops) == (cost.bytes, cost.flops)
    assert named["encode"].roof_share > 0
    assert 0 < result.sae_ms <= result.wall_ms


def test_layers_are_told_apart_and_the_sae_shows_in_its_own(found):
    """The SAE runs in a hook that is registered after the profile's own, and so outside its layer's range."""
    result = found[0]
    assert list(result.layers) == ["0", "1", "2", "3"]
    assert all(part.model_ms > 0 for part in result.layers.values())
    assert [name for name, part in result.layers.items() if part.sae_ms] == ["1"]
    assert result.layers["1"].sae_ms == pytest.approx(result.sae_ms)
    assert result.sae_ms == pytest.approx(sum(op.ms for op in result.ops), rel=1e-3)
    assert result.sae_ms + sum(part.model_ms for part in result.layers.values()) <= result.wall_ms


class Event:
    """What the profiler tells of a range: microseconds, and the range around it."""

    def __init__(self, name, start, end, parent=None):
        self.name, self.cpu_parent = name, parent
        self.time_range = types.SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)


def test_an_op_counts_once_and_where_it_ran():
    inside = Event("gemmascope_fast::encode", 1000, 2000)
    events = [
        Event("gemmascope_fast::decode", 0, 500),  # before any layer
        Event("layer a", 900, 4900),
        inside,
        Event("gemmascope_fast::decode", 1200, 1300, inside),
        Event("aten::mm", 2000, 3000),
        Event("gemmascope_fast::decode", 5000, 7000),  # in a hook behind the layer
        Event("layer b", 8000, 9000),
    ]
    layers, total = profile._layers(events, ["a", "b", "never ran"])
    assert layers == {"a": profile.LayerShare(3.0, 3.0), "b": profile.LayerShare(1.0, 0.0)}
    assert total == 3.5


def test_a_device_is_found_by_the_name_that_torch_gives_it():
    assert profile._modelled_gb_s("NVIDIA H100 80GB HBM3") > 2000
    assert profile._modelled_gb_s("a device of tomorrow") is None


def test_the_trace_is_chromes_and_holds_ops_and_layers(found):
    events = json.loads(found[1].read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"gemmascope_fast::encode", "gemmascope_fast::decode", "layer 1"} <= names


def test_hooks_are_gone_afterwards(found):
    model = attach_models.gemma2()
    with pytest.raises(RuntimeError, match="stop"):
        profile_loop(stop, {"0": model.model.layers[0]})
    block = model.model.layers[0]
    assert not block._forward_hooks
    assert not block._forward_pre_hooks


def stop():
    raise RuntimeError("stop")


def test_unknown_model_is_one_line(capsys):
    assert cli.main(["dev", "profile", "--model", "/nonexistent", "--sae", "/nonexistent"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--trace", "/dev/null/trace.json"], "--trace: expected a place in a folder"),
        (["--json", "/dev/null/profile.json"], "--json: expected a place in a folder"),
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_said_before_a_model_is_loaded(monkeypatch, capsys, given, message):
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_pair", None)
    assert cli.main(["dev", "profile", *given]) == 1
    assert message in capsys.readouterr().err
