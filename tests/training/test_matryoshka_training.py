"""Training: straight-through slices, block by block, interrupted and resumed; the command line on a tiny model."""

import json

import pytest
import torch
from tiny_model import assert_same_training, two_blocks
from torch import nn

from gemmascope_fast import quant as matryoshka
from gemmascope_fast.analysis.widths import measure
from gemmascope_fast.ops.codes import quantize, spread
from gemmascope_fast.quant.planes import Packed
from gemmascope_fast.training.nested import blocks as training
from gemmascope_fast.training.nested import calibration, equivalent, straight_through
from gemmascope_fast.training.nested.recipe import NestedWeight, Recipe

pytest.importorskip("transformers")


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


@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_trained_slice_of_tiny_weights_is_the_served_one(group_size, size):
    linear = nn.Linear(70, 40)
    linear.weight.data.mul_(size)
    module = NestedWeight(linear, Recipe("qat", group_size))
    for bits in (8, 4, 2):
        module.bits = bits
        got, want = module.sliced().detach(), module.codes().dequantize(bits)
        assert (got - want).norm() < 0.02 * want.norm()
    module.sliced().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in (module.weight, module.clip_low, module.clip_high))


def test_gradients_pass_straight_through_the_rounding_and_stop_at_the_clip():
    module = NestedWeight(nn.Linear(8, 4), Recipe("qat"))
    with torch.no_grad():
        module.clip_high.fill_(0.0)  # half the range
    module.bits = 4
    module.sliced().sum().backward()
    low, high = module.limits(module.weight)
    inside = (module.weight > low) & (module.weight < high - (high - low) / 200)
    assert torch.allclose(module.weight.grad[inside], torch.ones(()))
    outside = module.weight > high + (high - low) / 200
    assert bool(outside.any())
    assert bool((module.weight.grad[outside] == 0).all())


def slice_by_single_operations(weight, alpha, zero, group_size, top, cut):
    """The reference: the same function as autograd differentiates it, operation by operation."""

    def through(value, rounded):
        return value + (rounded - value).detach()

    zero = through(zero, zero.round())
    a, z = (spread(value, group_size, weight.shape[1]) for value in (alpha, zero))
    position = weight / a + z
    q = through(position, position.round()).clamp(0, top)
    return a * ((q if cut is None else through(q, cut(q.detach().clone()))) - z)


