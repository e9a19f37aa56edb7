"""attach under gradient checkpointing: gradients equal those without it, and nothing is recorded twice."""

import functools
import threading

import attach_models as tiny
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations, Statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
IDS = tiny.ids()
HEADS = 2 * 24


def sae(seed=1, d_in=tiny.D):
    return tiny.sae(d_in, seed=seed).requires_grad_(False)


def transcoder():
    return tiny.sae(
        kind=gsf.JumpReLUSkipTranscoder,
        W_skip=torch.eye(tiny.D) / 3,
        site=gsf.Site("mlp_in", 2),
        site_out=gsf.Site("mlp", 2),
    ).requires_grad_(False)


SAES = {
    "attention": lambda: {(1, "attn"): sae(d_in=HEADS)},
    "residual stream": lambda: {1: sae()},
    "several": lambda: {(0, "mlp"): sae(), (1, "attn"): sae(2, HEADS), 2: sae(3), (3, "mlp"): sae(4)},
    "transcoder": lambda: [transcoder()],
}
EDITS = {
    "none": None,
    "clamp": lambda: gsf.Clamp(3, 2.0),
    "generated and mask": lambda: [gsf.Scale(5, 3.0, positions=IDS > 20), gsf.Add(7, 1.5, sequences=[1])],
}


def whole_layers(model):
    """As transformers before 5.24: what is checkpointed is the layer's call, its own hooks included."""
    for layer in model.model.layers:
        kind = type(layer)

        def call(self, *args, kind=kind, **kwargs):
            if not (self.whole and self.training and torch.is_grad_enabled()):
                return kind.__call__(self, *args, **kwargs)
            return self._gradient_checkpointing_func(functools.partial(kind.__call__, self, **kwargs), *args)

        layer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "whole": True})
        layer.forward = functools.partial(kind.forward.__wrapped__, layer)


def trained(how):
    """A model in training mode: without checkpointing, or with it reentrant or not, of a layer's forward or call."""
    model = tiny.gemma3().train()
    if how != "plain":
        reentrant, whole = how.split(", ")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant == "reentrant"})
        model.enable_input_require_grads()
        if whole == "calls":
            whole_layers(model)
    return model


HOW = [f"{a}, {b}" for a in ("reentrant", "not reentrant") for b in ("forwards", "calls")]


def loss_of(model, ids=IDS):
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def same(got, want):
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=name)


def options(name, mode, edits):
    given = EDITS[edits]
    saes = SAES[name]()
    if given is None:
        return saes, {"mode": mode}
    key = next(iter(saes)) if isinstance(saes, dict) else gsf.Site("mlp_in", 2)
    return saes, {"mode": mode, "edits": {key: given()}}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("mode", ["splice", "splice+error"])
@pytest.mark.parametrize("name", SAES)
def test_gradients_are_those_without_checkpointing(name, mode, edits):
    want = rows = None
    for how in ("plain", *HOW):
        saes, given = options(name, mode, edits)
        model = trained(how)
        with gsf.attach(model, saes, **given) as run:
            loss_of(model).backward()
        found, latents = gradients(model), {key: run.latents[key].detach() for key in run.latents}
        if how == "plain":
            want, rows = found, latents
            continue
        same(found, want)
        assert latents == rows
        assert len(run.tokens) == IDS.numel()
        assert "_gradient_checkpointing_func" in model.model.layers[0].__dict__
        assert not hasattr(model.model.layers[0]._gradient_checkpointing_func, "__wrapped__")


def test_without_the_splice_the_gradients_are_others():
    model = trained("plain")
    loss_of(model).backward()
    bare = gradients(model)
    with gsf.attach(model, SAES["attention"](), mode="splice"):
        loss_of(model).backward()
    assert any(not torch.allclose(bare[n], g, rtol=1e-2) for n, g in gradients(model).items())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tokens", ["all", "content", torch.arange(9) % 2 == 0])
def test_parameters_of_the_sae_and_a_trained_direction(how, tokens):
    found = []
    for each in ("plain", how):
        model, coder = trained(each), tiny.sae(HEADS)
        push = gsf.Direction(torch.ones(HEADS), 0.5)
        push.vector = torch.nn.Parameter(push.vector)
        with gsf.attach(model, {(1, "attn"): coder}, mode="splice", edits=push, tokens=tokens):
            loss_of(model).backward()
        found.append([push.vector.grad, *(p.grad for p in coder.parameters() if p.grad is not None)])
        assert len(found[-1]) >= 5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("how", HOW)
def test_several_forwards_before_backward_outside_of_the_run_with_edits_changed_between(how):
    """A replay makes the edits of its own call, wherever and whenever backward runs."""
    found = []
    for each in ("plain", how):
        model, edit = trained(each), gsf.Scale(3, 2.0, sequences=torch.tensor([True, False]))
        other = tiny.ids(seed=8)
        with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice", edits=edit):
            first = loss_of(model)
            edit.value, edit.sequences[0] = -3.0, False
            second = loss_of(model, other)
            edit.on = False
        before = tiny.hook_count(model)
        (first * second).backward()
        assert tiny.hook_count(model) == before
        assert (edit.value, edit.on, edit.sequences.tolist()) == (-3.0, False, [False, False])
        found.append(gradients(model))
    same(found[1], found[0])


@pytest.mark.parametrize("how", HOW)
def test_observing_records_each_row_once(how):
    model, got = trained(how), []
    saes = {(1, "attn"): sae(d_in=HEADS), (2, "mlp"): Activations(), 3: Activations(lambda x, rows: got.append(len(x)))}
    with gsf.attach(model, saes, tokens="all") as run:
        seen = run.watch(Statistics(tiny.F))
        loss_of(model).backward()
    assert (len(run.tokens), run.latents[1, "attn"].n_rows, seen.count, got) == (18, 18, 18, [18])
    assert run.activations[2, "mlp"].shape == (18, tiny.D)
    want = gradients(model)
    loss_of(model).backward()
    same(gradients(model), want)


