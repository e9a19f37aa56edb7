"""Errors for bad input of an SAE name the argument, what was expected and what was given."""

import pytest
import torch
from test_sae import D, F, make, tokens, weights

import gemmascope_fast as gsf


def test_bad_activations():
    sae = make()
    for x, kind, message in (
        (tokens(3).int(), TypeError, r"x: expected a floating dtype, got torch.int32"),
        (tokens(3).to(torch.complex64), TypeError, r"x: expected a floating dtype, got torch.complex64"),
        (tokens(3, d=D + 1), ValueError, r"x: expected d_in = 33 in its last dimension, got \(3, 34\)"),
        (torch.tensor(1.0), ValueError, r"x: expected d_in = 33"),
        (tokens(3).to("meta"), ValueError, r"x: expected a tensor on cpu, like the SAE, got meta"),
    ):
        for call in (sae.encode_sparse, sae.encode, sae):
            with pytest.raises(kind, match=message):
                call(x)


@pytest.mark.parametrize("kind", ["list", "numpy.ndarray"])
def test_what_is_no_tensor_is_named(kind):
    def other(t):
        return t.tolist() if kind == "list" else t.numpy()

    sae, w = make(), weights()
    crosscoder = gsf.Crosscoder.from_weights(**w, n_layers=3)
    coders = {
        "sae": sae,
        "top-k": gsf.TopKSAE.from_weights(**w | {"threshold": torch.zeros(F)}, k=4),
        "crosscoder": crosscoder,
        "matryoshka": gsf.MatryoshkaSAE.from_sae(sae),
        "skip": gsf.JumpReLUSkipTranscoder.from_weights(**w, W_skip=torch.eye(D)),
    }
    for name, coder in coders.items():
        for call in (coder.encode_sparse, coder.encode, coder):
            with pytest.raises(TypeError, match=rf"^x: expected a torch.Tensor, got {kind}$"):
                call(other(tokens(3)))
        with pytest.raises(TypeError, match=rf"^latents: expected a torch.Tensor or SparseLatents, got {kind}$"):
            coder.decode(other(torch.zeros(3, F)))
        assert coder.decode(torch.zeros(3, F)).shape == (3, D), name
    layers = {n: [t, t] for n, t in w.items()} | {"W_dec": [torch.zeros(F, 2, D)] * 2}
    clt = gsf.CrossLayerTranscoder.from_weights(**layers)
    for call in (clt.encode_sparse, clt.encode, clt):
        with pytest.raises(TypeError, match=rf"^x\[0\]: expected a torch.Tensor, got {kind}$"):
            call(other(torch.zeros(2, 3, D)))
    with pytest.raises(TypeError, match=rf"^latents\[0\]: expected a torch.Tensor or SparseLatents, got {kind}$"):
        clt.decode(other(torch.zeros(2, 3, F)))
    with pytest.raises(TypeError, match=rf"^b_enc: expected a torch.Tensor, got {kind}$"):
        gsf.JumpReLUSAE.from_weights(**(w | {"b_enc": other(w["b_enc"])}))
    with pytest.raises(TypeError, match=rf"^W_skip: expected a torch.Tensor, got {kind}$"):
        gsf.JumpReLUSkipTranscoder.from_weights(**w, W_skip=other(torch.eye(D)))
    for option in ("sample", "centre"):
        with pytest.raises(TypeError, match=rf"^{option}: expected a torch.Tensor, got {kind}$"):
            sae.prepare(**{option: other(tokens(1)[0])})
    with pytest.raises(TypeError, match=rf"^directions: expected a number or a torch.Tensor, got {kind}$"):
        sae.prepare(directions=other(torch.eye(D)))
    with pytest.raises(TypeError, match=rf"^dense: expected a torch.Tensor, got {kind}$"):
        gsf.SparseLatents.from_dense(other(torch.zeros(3, F)))
    with pytest.raises(TypeError, match=r"^latents: expected a torch.Tensor or SparseLatents, got NoneType$"):
        sae.decode(None)


def test_bad_latents():
    sae = make()
    with pytest.raises(ValueError, match=r"latents: expected d_sae = 70 .*got \(3, 69\)"):
        sae.decode(torch.zeros(3, F - 1))
    with pytest.raises(ValueError, match="latents: expected d_sae = 70"):
        sae.decode(gsf.SparseLatents.empty((3, F + 1)))
    for other in (torch.zeros(3, F), gsf.SparseLatents.empty((3, F))):
        with pytest.raises(ValueError, match="latents: expected them on cpu, like the SAE, got meta"):
            sae.decode(other.to("meta"))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"latents: expected a floating dtype, got {dtype}"):
            sae.decode(torch.zeros(3, F, dtype=dtype))
    bad = gsf.SparseLatents(torch.tensor([0, 1]), torch.tensor([F], dtype=torch.int32), torch.ones(1), (1, F))
    for name in ("native", "eager"):
        with gsf.backend(name), pytest.raises(IndexError, match=r"col_indices: expected values in \[0, 70\), got 70"):
            sae.decode(bad)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"W_dec": torch.zeros(F + 1, D)}, ValueError, r"W_dec: expected \[d_sae = 70, d_out\], got"),
        ({"b_enc": torch.zeros(F - 1)}, ValueError, r"b_enc: expected \[70\], got \(69,\)"),
        ({"b_dec": torch.zeros(D, 1)}, ValueError, r"b_dec: expected 1 dimensions"),
        ({"b_dec": torch.zeros(D + 1)}, ValueError, r"b_dec: expected \[33\], got \(34,\)"),
        ({"threshold": torch.zeros(1)}, ValueError, r"threshold: expected \[70\]"),
        ({"W_enc": torch.zeros(D, F).double()}, TypeError, "W_enc: expected float32, bfloat16 or float16"),
        ({"W_dec": torch.zeros(F, D).bfloat16()}, ValueError, "W_dec: expected torch.float32 on cpu, like W_enc"),
        ({"threshold": torch.full((F,), float("inf"))}, ValueError, "threshold: expected finite values, got inf"),
        ({"threshold": torch.full((F,), float("nan"))}, ValueError, "threshold: expected finite values, got nan"),
    ],
)
def test_bad_weights(change, kind, message):
    with pytest.raises(kind, match=message):
        gsf.JumpReLUSAE.from_weights(**(weights() | change))


def test_config_must_agree():
    with pytest.raises(ValueError, match="cfg: expected d_in 33, d_sae 70, d_out 33"):
        gsf.JumpReLUSAE.from_weights(**weights(), cfg=gsf.SAEConfig(D, F + 1, D))