@pytest.mark.parametrize("mode", ["prefix", "matquant", "alone"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_slice_and_its_gradients_are_those_of_single_operations(group_size, mode, monkeypatch):
    for bits in (3,) if mode == "alone" else (8, 4, 2, 1):
        torch.manual_seed(bits)
        module = NestedWeight(nn.Linear(70, 40), Recipe("qat", group_size, mode=mode, bits=(bits,)))
        with torch.no_grad():
            module.clip_low.uniform_(-1, 4)
            module.clip_high.uniform_(-1, 4)
        parameters, grad = [module.weight, module.clip_low, module.clip_high], torch.randn(40, 70)
        found = []
        for function in (straight_through.sliced, slice_by_single_operations):
            monkeypatch.setattr(straight_through, "sliced", function)
            out = module.sliced()
            found.append([out, *torch.autograd.grad(out, parameters, grad)])
        assert torch.equal(found[0][0], found[1][0])
        for got, want in zip(found[0][1:], found[1][1:], strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
        assert all(bool(g.any()) for g in found[0])


def error_of(model, bits, mode, codes=None):
    """Squared error of the last hidden states without BOS: a random model's logits hardly move."""
    want = model.model(IDS, use_cache=False).last_hidden_state[:, 1:]
    with torch.no_grad(), measure.quantised(model, "ffn", codes=codes, activations="exact") as served:
        matryoshka.set_bits(served, bits, mode)
        return (served.model(IDS, use_cache=False).last_hidden_state[:, 1:] - want).square().mean().item()


@pytest.mark.parametrize("mode", ["prefix", "matquant"])
@pytest.mark.parametrize("method", ["omniquant", "qat"])
def test_training_brings_two_bits_nearer_and_leaves_the_model_alone(method, mode):
    model = two_blocks()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    # clips and scales of rounded slices first lose: 1.07 of the untrained error after 8 passes, 0.9 after 32
    recipe = Recipe(method, mode=mode, epochs=32, weight_rate=2e-3, clip_rate=5e-2, scale_rate=2e-2)
    trained = training.train(model, IDS, recipe)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert set(trained.codes) == set(matryoshka.targets(model))
    assert set(trained.gains) == {f"model.layers.{i}.pre_feedforward_layernorm" for i in range(2)}
    share = 0.95 if (method, mode) == ("omniquant", "matquant") else 0.9
    assert error_of(model, 2, mode, trained) < share * error_of(model, 2, mode)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_an_interrupted_run_loses_at_most_one_block(tmp_path, monkeypatch):
    model, recipe = two_blocks(), Recipe(epochs=1, bits=(8, 2))
    want = training.train(model, IDS, recipe)
    fits = []
    fit = training.fit_block

    def stopping(*args):
        fits.append(1)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(training, "fit_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.train(model, IDS, recipe, work=tmp_path)
    assert not any(isinstance(m, NestedWeight) for m in model.modules())
    got = training.train(model, IDS, recipe, work=tmp_path)
    assert len(fits) == 3  # block 0, the one that was lost, and that one again
    assert_same_training(got, want)
    assert_same_training(training.train(model, IDS, recipe, work=tmp_path), want)
    assert len(fits) == 3
    # another recipe starts anew
    training.train(model, IDS, Recipe(epochs=1, bits=(4,)), work=tmp_path)
    assert len(fits) == 5


# ---- channel scales ---------------------------------------------------------------------------------------


def scaled_block():
    """One block of the tiny model with learned scales: (block, arguments, hidden, nested, scales)."""
    model = two_blocks()
    blocks = model.model.layers
    hidden, arguments = training.capture(model, blocks, IDS)
    block = blocks[0]
    names = [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    nested = {n: NestedWeight(block.get_submodule(n), Recipe("qat")) for n in names}
    norms, gated = equivalent.find(block, names, hidden[:1], arguments[0])
    assert norms == {"pre_feedforward_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}
    assert gated == [("mlp.up_proj", "mlp.down_proj")]
    scales = equivalent.Scales(block, nested, norms, gated)
    with torch.no_grad():
        for log in scales.logs:
            log.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    return block, arguments[0], hidden, nested, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_scales_change_nothing_before_quantisation(dtype):
    block, arguments, hidden, nested, scales = scaled_block()
    with torch.no_grad():
        want = block(hidden, **arguments)
        want = want[0] if isinstance(want, tuple) else want
    gains = scales.fold(block, dtype)
    assert all(gain.dtype == dtype for gain in gains.values())
    for name, gain in gains.items():
        block.get_submodule(name).weight.data = gain.float()
    for name, module in nested.items():
        block.get_submodule(name).weight.data = module.scaled().detach()
    with torch.no_grad():
        got = block(hidden, **arguments)
        got = got[0] if isinstance(got, tuple) else got
    assert not torch.equal(gains["pre_feedforward_layernorm"].float(), torch.zeros(32))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_norm_that_feeds_a_layer_left_alone_is_not_scaled():
    model = two_blocks()
    hidden, arguments = training.capture(model, model.model.layers, IDS)
    norms, gated = equivalent.find(model.model.layers[0], ["mlp.gate_proj"], hidden[:1], arguments[0])
    assert (norms, gated) == ({}, [])


def test_the_offset_of_a_norm():
    assert equivalent.offset_of(two_blocks().model.norm) == 1.0
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(8)
    assert equivalent.offset_of(norm) == 0.0
    assert torch.equal(norm.weight, torch.ones(8))


def test_files_carry_the_gains_with_the_codes(tmp_path):
    model = two_blocks()
    trained = training.train(model, IDS, Recipe(epochs=1, bits=(2,), scale_rate=0.1))
    matryoshka.quantize_(model, codes=trained, bits=2)
    matryoshka.save(model, tmp_path / "codes.safetensors")
    back = matryoshka.load_(two_blocks(), tmp_path / "codes.safetensors")
    matryoshka.set_bits(back, 2)
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    name = next(iter(trained.gains))
    assert torch.equal(back.get_submodule(name).weight, trained.gains[name].float())
    assert not torch.equal(trained.gains[name].float(), two_blocks().get_submodule(name).weight)


@pytest.mark.parametrize("group_size", [None, 32])
def test_a_width_trained_alone_has_a_grid_of_its_own(group_size):
    module = NestedWeight(nn.Linear(70, 40), Recipe("qat", group_size, bits=(3,), mode="alone"))
    codes = module.codes()
    assert bool((codes.q % 32 == 0).all())
    assert len(codes.q.unique()) == 8
    # float16 scales are rounded after training
    step = 32 * codes.per_weight(codes.scale.float())
    assert bool(((module.sliced() - codes.dequantize(3, "matquant")).abs() <= step * 2**-7).float().mean() > 0.95)
    with pytest.raises(ValueError, match="one width"):
        Recipe("qat", bits=(8, 2), mode="alone")


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
    model = two_blocks()
    results = measure.Results(tmp_path / "t.json")
    cases = [measure.Case(slicing=s, bits=b) for s in ("prefix", "matquant", "matquant-extra", "alone") for b in (4, 2)]
    measure.compare(model, IDS, cases[:3], results)
    assert not matryoshka.layers(model)
    again = measure.Results(tmp_path / "t.json")
    found = measure.compare(model, IDS, cases, again)
    assert set(found) == {"full"} | {c.key() for c in cases}
    direct = matryoshka.quantize_(two_blocks(), activations="exact")
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
    model = two_blocks()
    matryoshka.quantize_(model)
    with pytest.raises(ValueError, match="already quantised"):
        training.train(model, IDS, Recipe())


def test_packed_of_trained_codes_serves_them():
    module = NestedWeight(nn.Linear(64, 16), Recipe())
    codes = module.codes()
    assert torch.equal(Packed.of(codes).dequantize(3), codes.dequantize(3))
    assert not torch.equal(codes.dequantize(), quantize(module.weight).dequantize())  # the range is clipped


# ---- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "omniquant", "--steps", "2"], "--steps"),
        (["--method", "qat", "--lambdas", "1,2"], "--lambdas"),
        (["--method", "qat", "--mode", "alone"], "one width"),
    ],
)
def test_the_command_refuses_what_contradicts_itself(options, message, monkeypatch, capsys, tmp_path):
    assert run_command(monkeypatch, ["--table", str(tmp_path / "t.json"), *options]) == 1
    assert message in capsys.readouterr().err


class Words:
    """A tokenizer of the tiny model: a byte a token."""

    bos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[1 + ord(c) % 63 for c in text]])}


def run_command(monkeypatch, options):
    from gemmascope_fast.analysis import pair
    from gemmascope_fast.cli import main as cli

    monkeypatch.setattr(pair, "load_model", lambda _name: (two_blocks(), Words()))
    monkeypatch.setattr(calibration, "WINDOW", 16)
    return cli.main(["quantize", "--windows", "4", "--train-windows", "4", *options])


def test_the_command_trains_measures_and_writes(monkeypatch, tmp_path):
    table, out = tmp_path / "t.json", tmp_path / "codes.safetensors"
    options = [
        "--method",
        "qat",
        "--mode",
        "alone",
        "--train-bits",
        "2",
        "--epochs",
        "1",
        "--steps",
        "1",
        "--bits",
        "2",
    ]
    assert run_command(monkeypatch, [*options, "--table", str(table), "--out", str(out), "--work", str(tmp_path)]) == 0
    figures = json.loads(table.read_text())
    assert {k for k in figures if not k.startswith("about")} == {
        "full",
        *(f"ffn/channel/qat-2-alone/alone/int2/{a}" for a in ("exact", "int8")),
    }
    back = matryoshka.load_(two_blocks(), out)
    layer = next(iter(matryoshka.layers(back).values()))
    assert layer.packed.stored == layer.bits == 2
    assert layer.weight.unique(dim=None).numel() > 3
    assert all(len(row.unique()) <= 4 for row in layer.weight)
