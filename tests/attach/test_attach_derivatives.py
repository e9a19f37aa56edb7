"""A model with attached SAEs in forward mode and under torch.func, against SAEs written by hand in hooks."""

import attach_models as tiny
import pytest
import torch
from test_attach_multi import clt
from torch.func import grad, jvp, vmap

import gemmascope_fast as gsf

CHOSEN = torch.arange(9) % 2 == 0


@pytest.fixture(scope="module")
def model():
    return tiny.gemma3().requires_grad_(False)


def by_hand(coder, mode, chosen):
    def change(x):
        z = x @ coder.W_enc + coder.b_enc
        x_hat = (torch.relu(z) * (z > coder.threshold)) @ coder.W_dec + coder.b_dec
        new = x_hat if mode == "splice" else x_hat + (x - x_hat).detach()
        return torch.where(chosen[None, :, None], new, x)

    return change


def logits(model):
    return lambda x: model(inputs_embeds=x).logits


def asked(model, x, v):
    f = logits(model)
    return jvp(f, (x,), (v,))[1], grad(lambda t: f(t).logsumexp(-1).sum())(x)


@pytest.mark.parametrize("chosen", [torch.ones(9, dtype=torch.bool), CHOSEN], ids=["all", "some"])
@pytest.mark.parametrize("mode", ["splice", "splice+error"])
def test_forward_and_reverse_mode(model, mode, chosen):
    sae = tiny.sae().requires_grad_(False)
    x = model.get_input_embeddings()(tiny.ids())
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    plain = asked(model, x, v)
    with gsf.attach(model, {1: sae}, mode=mode, tokens=chosen.expand(2, 9)):
        ours = asked(model, x, v)
    with tiny.Hand(tiny.layer(model), change=by_hand(sae, mode, chosen)):
        theirs = asked(model, x, v)
    for got, want, without in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
        assert not torch.allclose(got, without, rtol=1e-2)


@pytest.mark.parametrize("mode", ["splice", "splice+error"])
def test_cross_layer_transcoders_have_one_derivative_in_both_modes(model, mode):
    coder = clt(skip=True).requires_grad_(False)
    x = model.get_input_embeddings()(tiny.ids())
    v, w = (torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    f = logits(model)
    with gsf.attach(model, coder, mode=mode, tokens="all"):
        out, forward = jvp(f, (x,), (v,))
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        reverse = grad(lambda t: (f(t) * weight).sum())(x)
    assert float((forward * weight).sum()) == pytest.approx(float((reverse * v).sum()), rel=1e-3)
    assert float((reverse * w).sum()) != pytest.approx(float((reverse * v).sum()), rel=1e-3)


def test_vmap_over_an_attached_model_is_an_error(model):
    sae = tiny.sae().requires_grad_(False)
    x = model.get_input_embeddings()(tiny.ids())[:, None]
    attached = gsf.attach(model, {1: sae}, mode="splice", tokens="all")
    with attached, pytest.raises((NotImplementedError, gsf.AttachError), match=r"vmap|rows"):
        vmap(logits(model))(x)
