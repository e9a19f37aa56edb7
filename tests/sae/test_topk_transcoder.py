"""Top-k transcoders, with and without a skip: latents of the top-k SAE, outputs of a transcoder."""

import pickle

import pytest
import torch
from tiny_model import D, make_model

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.native import save

F, K, OUT = 200, 7, 20
SITES = (gsf.Site("mlp_in", 1), gsf.Site("mlp", 1))


def parts(d_out=OUT, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "W_dec": (F, d_out), "b_enc": (F,), "b_dec": (d_out,)}
    made = {name: torch.randn(shape, generator=g) / 4 for name, shape in shapes.items()}
    return made | {"threshold": torch.zeros(F)}


def made(skip, d_out=OUT):
    cfg = gsf.SAEConfig(D, F, d_out, *SITES)
    if skip:
        W_skip = torch.randn(D, d_out, generator=torch.Generator().manual_seed(9))
        return gsf.TopKSkipTranscoder.from_weights(**parts(d_out), k=K, W_skip=W_skip, cfg=cfg)
    return gsf.TopKTranscoder.from_weights(**parts(d_out), k=K, cfg=cfg)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("screen", [None, False, True])
def test_it_computes_what_its_formula_says(skip, screen):
    coder, w, x = made(skip), {n: t.double() for n, t in parts().items()}, torch.randn(33, D)
    z = x.double() @ w["W_enc"] + w["b_enc"]
    values, at = z.topk(K)
    f = torch.zeros_like(z).scatter_(1, at, values.relu())
    out = f @ w["W_dec"] + w["b_dec"]
    if skip:
        out = out + x.double() @ coder.W_skip.detach().double()
    latents = coder.encode_sparse(x, screen=screen)
    assert torch.equal(latents.to_dense() != 0, f != 0)
    torch.testing.assert_close(coder.reconstruct(latents, x).double(), out, rtol=1e-5, atol=1e-5)
    assert torch.equal(coder(x), coder.reconstruct(latents, x))
    plain = gsf.TopKSAE.from_weights(**parts(D) | {"b_enc": coder.b_enc.detach()}, k=K)
    assert plain.encode_sparse(x) == latents


@pytest.mark.parametrize("skip", [False, True])
def test_it_is_saved_loaded_and_pickled(tmp_path, skip):
    coder, x = made(skip), torch.randn(5, D)
    save(coder, tmp_path / "sae.safetensors", screen=True)
    for again in (from_pretrained(tmp_path), type(coder).from_pretrained(tmp_path), pickle.loads(pickle.dumps(coder))):
        assert type(again) is type(coder)
        assert (again.kind, again.k) == ("topk_skip_transcoder" if skip else "topk_transcoder", K)
        assert (again.cfg.site, again.cfg.site_out) == SITES
        assert torch.equal(again(x), coder(x))
    half = from_pretrained(tmp_path, dtype="bfloat16")
    assert half(x).dtype == torch.bfloat16


def test_wrong_skips_and_k():
    with pytest.raises(ValueError, match="W_skip: expected"):
        gsf.TopKSkipTranscoder.from_weights(**parts(), k=K, W_skip=torch.zeros(D, D))
    for k in (0, F + 1):
        with pytest.raises(ValueError, match=f"k: expected 1 to d_sae = {F}, got {k}"):
            gsf.TopKTranscoder.from_weights(**parts(), k=k)


@pytest.mark.parametrize("skip", [False, True])
def test_it_is_attached(skip):
    model, coder = make_model(), made(skip, D)
    ids, seen = torch.randint(4, 60, (2, 9)), {}
    norm = model.model.layers[1].pre_feedforward_layernorm
    hook = norm.register_forward_hook(lambda m, a, out: seen.setdefault("x", out.detach()))
    model(ids)
    hook.remove()
    with gsf.attach(model, coder, tokens="all") as run:
        model(ids)
    assert run.latents[1].reshape(-1, F) == coder.encode_sparse(seen["x"].reshape(-1, D))
    with gsf.attach(model, coder, mode="splice", tokens="all"):
        spliced = model(ids).logits
    layer = model.model.layers[1].post_feedforward_layernorm
    hook = layer.register_forward_hook(lambda m, a, out: coder(seen["x"]))
    assert torch.equal(spliced, model(ids).logits)
    hook.remove()
