"""The loop's benches on tiny models: verified, every candidate runs, what is missing is listed."""

import importlib.util

import attach_models as tiny
import pytest
import torch

from gemmascope_fast.attach import attach
from gemmascope_fast.dev.bench import shapes, suite_loop
from gemmascope_fast.dev.bench.engine import Unavailable, time_bench
from gemmascope_fast.dev.bench.shapes import fitted, gemma_2_2b
from gemmascope_fast.dev.bench.timing import Seconds

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = {"ours, observe", "ours, splice", "ours, splice+error"}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(suite_loop, "NEW_TOKENS", 3)
    monkeypatch.setattr(suite_loop, "SHORT_TOKENS", 4)
    monkeypatch.setattr(suite_loop, "PROMPT_TOKENS", 9)
    monkeypatch.setattr(suite_loop, "HOOK_TOKENS", 3)
    monkeypatch.setattr(suite_loop, "_HELD", {})
    monkeypatch.setattr("gemmascope_fast.dev.bench.timing.LEAST_ROUNDS", 2)


@pytest.mark.parametrize("op", ["generate", "prefill"])
def test_every_way_of_the_loop_is_timed_and_llama_cpp_is_listed(short, monkeypatch, op):
    monkeypatch.setattr(suite_loop, "LlamaCpp", lambda threads: (_ for _ in ()).throw(ModuleNotFoundError(name="x")))
    loop = suite_loop.Loop(tiny.gemma3(), tiny.ids()[:1], {1: tiny.sae().requires_grad_(False)}, llama=True)
    with torch.inference_mode():
        bench = suite_loop._whole(op, 3, lambda: loop)
        results = time_bench(bench, None, 2, 0)
    assert {r.impl for r in results.rows} == {"model alone", "eager fp32", *OURS}
    assert all(r.support_equal for r in results.rows if r.impl in OURS)
    assert len(results.ratios) == 4
    missing = {"loop/generate/T=3/32x96/llama.cpp q4_k_m, model alone": "not installed: x"}
    assert results.missing == (missing if op == "generate" else {})


def test_the_time_inside_the_hooks_is_told_from_the_models(short, monkeypatch):
    """Of two SAEs at two layers: each candidate's hooks run in each, and the model's own step has none."""
    saes = {layer: tiny.sae(seed=layer).requires_grad_(False) for layer in (0, 2)}
    loop = suite_loop.Loop(tiny.gemma3(), tiny.ids()[:1], saes)
    calls = []
    real = suite_loop.peers.eager_encode
    monkeypatch.setattr(suite_loop.peers, "eager_encode", lambda *a: calls.append(len(a[1])) or real(*a))
    with torch.inference_mode():
        bench = suite_loop._hooks("hooks, 2 layers", 32, 96, lambda: loop)
        by_name = {c.impl: c for c in bench.candidates}
        calls.clear()
        taken, seen = by_name["eager fp32"].call(), list(calls)
        results = time_bench(bench, None, 2, 0)
    assert seen == [4, 4, 1, 1, 1, 1, 1, 1]  # the prompt, then three tokens, at both layers
    assert isinstance(taken, Seconds)
    found = {r.impl: r.median_ms for r in results.rows}
    hooks = {"ours, observe", "ours, splice+error", "ours, clamp of three", "eager fp32", "eager fp32, splice+error"}
    assert {"model alone", *hooks} <= set(found)
    assert all(found[impl] > 0 for impl in hooks)
    if importlib.util.find_spec("sae_lens") is None:
        assert [name.rpartition("/")[2] for name in results.missing] == ["SAELens fp32", "SAELens fp32, splice+error"]


def test_splices_by_hand_are_those_of_attach(short):
    """What peers do by hand in their hooks is what `attach` does, up to rounding."""
    loop = suite_loop.Loop(tiny.gemma3(), tiny.ids()[:1], {1: tiny.sae().requires_grad_(False)})
    for mode in ("observe", "splice", "splice+error"):
        outputs = []
        for way in (suite_loop.ours(loop, mode), suite_loop.by_hand(loop, suite_loop.eager, mode)):
            with torch.inference_mode(), way():
                outputs.append(loop.model(input_ids=loop.ids).logits)
        assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4), mode


