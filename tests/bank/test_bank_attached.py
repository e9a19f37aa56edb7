"""A bank attached to models gives the same as its SAEs, in every mode and with every budget."""

import json
import random

import attach_models as tiny
import numpy as np
import pytest
import torch
from bank_releases import ONE, WEIGHTS, D, arrays, device, each_loaded, release, run_threads
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations
from gemmascope_fast.bank import Bank
from gemmascope_fast.checkpoints.loading import from_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma2()


@pytest.mark.parametrize("mode", ["observe", "splice", "splice+error"])
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_attached_it_equals_the_saes_themselves(gemma, tmp_path, mode, budget):
    folder = release(tmp_path, 4)
    saes = list(each_loaded(folder).values())
    bank = Bank(folder, device_bytes=budget * ONE)
    edits = {} if mode == "observe" else {2: gsf.Clamp(3, 5.0), 0: gsf.Add(1, 2.0)}
    ids = tiny.ids()
    with torch.no_grad():
        with gsf.attach(gemma, saes, mode=mode, edits=edits, tokens="all") as want:
            logits = gemma(ids).logits
            text = gemma.generate(ids, max_new_tokens=4, do_sample=False)
        with gsf.attach(gemma, bank, mode=mode, edits=edits, tokens="all") as got:
            assert torch.equal(gemma(ids).logits, logits)
            assert torch.equal(gemma.generate(ids, max_new_tokens=4, do_sample=False), text)
    bank.settle()
    for layer in range(4):
        assert got.latents[layer] == want.latents[layer]
        assert got.latents[tiny.resid(layer)].nnz > 0
    assert device(bank)["peak"] <= budget * ONE
    assert not any(slot.pins for slot in bank._store.on_device.slots.values())
    if budget == 4:
        assert bank.stats.loads == 4


def test_the_next_layers_sae_is_brought_while_this_one_is_in_use(gemma, tmp_path):
    bank = Bank(release(tmp_path, 4), device_bytes=2 * ONE)
    after = {}

    class Watch:
        """In the hooks' own time: what is brought after each layer's SAE was used."""

        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x, tokens):
            bank.settle()
            after[self.layer] = [bank[n].cfg.site.layer for n in device(bank)["names"]]

    saes = {i: sae for i, sae in enumerate(bank.values())}
    probes = {f"model.layers.{i}.mlp.output": Activations(Watch(i)) for i in range(4)}
    with torch.no_grad(), gsf.attach(gemma, {**saes, **probes}, tokens="all"):
        gemma(tiny.ids())
    # at the MLP of layer i its SAE is there before the model asks, and the one before has not left yet
    assert after == {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3]}
    bank.settle()
    assert [bank[n].cfg.site.layer for n in device(bank)["names"]] == [3, 0]  # the next token begins at layer 0
    assert bank.stats.hits == 4


def test_gradients_and_attribution(gemma, tmp_path):
    folder = release(tmp_path, 4)
    saes = list(each_loaded(folder).values())
    bank = Bank(folder, device_bytes=4 * ONE)
    ids = tiny.ids()
    found = []
    with torch.inference_mode(), gsf.attach(gemma, bank, tokens="all"):
        gemma(ids)  # loaded here, the weights must still be fit for a graph
    for source in (saes, bank):
        with gsf.attach(gemma, source, mode="splice+error", tokens="all") as run:
            found.append(run.attribution(gemma(ids).logits[0, -1, 5]))
    for key in found[0]:
        assert found[0][key] == found[1][key]
    small = Bank(folder, device_bytes=2 * ONE)
    with gsf.attach(gemma, small, mode="splice", tokens="all"), pytest.raises(gsf.BankError, match="autograd"):
        gemma(ids)  # the graph needs all four: an error, no excess
    assert device(small)["peak"] <= 2 * ONE
    with torch.no_grad(), gsf.attach(gemma, small, mode="splice", tokens="all"):
        gemma(ids)


def write_transcoder(folder, layer, seed):
    folder.mkdir(parents=True)
    w = arrays(seed)
    stored = {"w_enc": w["W_enc"], "w_dec": w["W_dec"]} | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}
    skip = np.random.default_rng(seed).standard_normal((D, D)).astype("f4") / 10
    save_file(stored | {"affine_skip_connection": skip}, folder / "params.safetensors")
    config = {"type": "transcoder", "affine_connection": True, "architecture": "jump_relu"}
    for end, norm in (("in", "pre"), ("out", "post")):
        config[f"hf_hook_point_{end}"] = f"model.layers.{layer}.{norm}_feedforward_layernorm.output"
    (folder / "config.json").write_text(json.dumps(config))


def test_a_forward_that_fails_leaves_nothing_in_use(gemma, tmp_path):
    for layer in range(3):
        write_transcoder(tmp_path / "transcoder" / f"layer_{layer}_width_16k_l0_small_affine", layer, layer)
    bank = Bank(tmp_path, device_bytes=2 * (ONE + 4 * D * D))

    def fail(*_):
        raise ZeroDivisionError

    with torch.no_grad(), gsf.attach(gemma, bank, mode="splice", tokens="all"):
        # between the site that the second transcoder reads and the one that it writes
        handle = gemma.model.layers[1].mlp.register_forward_hook(fail)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                gemma(tiny.ids())
            bank.settle()
            assert not any(slot.pins for slot in bank._store.on_device.slots.values())
        handle.remove()
        gemma(tiny.ids())


