"""Training: straight-through slices, block by block, interrupted and resumed; the command line on a tiny model."""

import json

import pytest
import torch
from torch import nn

from gemmascope_fast import matryoshka
from gemmascope_fast.matryoshka import Packed, measure, quantize, training
from gemmascope_fast.matryoshka.training import NestedWeight, Recipe

transformers = pytest.importorskip("transformers")


def tiny(seed=0):
    torch.manual_seed(seed)
    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        max_position_embeddings=64,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


IDS = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["prefix", "matquant"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_trained_slice_is_the_served_slice(group_size, mode):
    torch.manual_seed(0)
    module = NestedWeight(nn.Linear(70, 40), Recipe("qat", group_size, mode=mode))
    with torch.no_grad():
        module.clip_low.uniform_(0, 4)
        module.clip_high.uniform_(0, 4)
    codes = module.codes()
    step = codes.per_weight(codes.scale.float())
    for bits in range(1, 9):
        module.bits = bits
        got, want = module.sliced(), codes.dequantize(bits, mode)
        # float16 scales are rounded after training, by up to 2^-10 of them: a code may move by one 8-bit step, which
        # moves the slice by one of its own steps; almost everywhere nothing moves
        apart = (got - want).abs() / step
        assert bool((apart <= (1 << (8 - bits)) + 256 * 2**-9).all())
        assert bool((apart <= 256 * 2**-9).float().mean() > 0.9)


def test_gradients_pass_straight_through_the_rounding_and_stop_at_the_clip():
    module = NestedWeight(nn.Linear(8, 4), Recipe("qat"))
    with torch.no_grad():
        module.clip_high.fill_(0.0)  # half the range
    module.bits = 4
    module.sliced().sum().backward()
    low, high = module.limits()
    inside = (module.weight > low) & (module.weight < high - (high - low) / 200)
    assert torch.allclose(module.weight.grad[inside], torch.ones(()))
    outside = module.weight > high + (high - low) / 200
    assert bool(outside.any())
    assert bool((module.weight.grad[outside] == 0).all())


def error_of(model, bits, mode, codes=None):
    """Squared error of the last hidden states without BOS: a random model's logits hardly move."""
    want = model.model(IDS, use_cache=False).last_hidden_state[:, 1:]
    with torch.no_grad(), measure.quantised(model, "ffn", codes=codes, activations="exact") as served:
        matryoshka.set_bits(served, bits, mode)
        return (served.model(IDS, use_cache=False).last_hidden_state[:, 1:] - want).square().mean().item()


@pytest.mark.parametrize("method", ["omniquant", "qat"])
@pytest.mark.parametrize("mode", ["prefix", "matquant"])
def test_training_brings_two_bits_nearer_and_leaves_the_model_alone(method, mode):
    model = tiny()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    recipe = Recipe(method, mode=mode, epochs=20, weight_rate=2e-3, clip_rate=5e-2)
    codes = training.train(model, IDS, recipe)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert set(codes) == set(matryoshka.targets(model))
    # clipping alone can do little for rounded slices of Gaussian rows
    least = 1.0 if (method, mode) == ("omniquant", "matquant") else 0.9
    assert error_of(model, 2, mode, codes) < least * error_of(model, 2, mode)


def test_an_interrupted_run_loses_at_most_one_block(tmp_path, monkeypatch):
    model, recipe = tiny(), Recipe(epochs=2)
    want = training.train(model, IDS, recipe)
    fits = []
    fit = training.fit_block

    def stopping(*args):
        fits.append(1)
        if len(fits) == 3:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(training, "fit_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.train(model, IDS, recipe, work=tmp_path)
    got = training.train(model, IDS, recipe, work=tmp_path)
    assert len(fits) == 4  # blocks 0, 1, the one that was lost, and that one again
    assert all(torch.equal(got[n].q, want[n].q) and torch.equal(got[n].scale, want[n].scale) for n in want)
    # another recipe starts anew
    training.train(model, IDS, Recipe(epochs=1), work=tmp_path)
    assert len(fits) == 7


def test_alone_is_min_max_at_its_own_width():
    weight = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
    for bits in range(1, 9):
        got = measure.alone(weight, bits).dequantize()
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        alpha = (high - low) / (2**bits - 1)
        zero = (-low / alpha).round()
        want = alpha * ((weight / alpha + zero).round().clamp(0, 2**bits - 1) - zero)
        # α is first divided by a power of two: exact
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_results_survive_an_interruption(tmp_path):
    model = tiny()
    results = measure.Results(tmp_path / "t.json")
    cases = [measure.Case(slicing=s, bits=b) for s in ("prefix", "matquant", "matquant-extra", "alone") for b in (4, 2)]
    measure.compare(model, IDS, cases[:3], results)
    assert not matryoshka.layers(model)
    again = measure.Results(tmp_path / "t.json")
    found = measure.compare(model, IDS, cases, again)
    assert set(found) == {"full"} | {c.key() for c in cases}
    direct = matryoshka.quantize_(tiny(), activations="exact")
    matryoshka.set_bits(direct, 2)
    assert found[cases[1].key()]["loss"] == pytest.approx(measure.mean_loss(direct, IDS), rel=1e-6)
    assert json.loads((tmp_path / "t.json").read_text()) == found


def test_bad_recipes():
    for options, message in [
        ({"method": "gptq"}, "method"),
        ({"bits": (2, 8)}, "wide to narrow"),
        ({"bits": ()}, "wide to narrow"),
        ({"bits": (9, 2)}, "from 1 to 8"),
        ({"group_size": 33}, "group_size"),
        ({"mode": "x"}, "mode"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe(**options)
    model = tiny()
    matryoshka.quantize_(model)
    with pytest.raises(ValueError, match="already quantised"):
        training.train(model, IDS, Recipe())


def test_packed_of_trained_codes_serves_them():
    module = NestedWeight(nn.Linear(64, 16), Recipe())
    codes = module.codes()
    assert torch.equal(Packed.of(codes).dequantize(3), codes.dequantize(3))
    assert not torch.equal(codes.dequantize(), quantize(module.weight).dequantize())  # the range is clipped
