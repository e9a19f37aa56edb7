"""The loop's benches on tiny models: verified, every candidate runs, what is missing is listed."""

import attach_models as tiny
import pytest
import torch

from gemmascope_fast.attach import attach
from gemmascope_fast.dev.bench import shapes, suite_loop
from gemmascope_fast.dev.bench.engine import time_bench
from gemmascope_fast.dev.bench.shapes import fitted, gemma_2_2b

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = {"ours, observe", "ours, splice", "ours, splice+error"}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(suite_loop, "NEW_TOKENS", 3)
    monkeypatch.setattr(suite_loop, "SHORT_TOKENS", 4)
    monkeypatch.setattr(suite_loop, "PROMPT_TOKENS", 9)
    monkeypatch.setattr("gemmascope_fast.dev.bench.timing.LEAST_ROUNDS", 2)


@pytest.mark.parametrize("op", ["generate", "prefill"])
def test_every_way_of_the_loop_is_timed_and_llama_cpp_is_listed(short, monkeypatch, op):
    monkeypatch.setattr(suite_loop, "LlamaCpp", lambda threads: (_ for _ in ()).throw(ModuleNotFoundError(name="x")))
    pair = suite_loop.Pair(tiny.gemma3(), tiny.ids()[:1], tiny.sae().requires_grad_(False), 1, llama=True)
    with torch.inference_mode():
        bench = suite_loop._build(op, 3, lambda: pair)
        results = time_bench(bench, None, 2, 0)
    assert {r.impl for r in results.rows} == {"model alone", "eager fp32", *OURS}
    assert all(r.support_equal for r in results.rows if r.impl in OURS)
    assert len(results.ratios) == 4
    missing = {"loop/generate/T=3/32x96/llama.cpp q4_k_m, model alone": "not installed: x"}
    assert results.missing == (missing if op == "generate" else {})


def test_both_benches_of_a_model_share_it(monkeypatch):
    made = []
    monkeypatch.setattr(suite_loop, "demo", lambda: made.append("demo") or "pair")
    monkeypatch.setattr(suite_loop, "two_b", lambda: made.append("2b") or "pair")
    monkeypatch.setattr(suite_loop, "_build", lambda op, T, make: make())
    plans = list(suite_loop.loop_suite([]))
    assert [(p.op, p.d_in) for p in plans] == [
        ("generate", 640),
        ("prefill", 640),
        ("generate", 2304),
        ("prefill", 2304),
    ]
    assert [p.build() for p in plans] == ["pair"] * 4
    assert made == ["demo", "2b"]


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
