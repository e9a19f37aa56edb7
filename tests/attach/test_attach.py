"""attach: sites, modes and gradients, against hooks written by hand."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf

FAMILIES = {"gemma2": tiny.gemma2, "gemma3": tiny.gemma3, "gemma3_sdpa": lambda: tiny.gemma3("sdpa")}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma3()


# ---- sites --------------------------------------------------------------------------------------------


def test_each_site_is_where_gemma_scope_reads(model):
    block = tiny.layer(model)
    saes = {
        (1, "resid"): tiny.sae(),
        (1, "mlp"): tiny.sae(seed=2),
        (1, "attn"): tiny.sae(48, seed=3),
        (1, "mlp_in"): tiny.sae(seed=4),
        (1, "attn_out"): tiny.sae(seed=6),
        "model.layers.2.mlp.output": tiny.sae(seed=7),
        "model.layers.2.mlp.gate_proj.input": tiny.sae(seed=8),
        "model.layers.2.mlp.up_proj": tiny.sae(48, seed=9),
    }
    hands = {
        (1, "resid"): (block, "output"),
        (1, "mlp"): (block.post_feedforward_layernorm, "output"),
        (1, "attn"): (block.self_attn.o_proj, "input"),
        (1, "mlp_in"): (block.pre_feedforward_layernorm, "output"),
        (1, "attn_out"): (block.post_attention_layernorm, "output"),
        "model.layers.2.mlp.output": (tiny.layer(model, 2).mlp, "output"),
        "model.layers.2.mlp.gate_proj.input": (tiny.layer(model, 2).mlp.gate_proj, "input"),
        "model.layers.2.mlp.up_proj": (tiny.layer(model, 2).mlp.up_proj, "output"),
    }
    by_hand = {key: tiny.Hand(*at) for key, at in hands.items()}
    with torch.no_grad(), gsf.attach(model, saes, tokens="all") as run:
        model(tiny.ids())
    for hand in by_hand.values():
        hand.handle.remove()
    assert list(run.latents) == list(saes)
    for key, sae in saes.items():
        expected = sae.encode_sparse(by_hand[key].rows())
        assert run.latents[key] == expected, key
        assert expected.nnz > 50


def test_embedding_is_read_unscaled_and_spliced_scaled(model):
    sae = tiny.sae(site=gsf.Site("embed"))
    table = model.get_input_embeddings().weight
    with torch.no_grad(), tiny.Hand(model.get_input_embeddings()) as plain:
        model(tiny.ids())
    with (
        torch.no_grad(),
        gsf.attach(model, sae, mode="splice", tokens="all") as run,
        tiny.Hand(tiny.layer(model, 0)) as _,
    ):
        logits = model(tiny.ids()).logits
    assert run.latents["model.embed_tokens.output"] == sae.encode_sparse(table[tiny.ids()].detach()).reshape(18)
    scale = plain.rows()[0, 0] / table[tiny.ids()[0, 0], 0]
    x_hat = sae(table[tiny.ids()].detach()) * scale
    with torch.no_grad(), tiny.Hand(model.get_input_embeddings(), change=lambda _x: x_hat):
        torch.testing.assert_close(logits, model(tiny.ids()).logits)


def test_transcoder_reads_one_site_and_replaces_another(model):
    sites = {"site": gsf.Site("mlp_in", 1), "site_out": gsf.Site("mlp", 1)}
    block = tiny.layer(model)
    for coder in (
        tiny.sae(kind=gsf.JumpReLUTranscoder, **sites),
        tiny.sae(kind=gsf.JumpReLUSkipTranscoder, W_skip=0.1 * torch.randn(32, 32), **sites),
    ):
        with torch.no_grad():
            base = model(tiny.ids()).logits
            with tiny.Hand(block.pre_feedforward_layernorm) as x:
                model(tiny.ids())
            with gsf.attach(model, coder, mode="splice", tokens="all") as run:
                spliced = model(tiny.ids()).logits
            recon = coder(x.seen[0])
            with tiny.Hand(block.post_feedforward_layernorm, change=lambda _y, r=recon: r):
                expected = model(tiny.ids()).logits
            with gsf.attach(model, {1: coder}, mode="splice+error", tokens="all"):
                kept = model(tiny.ids()).logits
        assert torch.equal(spliced, expected)
        assert not torch.equal(spliced, base)
        assert torch.equal(kept, base)
        assert run.latents[coder.cfg.site] == coder.encode_sparse(x.rows())


def test_gemma_scope_1_transcoders_read_the_norm_without_its_gain(model):
    site = gsf.Site("mlp_in_no_gain", 2)
    sae = tiny.sae(site=site)
    norm = tiny.layer(model, 2).pre_feedforward_layernorm
    with torch.no_grad(), tiny.Hand(norm, "input") as hand, gsf.attach(model, sae, tokens="all") as run:
        model(tiny.ids())
    x = hand.rows().float()
    assert run.latents[site] == sae.encode_sparse(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps))
    with pytest.raises(gsf.AttachError, match="not replaced"):
        gsf.attach(model, sae, mode="splice", tokens="all")


def test_a_site_has_several_names(gemma):
    with torch.no_grad(), gsf.attach(gemma, tiny.sae(site=tiny.resid(1)), tokens="all") as run:
        gemma(tiny.ids())
    first = run.latents[1]
    for name in ((1, "resid"), "model.layers.1.output", tiny.resid(1)):
        assert run.latents[name] is first
    assert len(run.latents) == 1
    assert 2 not in run.latents


# ---- modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["observe", "splice+error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watching_changes_no_bit(model, mode, dtype):
    model = model.to(dtype)
    try:
        with torch.no_grad():
            base = model(tiny.ids()).logits
            with gsf.attach(model, {1: tiny.sae(), 3: tiny.sae(seed=2)}, mode=mode, tokens="all"):
                assert torch.equal(model(tiny.ids()).logits, base)
            assert torch.equal(model(tiny.ids()).logits, base)
    finally:
        model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splice_is_the_reconstruction_in_the_activations_dtype(model, dtype):
    model, sae = model.to(dtype), tiny.sae()
    try:
        with torch.no_grad():
            with gsf.attach(model, {1: sae}, mode="splice", tokens="all"):
                spliced = model(tiny.ids()).logits
            with tiny.Hand(tiny.layer(model), change=lambda x: sae(x).to(x.dtype)):
                assert torch.equal(spliced, model(tiny.ids()).logits)
    finally:
        model.float()


def test_observers_see_before_edits_here_and_after_edits_earlier(gemma):
    seen, spliced = tiny.sae(), tiny.sae(seed=2)
    with torch.no_grad():
        with (
            gsf.attach(gemma, {1: spliced}, mode="splice", tokens="all"),
            gsf.attach(gemma, {1: seen, 2: seen}, tokens="all") as run,
        ):
            gemma(tiny.ids())
        with tiny.Hand(tiny.layer(gemma), change=spliced) as here, tiny.Hand(tiny.layer(gemma, 2)) as later:
            gemma(tiny.ids())
    assert run.latents[1] == seen.encode_sparse(here.rows())
    assert run.latents[2] == seen.encode_sparse(later.rows())


# ---- gradients ----------------------------------------------------------------------------------------


def dense(sae, x, error_grad=False):
    """Eager reference of splice+error: x̂ plus an error that is a constant, or not."""
    z = x @ sae.W_enc + sae.b_enc
    f = torch.relu(z) * (z > sae.threshold)
    x_hat = f @ sae.W_dec + sae.b_dec
    error = x - x_hat
    return x_hat + (error if error_grad else error.detach())


@pytest.mark.parametrize("error_grad", [False, True])
def test_gradient_holds_the_error_constant(gemma, error_grad):
    sae = tiny.sae()
    weights = (tiny.layer(gemma, 0).mlp.up_proj.weight, sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)

    def gradients():
        loss = gemma(tiny.ids()).logits.logsumexp(-1).square().sum()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    with gsf.attach(gemma, {1: sae}, mode="splice+error", error_grad=error_grad, tokens="all"):
        ours = gradients()
    with tiny.Hand(tiny.layer(gemma), change=lambda x: dense(sae, x, error_grad)):
        theirs = gradients()
    for got, want in zip(ours, theirs, strict=True):
        if got is None:  # the reference's terms cancel up to rounding
            assert want.abs().max() < 1e-3
        else:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_gradient_of_rows_left_out_is_the_identity(gemma):
    sae, chosen = tiny.sae(), torch.arange(9) % 2 == 0
    weight = tiny.layer(gemma, 0).mlp.up_proj.weight

    def gradient():
        return torch.autograd.grad(gemma(tiny.ids()).logits.logsumexp(-1).sum(), weight)[0]

    with gsf.attach(gemma, {1: sae}, mode="splice+error", tokens=chosen):
        ours = gradient()
    with tiny.Hand(tiny.layer(gemma), change=lambda x: torch.where(chosen[:, None], dense(sae, x), x)):
        want = gradient()
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
