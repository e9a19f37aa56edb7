"""QAT end to end: every width's loss decreases, runs resume, the head's losses, and CPUs without bf16 products."""

import pytest
import torch
from tiny_model import assert_same_training, two_blocks
from torch import nn

from gemmascope_fast import quant as matryoshka
from gemmascope_fast.analysis.widths import measure
from gemmascope_fast.training import arithmetic
from gemmascope_fast.training.nested import blocks as training
from gemmascope_fast.training.nested import endtoend
from gemmascope_fast.training.nested.recipe import NestedWeight, Recipe

pytest.importorskip("transformers")

IDS = torch.randint(1, 64, (8, 16), generator=torch.Generator().manual_seed(1))


def slice_loss(model, trained, bits):
    with measure.quantised(model, "ffn", codes=trained, activations="exact") as served:
        matryoshka.set_bits(served, bits, "prefix")
        return measure.mean_loss(served, IDS)


def test_end_to_end_training_lowers_the_loss_of_every_slice_and_leaves_the_model_alone():
    model = two_blocks()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    recipe = Recipe("qat", weight_rate=3e-3, weights={8: 1.0, 4: 1.0, 2: 1.0})
    trained = endtoend.finetune(model, IDS, recipe, steps=12)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    for bits in (8, 4, 2):
        assert slice_loss(model, trained, bits) < slice_loss(model, None, bits)


def test_end_to_end_training_goes_on_where_it_was(tmp_path, monkeypatch):
    model = two_blocks()
    start = training.train(model, IDS, Recipe("qat", bits=(8, 2), epochs=1))
    recipe = Recipe("qat", bits=(8, 2), batch=3)
    want = endtoend.finetune(model, IDS, recipe, steps=5, start=start)
    steps = []
    step = endtoend._step

    def stopping(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(endtoend, "_step", stopping)
    options = {"steps": 5, "start": start, "work": tmp_path, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        endtoend.finetune(model, IDS, recipe, **options)
    assert_same_training(endtoend.finetune(model, IDS, recipe, **options), want)
    assert len(steps) == 4 + 3  # the third step was not saved yet


def test_starting_at_codes_starts_at_those_codes():
    module = NestedWeight(nn.Linear(64, 48), Recipe("qat"))
    codes = module.codes()  # clipped: both ends of every range are in use
    other = NestedWeight(nn.Linear(64, 48), Recipe("qat"))
    other.begin_at(codes)
    back = other.codes()
    assert (back.q.int() - codes.q.int()).abs().max() <= 1
    step = codes.per_weight(codes.scale)
    assert bool(((back.dequantize() - codes.dequantize()).abs() <= step).all())


def test_the_losses_of_the_head_are_cross_entropy_and_divergence():
    model = two_blocks()
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    wider = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    ids = IDS[:2, :9]
    everything = endtoend.Vocabulary.draw(ids.unique(), 64, 0)
    got = endtoend.head_loss(model, hidden, wider, ids, 0.7, 0.3, everything)
    with arithmetic.autocast():
        own, other = (model.lm_head(h[:, :-1]).float().log_softmax(-1) for h in (hidden, wider))
    entropy = nn.functional.cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten())
    divergence = (other.exp() * (other - own)).sum(-1).mean()
    assert torch.allclose(got, 0.7 * entropy + 0.3 * divergence, rtol=1e-4)


def test_a_sampled_vocabulary_estimates_the_partition_function_without_bias():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    used = torch.arange(0, 500, 25)
    draws = [endtoend.Vocabulary.draw(used, 500, seed, sampled=200) for seed in range(800)]
    assert all(torch.equal(d.place[d.columns], torch.arange(220)) and int((d.place >= 0).sum()) == 220 for d in draws)
    assert all(torch.equal(d.columns[:20], used) for d in draws)
    sums = torch.stack([(logits[d.columns] + d.log_weight).exp().sum() for d in draws])
    want = logits.exp().sum()
    assert abs(sums.mean() - want) < 4 * sums.std() / 800**0.5
    assert sums.std() < 0.1 * want  # else the line above says nothing


def test_the_rates_rise_and_fall():
    assert [endtoend.rate(s, 10) for s in (0, 1)] == [1.0, 1.0]
    assert [endtoend.rate(s, 20) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert 0 < endtoend.rate(19, 20) < 0.01
    assert endtoend.rate(0, 1) == 1.0


# ---- a CPU without products of bf16 -----------------------------------------------------------------------


@pytest.fixture
def fp32_products(monkeypatch):
    monkeypatch.setattr(arithmetic, "products", lambda device="cpu": torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_in_fp32_where_bf16_has_no_products(dtype, fp32_products, monkeypatch):
    model = two_blocks().to(dtype)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    seen, hidden = set(), endtoend._hidden

    def watching(model, ids):
        name = next(iter(matryoshka.targets(two_blocks())))  # a layer of the list that is trained
        handle = model.get_submodule(name).register_forward_hook(
            lambda _m, args, out: seen.add((args[0].dtype, out.dtype))
        )
        try:
            return hidden(model, ids)
        finally:
            handle.remove()

    monkeypatch.setattr(endtoend, "_hidden", watching)
    recipe = Recipe("qat", weight_rate=3e-3, weights={8: 1.0, 4: 1.0, 2: 1.0})
    trained = endtoend.finetune(model, IDS, recipe, steps=6)
    assert seen == {(torch.float32, torch.float32)}
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in model.state_dict().items())
    assert slice_loss(model, trained, 2) < slice_loss(model, None, 2)


def test_blocks_are_trained_in_fp32_where_bf16_has_no_products(fp32_products):
    block, seen = nn.Linear(8, 8), []
    block.register_forward_hook(lambda _m, _args, out: seen.append(out.dtype))
    out = training.call(block, torch.ones(1, 2, 8), {})
    assert out.dtype is torch.float32
    assert seen == [torch.float32]


def test_a_machine_with_products_of_bf16_uses_them(monkeypatch):
    monkeypatch.setattr(arithmetic, "products", lambda device="cpu": torch.bfloat16)
    seen = []
    block = nn.Linear(8, 8)
    block.register_forward_hook(lambda _m, _args, out: seen.append(out.dtype))
    assert training.call(block, torch.ones(1, 2, 8), {}).dtype is torch.float32
    assert seen == [torch.bfloat16]


def test_the_type_without_onednn_is_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert arithmetic.products() is torch.float32
    assert arithmetic.products("cuda") is torch.bfloat16


def test_the_type_is_what_onednn_says():
    want = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    assert arithmetic.products() is want
    assert arithmetic.products("cuda") is torch.bfloat16
    assert measure.full(two_blocks().to(want), IDS)["arithmetic"] == str(want).removeprefix("torch.")


def test_a_table_begun_in_another_type_is_refused(tmp_path):
    results = measure.Results(tmp_path / "t.json")
    measure.compare(two_blocks(), IDS, [measure.Case(bits=4)], results)
    with pytest.raises(ValueError, match="started in bfloat16, got one in float32"):
        measure.compare(two_blocks().bfloat16(), IDS, [measure.Case(bits=2)], results)
    assert len(results.figures) == 2


def test_a_model_widened_has_its_types_and_values_again_after_an_error(fp32_products):
    model = two_blocks().bfloat16()
    before = {n: p.clone() for n, p in model.state_dict().items()}

    def interrupted():
        with arithmetic.widened(model):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in model.state_dict().items())