@pytest.mark.parametrize("how", [each for each in HOW if each.startswith("not")])
def test_attribution_where_the_graph_is_kept(how):
    found = []
    for each in ("plain", how):
        model = trained(each)
        with gsf.attach(model, SAES["several"](), mode="splice+error") as run:
            found.append(run.attribution(loss_of(model)))
            found[-1]["path"] = run.integrated_gradients((0, "mlp"), lambda model=model: loss_of(model), 3)
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key].to_dense(), want.to_dense(), rtol=1e-4, atol=1e-7)
        assert want.nnz


def test_attribution_where_no_graph_is_kept_says_so():
    model = trained("reentrant, forwards")
    with gsf.attach(model, SAES["attention"](), mode="splice+error") as run:
        loss = loss_of(model)
        with pytest.raises(gsf.AttachError, match="use_reentrant=False"):
            run.attribution(loss)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nested_runs_and_checkpointing_enabled_inside(order):
    found = []
    for each in (False, True):
        model = trained("plain")
        runs = [
            gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice"),
            gsf.attach(model, {(2, "mlp"): sae()}, mode="splice+error", edits=gsf.Clamp(3, 2.0)),
        ]
        for run in runs:
            run.__enter__()
        if each:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = loss_of(model)
        for number in order:
            runs[number].__exit__(None, None, None)
            if each and number == order[0]:
                model.gradient_checkpointing_enable({"use_reentrant": True})
        loss.backward()
        found.append(gradients(model))
        wrapped = [m for m in model.modules() if hasattr(m.__dict__.get("_gradient_checkpointing_func"), "__wrapped__")]
        assert not wrapped
    same(found[1], found[0])


@pytest.mark.parametrize("how", HOW)
def test_backward_in_another_thread(how):
    """On a GPU autograd's own threads run what is computed again."""
    found = []
    for each in ("plain", how):
        model = trained(each)
        with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice"):
            loss = loss_of(model)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        found.append(gradients(model))
    same(found[1], found[0])


def test_a_run_that_came_later_takes_no_part():
    found = []
    for how in ("plain", "not reentrant, forwards"):
        model = trained(how)
        with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice"):
            loss = loss_of(model)
            with gsf.attach(model, {(2, "attn"): sae(d_in=HEADS)}, mode="splice") as later:
                loss_of(model)
                loss.backward()
        assert len(later.tokens) == 18
        found.append(gradients(model))
    same(found[1], found[0])


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_regions_checkpointed_by_hand_are_refused_in_forward(reentrant):
    model = trained("plain")
    model.enable_input_require_grads()
    layer = model.model.layers[1]
    real = layer.forward
    layer.forward = lambda x, **more: checkpoint(functools.partial(real, **more), x, use_reentrant=reentrant)
    with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice") as run:
        with pytest.raises(gsf.AttachError, match=r"inside torch.utils.checkpoint.*gradient_checkpointing_enable"):
            loss_of(model)
        with torch.no_grad():  # nothing is computed again
            loss_of(model)
    assert len(run.tokens) == 18
    with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}) as run:
        loss_of(model).backward()
    assert len(run.tokens) == 18


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_model_checkpointed_by_hand(reentrant):
    model = trained("plain")
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def whole(x):
        return model(inputs_embeds=x).logits

    with (
        gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice", tokens="all"),
        pytest.raises(gsf.AttachError, match=r"the model itself is called by torch\.utils\.checkpoint"),
    ):
        checkpoint(whole, embeds, use_reentrant=reentrant)
    with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, tokens="all") as run:
        checkpoint(whole, embeds, use_reentrant=reentrant).sum().backward()
    assert len(run.tokens) == 18


def test_other_ways_to_compute_again_are_an_error_in_backward():
    model = trained("plain")

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, run):
            ctx.run = run
            ctx.save_for_backward(x)
            return run(x.detach())

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                torch.autograd.backward(ctx.run(x), grad)
            return x.grad, None

    layer = model.model.layers[1]
    real = layer.forward
    layer.forward = lambda x, **more: Again.apply(x, functools.partial(real, **more))
    with gsf.attach(model, {(1, "attn"): sae(d_in=HEADS)}, mode="splice"):
        loss = loss_of(model)
        with pytest.raises(gsf.AttachError, match="backward recomputes a part of the model"):
            loss.backward()


def test_a_cross_layer_transcoder_is_refused_before_anything_runs():
    from test_attach_multi import clt

    model, ran = trained("not reentrant, forwards"), []
    model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    with (
        gsf.attach(model, clt(), mode="splice") as run,
        pytest.raises(gsf.AttachError, match="cross-layer transcoder"),
    ):
        loss_of(model)
    assert not ran
    assert len(run.tokens) == 0
    with gsf.attach(model, clt()) as run:
        loss_of(model).backward()
    assert len(run.tokens) == 18


def test_read_and_written_in_different_regions_is_refused():
    model, coder = trained("not reentrant, forwards"), transcoder()
    coder.cfg = gsf.SAEConfig(
        tiny.D, tiny.F, tiny.D, gsf.Site("path", path="model.layers.1.mlp.output"), gsf.Site("mlp", 2)
    )
    with gsf.attach(model, coder, mode="splice"), pytest.raises(gsf.AttachError, match="checkpointed separately"):
        loss_of(model)