def test_transcoders_and_several_widths_at_one_site(gemma, tmp_path):
    for layer in range(3):
        write_transcoder(tmp_path / "t" / "transcoder" / f"layer_{layer}_width_16k_l0_small_affine", layer, layer)
    bank = Bank(tmp_path / "t", device_bytes=2 * (ONE + 4 * D * D))
    saes = [from_pretrained(tmp_path / "t", name) for name in bank]
    ids = tiny.ids()
    with torch.no_grad():
        for mode in ("splice", "splice+error"):
            logits = []
            for source in (saes, bank):
                with gsf.attach(gemma, source, mode=mode, edits={0: gsf.Add(2, 1.0)}, tokens="all"):
                    logits.append(gemma(ids).logits)
            assert torch.equal(*logits)
        # two residual SAEs of one layer: keyed by name
        folder = release(tmp_path / "a", 2)
        (folder / "layer_0" / "width_65k").mkdir()
        release(tmp_path / "b", 1, seed=3)
        other = tmp_path / "b" / folder.name / "layer_0" / "width_16k"
        other.rename(folder / "layer_0" / "width_65k" / "x")
        both = Bank(folder)
        with gsf.attach(gemma, both, tokens="all") as run:
            gemma(ids)
        assert sorted(map(str, run.latents)) == sorted(
            [str(tiny.resid(1)), *(n for n in both if n.startswith("layer_0"))]
        )
        with pytest.raises(gsf.AttachError, match="two splices"):
            gsf.attach(gemma, both, mode="splice", tokens="all")
        with gsf.attach(gemma, both.select("*/width_16k/*"), mode="splice", tokens="all") as run:
            gemma(ids)
        assert set(run.latents) == {tiny.resid(0), tiny.resid(1)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three small models, saved and loaded under their names, and a release for each."""
    transformers = pytest.importorskip("transformers")
    where = tmp_path_factory.mktemp("experts")
    models, sources = {}, {}
    for i, name in enumerate(("poet", "lawyer", "coder")):
        model = tiny.gemma2()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
        model.save_pretrained(where / name)
        models[name] = transformers.AutoModelForCausalLM.from_pretrained(where / name).eval()
        sources[name] = release(where / "saes" / name, 4, seed=10 + i)
    return models, sources


def test_three_experts_switched_at_random_under_one_budget(experts):
    models, sources = experts
    bank = Bank(sources, device_bytes=4 * ONE, host_bytes=3 * WEIGHTS)
    assert bank.models == list(models)
    draw = random.Random(3)
    for _ in range(12):
        name = draw.choice(list(models))
        bank.prefetch(name)  # what a router would do
        ids = tiny.ids(seed=draw.randrange(100))
        saes = [from_pretrained(sources[name], n.split(":")[1]) for n in bank.of(name)]
        with torch.no_grad():
            with gsf.attach(models[name], saes, mode="splice", tokens="all") as want:
                logits = models[name](ids).logits
            with gsf.attach(models[name], bank, mode="splice", tokens="all") as run:
                assert torch.equal(models[name](ids).logits, logits)
        for layer in range(4):
            assert run.latents[layer] == want.latents[layer]
    bank.settle()
    held = bank.held()
    assert held["device"]["peak"] == 4 * ONE
    assert held["host"]["peak"] <= 3 * WEIGHTS
    assert bank.stats.prefetched > 0


def test_experts_in_threads(experts):
    models, sources = experts
    bank = Bank(sources, device_bytes=4 * ONE)
    ids = tiny.ids()
    want = {}
    with torch.no_grad():
        for name, model in models.items():
            with gsf.attach(model, Bank(sources[name]), mode="splice", tokens="all"):
                want[name] = model(ids).logits

    def work(name):
        with torch.no_grad():
            for _ in range(4):
                bank.prefetch(name)
                with gsf.attach(models[name], bank, mode="splice", tokens="all"):
                    assert torch.equal(models[name](ids).logits, want[name])

    run_threads(*(lambda name=name: work(name) for name in models))
    assert device(bank)["peak"] <= 4 * ONE


def test_a_model_that_the_bank_does_not_know(experts, gemma):
    models, sources = experts
    bank = Bank({n: sources[n] for n in ("poet", "lawyer")})
    with pytest.raises(gsf.AttachError, match=r"'poet', 'lawyer'.*'coder'.*bank\.of"):
        gsf.attach(models["coder"], bank, tokens="all")
    with torch.no_grad(), gsf.attach(gemma, bank.of("poet"), tokens="all") as run:  # told, whatever it calls itself
        gemma(tiny.ids())
    assert len(run.latents) == 4


@pytest.mark.slow
def test_26_residual_saes_in_a_budget_of_four(tmp_path):
    model = tiny.gemma2(num_hidden_layers=26)
    folder = release(tmp_path, 26)
    bank = Bank(folder, device_bytes=4 * ONE)
    saes = list(each_loaded(folder).values())
    prompt = tiny.ids(1)
    with torch.no_grad():
        with gsf.attach(model, saes, mode="splice+error", edits={13: gsf.Add(5, 3.0)}, tokens="all") as want:
            expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
        with gsf.attach(model, bank, mode="splice+error", edits={13: gsf.Add(5, 3.0)}, tokens="all") as run:
            assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    bank.settle()
    for layer in range(26):
        assert run.latents[layer] == want.latents[layer]
    assert device(bank)["peak"] == 4 * ONE
    assert len(device(bank)["names"]) == 4