def test_benches_of_a_model_share_it_and_the_one_before_is_let_go(monkeypatch):
    made = []
    for name in ("demo", "demo_every_layer", "two_b", "two_b_every_layer"):
        monkeypatch.setattr(suite_loop, name, lambda name=name: made.append(name) or name)
    monkeypatch.setattr(suite_loop, "_HELD", {})
    monkeypatch.setattr(suite_loop, "_whole", lambda op, T, make: suite_loop._shared(make))
    monkeypatch.setattr(suite_loop, "_hooks", lambda op, d_in, d_sae, make: suite_loop._shared(make))
    plans = list(suite_loop.loop_suite([]))
    assert [(p.op, p.d_in) for p in plans] == [
        ("generate", 640),
        ("prefill", 640),
        ("hooks, 1 layer", 640),
        ("hooks, 18 layers", 640),
        ("generate", 2304),
        ("prefill", 2304),
        ("hooks, 1 layer", 2304),
        ("hooks, 26 layers", 2304),
    ]
    assert [p.build() for p in plans] == ["demo"] * 3 + ["demo_every_layer"] + ["two_b"] * 3 + ["two_b_every_layer"]
    assert made == ["demo", "demo_every_layer", "two_b", "two_b_every_layer"]
    assert len(suite_loop._HELD) == 1


def test_a_model_that_memory_does_not_hold_is_listed(monkeypatch):
    def none():
        raise Unavailable("memory has no room")

    bench = suite_loop._hooks("hooks, 26 layers", 2304, 16384, none)
    assert bench.candidates == []
    assert bench.missing == {"ours, observe": "memory has no room"}


@pytest.fixture
def narrow(monkeypatch):
    """Gemma 2 2B's builder at a fraction of its width."""
    real = shapes._config

    def config(layers):
        found = real(layers)
        for name, size in {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}.items():
            setattr(found, name, size)
        return found

    monkeypatch.setattr(shapes, "_config", config)


@pytest.mark.parametrize(("free", "layers"), [(64 << 30, 26), (9 << 30, 1)])
def test_the_2b_shape_has_every_layer_where_memory_allows(narrow, monkeypatch, free, layers):
    monkeypatch.setattr(shapes, "available_memory", lambda: free)
    model = gemma_2_2b()
    blocks = model.model.layers
    assert len(blocks) == model.config.num_hidden_layers == len(model.config.layer_types) == layers
    assert len({b.mlp.up_proj.weight.data_ptr() for b in blocks}) == layers
    assert [b.self_attn.layer_idx for b in blocks] == list(range(layers))
    assert blocks[0].mlp.up_proj.weight.dtype == torch.bfloat16
    ids = torch.randint(3, 97, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        out = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        # a cache that took one layer for another would answer otherwise than the whole text read at once
        again = model(input_ids=out[:, :-1]).logits[:, -1]
    assert torch.isfinite(whole).all()
    assert int(again.argmax()) == int(out[0, -1])


def test_fitted_saes_fire_as_often_as_asked_where_they_are(narrow):
    model = gemma_2_2b(4)
    ids = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(0))
    saes = fitted(model, ids, [0, 1, 2], 512, 20, copies=2)
    assert saes[0].W_enc.data_ptr() == saes[2].W_enc.data_ptr() != saes[1].W_enc.data_ptr()
    with torch.inference_mode(), attach(model, saes, tokens="all") as run:
        model.generate(ids, max_new_tokens=shapes.DECODED, min_new_tokens=shapes.DECODED, do_sample=False)
    for layer in saes:
        decoded = run.latents[layer][ids.shape[1] :]
        assert 10 < decoded.nnz / decoded.n_rows < 40
