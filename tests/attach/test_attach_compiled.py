"""attach on compiled models: compiled code would skip a hook added later, so it must be discarded."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach.transformers.compiled import is_compiled

BACKEND = "eager"  # the same tracing and guards as inductor, without its code generation


def whole(model):
    return torch.compile(model, backend=BACKEND)


def in_place(model):
    model.compile(backend=BACKEND)
    return model


def layer_in_place(model):
    model.model.layers[0].compile(backend=BACKEND)
    return model


def layer_replaced(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend=BACKEND)
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


@pytest.fixture(autouse=True)
def _fresh():
    """What was compiled in one test does not count towards the limits of the next."""
    yield
    torch._dynamo.reset()


SLOW = pytest.mark.slow  # a graph with breaks is traced once per frame that they lie in


@pytest.mark.parametrize(
    "compiled",
    [layer_in_place, layer_replaced, *(pytest.param(way, marks=SLOW) for way in (whole, in_place, forward))],
)
def test_compile_call_attach_call(compiled):
    model = compiled(tiny.gemma3(num_hidden_layers=2))
    assert is_compiled(model)
    ids, sae = tiny.ids(), tiny.sae()
    with torch.no_grad():
        base = model(ids).logits
        plain = tiny.gemma3(num_hidden_layers=2)
        with tiny.Hand(plain.model.layers[0]) as hand:
            plain(ids)
        with gsf.attach(model, {0: sae, 1: sae}, tokens="all") as run:
            watched = model(ids).logits
            watched_again = model(ids).logits
        assert run.latents[0].n_rows == 36
        assert torch.equal(run.latents[0][:18].to_dense() > 0, sae.encode(hand.rows()) > 0)
        torch.testing.assert_close(watched, base)
        assert torch.equal(watched, watched_again)
        with gsf.attach(model, {0: sae}, mode="splice", tokens="all"):
            spliced = model(ids).logits
        with tiny.Hand(plain.model.layers[0], change=sae):
            torch.testing.assert_close(spliced, plain(ids).logits)
        assert torch.equal(model(ids).logits, base)


def test_an_uncompiled_model_keeps_other_compiled_code():
    model, calls = tiny.gemma3(num_hidden_layers=2), []

    def backend(graph, _inputs):
        calls.append(1)
        return graph

    other = torch.compile(lambda x: x + 1, backend=backend)
    other(torch.ones(3))
    assert not is_compiled(model)
    with torch.no_grad(), gsf.attach(model, {1: tiny.sae()}, tokens="all"):
        model(tiny.ids())
    other(torch.ones(3))
    assert len(calls) == 1


def test_generate_with_a_compiled_model():
    model = tiny.gemma3(num_hidden_layers=2)
    ids, sae = tiny.ids(), tiny.sae()
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    base = model.generate(ids, **options)
    with gsf.attach(model, {1: sae}, tokens="all") as want:
        model.generate(ids, **options)
    compiled = whole(model)
    with gsf.attach(compiled, {1: sae}, tokens="all") as run:
        assert torch.equal(compiled.generate(ids, **options), base)
    assert run.latents[1] == want.latents[1]
    assert "generate" not in model.__dict__


@pytest.mark.slow
def test_generate_that_compiles_by_itself():
    """A static cache with a compile configuration: generate compiles the call, before or during the run."""
    from transformers import CompileConfig

    model = tiny.gemma3(num_hidden_layers=2)
    ids, sae = tiny.ids(1), tiny.sae()
    config = CompileConfig(backend=BACKEND, mode=None, fullgraph=False)
    config._compile_all_devices = True
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    with gsf.attach(model, {1: sae}, tokens="all") as want:
        model.generate(ids, disable_compile=True, **options)
    for _ in range(2):
        with gsf.attach(model, {1: sae}, tokens="all") as run:
            model.generate(ids, compile_config=config, **options)
        assert "_compiled_call" in model.__dict__
        assert run.latents[1].n_rows == 13
        torch.testing.assert_close(run.latents[1].to_dense(), want.latents[1].to_dense(), rtol=1e-3, atol=1e-3)
        model.generate(ids, compile_config=config, **options)


def test_code_that_hides_from_attach_is_noticed():
    """A site whose hook does not run in a forward is an error, never a missing row."""
    model = tiny.gemma3(num_hidden_layers=2)
    block = model.model.layers[0]
    with torch.no_grad():
        hidden = torch.compile(type(block).forward, backend=BACKEND)
        type_forward = lambda *args, **kwargs: hidden(block, *args, **kwargs)  # noqa: E731
        block.forward = type_forward
        model(tiny.ids())
        with (
            gsf.attach(model, {"model.layers.0.mlp": tiny.sae()}, tokens="all") as run,
            pytest.raises(gsf.AttachError, match="compiled before attach"),
        ):
            model(tiny.ids())
    assert len(run.tokens) == 0
