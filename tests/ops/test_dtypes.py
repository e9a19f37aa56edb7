"""Weights and activations in float32, bfloat16 and float16 on every path: what is 16 bits wide is widened exactly,
computed in float32, and rounded once at the end."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder
from gemmascope_fast.sae.topk import AbsTopKSAE, TopKSAE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
D, F, T = 33, 70, 19

weight_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
activation_dtypes = pytest.mark.parametrize("x_dtype", DTYPES, ids=str)


def arrays(dtype, seed=0, d_in=D, d_out=D, skip=False):
    g = torch.Generator().manual_seed(seed)
    made = {
        "W_enc": torch.randn(d_in, F, generator=g) / d_in**0.5,
        "W_dec": torch.randn(F, d_out, generator=g) / d_out**0.5,
        "b_enc": 0.1 * torch.randn(F, generator=g),
        "b_dec": 0.1 * torch.randn(d_out, generator=g),
        "threshold": torch.full((F,), 0.4),
    }
    if skip:
        made["W_skip"] = torch.randn(d_in, d_out, generator=g) / d_in**0.5
    return {name: value.to(dtype) for name, value in made.items()}


KINDS = {
    "sae": lambda w: gsf.JumpReLUSAE.from_weights(**w),
    "transcoder": lambda w: gsf.JumpReLUTranscoder.from_weights(**w),
    "skip": lambda w: gsf.JumpReLUSkipTranscoder.from_weights(**w),
    "topk": lambda w: TopKSAE.from_weights(**w | {"threshold": 0 * w["threshold"]}, k=5),
    "abs topk": lambda w: AbsTopKSAE.from_weights(**w | {"threshold": 0 * w["threshold"]}, k=5),
    "crosscoder": lambda w: Crosscoder.from_weights(**w, n_layers=3),
}


def pair(kind, dtype):
    """The module in `dtype` and the same weights widened to float32."""
    w = arrays(dtype, d_out=24 if kind == "transcoder" else D, skip=kind == "skip")
    return KINDS[kind](w), KINDS[kind]({name: value.float() for name, value in w.items()})


def activations(x_dtype, *lead):
    return torch.randn(*lead, D, generator=torch.Generator().manual_seed(9)).to(x_dtype)


@weight_dtypes
@activation_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_float32_evaluation_rounded_once(kind, dtype, x_dtype):
    own, wide = pair(kind, dtype)
    x = activations(x_dtype, T)
    got, want = own.encode_sparse(x), wide.encode_sparse(x.float())
    assert got.nnz > T
    assert got == want.to(dtype)
    assert torch.equal(own.encode(x), want.to(dtype).to_dense())
    # decode reads the rounded latents, widens them, and rounds once more
    out = wide.decode(got.to(torch.float32))
    assert torch.equal(own.decode(got), out.to(dtype))
    whole = own(x)
    assert whole.dtype == dtype
    if kind == "skip":
        assert torch.equal(whole, out.to(dtype) + wide.skip(x.float()).to(dtype))
    else:
        assert torch.equal(whole, out.to(dtype).reshape(whole.shape))


@weight_dtypes
@activation_dtypes
def test_the_screen_the_batch_and_the_instruction_set_give_one_answer(dtype, x_dtype, isa):
    own, _ = pair("sae", dtype)
    x = activations(x_dtype, T)
    want = own.encode_sparse(x, screen=False)
    for screen in (None, True):
        assert own.encode_sparse(x, screen=screen) == want
    for t in range(T):
        assert own.encode_sparse(x[t]) == want[t]


@weight_dtypes
@activation_dtypes
def test_gradients_come_in_the_dtype_of_what_they_are_of(dtype, x_dtype):
    own, wide = pair("sae", dtype)
    grads = []
    for sae, x in ((own, activations(x_dtype, T)), (wide, activations(x_dtype, T).float())):
        x.requires_grad_()
        sae(x).float().square().sum().backward()
        assert x.grad.dtype == x.dtype
        assert sae.W_enc.grad.dtype == sae.W_dec.grad.dtype == sae.dtype
        grads.append((x.grad, sae.W_enc.grad, sae.W_dec.grad, sae.b_dec.grad))
    # forward values and gradients are rounded to `dtype` on the way: a few of its epsilons of the largest entry,
    # one for each of the rounded factors of a product (latent, x̂, its gradient) and one for the result
    eps = max(torch.finfo(dtype).eps, torch.finfo(x_dtype).eps)
    for got, want in zip(*grads, strict=True):
        assert (got.float() - want.float()).abs().max() <= 8 * eps * want.abs().max()


@weight_dtypes
@activation_dtypes
def test_cross_layer_transcoders(dtype, x_dtype):
    n = 3
    layers = [arrays(dtype, i, d_out=(n - i) * D) for i in range(n)]
    own = CrossLayerTranscoder([gsf.JumpReLUTranscoder.from_weights(**w) for w in layers])
    wide = CrossLayerTranscoder(
        [gsf.JumpReLUTranscoder.from_weights(**{k: v.float() for k, v in w.items()}) for w in layers]
    )
    x = activations(x_dtype, n, T)
    got, want = own.encode_sparse(x), wide.encode_sparse(x.float())
    assert all(a == b.to(dtype) for a, b in zip(got, want, strict=True))
    out = own.decode(got)
    assert out.dtype == dtype
    assert torch.equal(out, wide.decode([latents.to(torch.float32) for latents in got]).to(dtype))


@weight_dtypes
@activation_dtypes
@pytest.mark.parametrize("mode", ["observe", "splice", "splice+error"])
def test_attached_to_a_model_of_another_dtype(dtype, x_dtype, mode):
    model = tiny.gemma3().to(x_dtype)
    sae = tiny.sae().to(dtype)
    ids = tiny.ids()
    with torch.no_grad():
        with tiny.Hand(model.model.layers[1]) as before:
            plain = model(ids).logits
        with gsf.attach(model, {1: sae}, mode=mode, tokens="all") as run, tiny.Hand(model.model.layers[1]) as after:
            logits = model(ids).logits
    assert logits.dtype == x_dtype
    x = before.rows()
    assert run.latents[1] == sae.encode_sparse(x)
    assert run.latents[1].dtype == dtype
    want = sae(x).to(x_dtype) if mode == "splice" else x
    assert torch.equal(after.rows(), want)
    if mode != "splice":
        assert torch.equal(logits, plain)
