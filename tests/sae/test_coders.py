"""Coders of several sites, and formulas with common mistakes: each is distinguished from the wrong version."""

import json

import numpy as np
import pytest
import torch
from attach_models import gemma2, gemma3, ids
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.sae.embedding import scaled_embedding_sae
from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder

L, D, F = 3, 32, 24


def layer_weights(seed, d_in=D, d_sae=F, outputs=None, d_out=D):
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype("f4")

    decoder = draw(d_sae, d_out) if outputs is None else draw(d_sae, outputs, d_out)
    return {
        "w_enc": draw(d_in, d_sae, scale=d_in**-0.5),
        "w_dec": decoder,
        "b_enc": draw(d_sae, scale=0.1),
        "b_dec": draw(d_out),
        "threshold": np.abs(draw(d_sae, scale=0.3)),
    }


def features(x, w):
    z = x.double() @ torch.from_numpy(w["w_enc"]).double() + torch.from_numpy(w["b_enc"])
    return torch.where(z > torch.from_numpy(w["threshold"]), z.clamp(min=0), 0.0)


def t(array):
    return torch.from_numpy(array).double()


# ---- cross-layer transcoders ------------------------------------------------------------------------------------


def write_clt(folder, affine):
    folder.mkdir(parents=True)
    layers = [layer_weights(i, outputs=L) for i in range(L)]
    for i, w in enumerate(layers):
        if affine:
            rng = np.random.default_rng(20 + i)
            w["affine_skip_connection"] = rng.standard_normal((D, D)).astype("f4")
        save_file(w, folder / f"params_layer_{i}.safetensors")
    config = {"type": "clt", "architecture": "jump_relu", "affine_connection": affine, "width": L * F}
    (folder / "config.json").write_text(json.dumps(config | {"model_name": "gemma-v3-270m-pt"}))
    return layers


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_layer_transcoder_uses_the_whole_decoder(tmp_path, affine, dtype):
    layers = write_clt(tmp_path / "clt" / "width_262k_l0_big", affine)
    clt = from_pretrained(tmp_path, "clt/width_262k_l0_big", dtype=dtype)
    assert isinstance(clt, CrossLayerTranscoder)
    assert clt.cfg.sites == tuple(gsf.Site("mlp_in", i) for i in range(L))
    assert clt.cfg.sites_out == tuple(gsf.Site("mlp", i) for i in range(L))
    assert clt.cfg.metadata.model_name == "google/gemma-3-270m"
    held = [{n: t(a).to(dtype).double().numpy() for n, a in w.items()} for w in layers]
    x = torch.randn(L, 2, 5, D)
    f = [features(x[i], held[i]) for i in range(L)]
    want = torch.stack(
        [
            sum(f[i] @ t(held[i]["w_dec"])[:, layer] for i in range(layer + 1))
            + t(held[layer]["b_dec"])
            + (x[layer].double() @ t(held[layer]["affine_skip_connection"]) if affine else 0)
            for layer in range(L)
        ]
    )
    tolerance = {"rtol": 2e-2, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(clt(x).double(), want, **tolerance)
    # summing the decoder over its outputs, as a single-layer reading does, is another thing
    summed = torch.stack([f[i] @ t(held[i]["w_dec"]).sum(1) + t(held[i]["b_dec"]) for i in range(L)])
    assert (summed - want).abs().max() > 10 * tolerance["atol"]
    sparse = clt.encode_sparse(x)
    assert torch.equal(clt.decode([s.to_dense() for s in sparse]), clt.decode(sparse))
    assert clt.encode(x).shape == (L, 2, 5, F)


def test_from_weights_takes_both_shapes_of_decoder():
    layers = [layer_weights(i, outputs=L) for i in range(L)]

    def of(name, cut=lambda a, i: a):
        return [torch.from_numpy(cut(w[name], i)) for i, w in enumerate(layers)]

    vectors = {"W_enc": of("w_enc"), "b_enc": of("b_enc"), "b_dec": of("b_dec"), "threshold": of("threshold")}
    whole = CrossLayerTranscoder.from_weights(W_dec=of("w_dec"), **vectors)
    cut = CrossLayerTranscoder.from_weights(W_dec=of("w_dec", lambda a, i: a[:, i:].copy()), **vectors)
    x = torch.randn(L, 4, D)
    assert torch.equal(whole(x), cut(x))
    with pytest.raises(ValueError, match=r"W_dec\[2\]"):
        CrossLayerTranscoder.from_weights(W_dec=of("w_dec", lambda a, i: a[:, : L - i + 1]), **vectors)
    with pytest.raises(ValueError, match="3 layers"):
        whole(x[:2])


@pytest.mark.parametrize("damage", ["missing layer", "missing array", "width", "type", "shape", "affine"])
def test_damaged_cross_layer_transcoders(tmp_path, damage):
    folder = tmp_path / "clt" / "width_262k_l0_big"
    layers = write_clt(folder, False)
    config = json.loads((folder / "config.json").read_text())
    if damage == "missing layer":
        (folder / "params_layer_1.safetensors").unlink()
    elif damage == "missing array":
        del layers[2]["b_dec"]
        save_file(layers[2], folder / "params_layer_2.safetensors")
    elif damage == "shape":
        save_file(layer_weights(2, outputs=L + 1), folder / "params_layer_2.safetensors")
    else:
        change = {"width": {"width": 7}, "type": {"type": "crosscoder"}, "affine": {"affine_connection": True}}[damage]
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(gsf.CheckpointError):
        from_pretrained(folder)


# ---- crosscoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_crosscoder_sums_its_sites_into_one_set_of_latents(tmp_path, dtype):
    folder = tmp_path / "crosscoder" / "layer_7_13_17_width_65k_l0_big"
    folder.mkdir(parents=True)
    layers = [layer_weights(i) for i in range(L)]
    for i, w in enumerate(layers):
        shared = {name: layers[0][name] for name in ("b_enc", "threshold")}
        save_file(w | shared, folder / f"params_layer_{i}.safetensors")
    coder = from_pretrained(folder, dtype=dtype)
    assert isinstance(coder, Crosscoder)
    assert coder.sites == (gsf.Site("resid", 7), gsf.Site("resid", 13), gsf.Site("resid", 17))
    held = [{n: t(a).to(getattr(torch, dtype)).double() for n, a in w.items()} for w in layers]
    x = torch.randn(2, 4, L, D)
    z = sum(x[..., i, :].double() @ held[i]["w_enc"] for i in range(L)) + held[0]["b_enc"]
    f = torch.where(z > held[0]["threshold"], z.clamp(min=0), 0.0)
    want = torch.stack([f @ w["w_dec"] + w["b_dec"] for w in held], -2)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(coder(x).double(), want, **tolerance)
    torch.testing.assert_close(coder.encode(x).double(), f, **tolerance)
    save_file(layers[1], folder / "params_layer_1.safetensors")  # thresholds of its own: another kind of thing
    with pytest.raises(gsf.CheckpointError, match="b_enc"):
        from_pretrained(folder)


def test_crosscoder_whose_latents_belong_to_layers(tmp_path):
    folder = tmp_path / "crosscoder" / "layer_7_13_17_width_65k_l0_big"
    write_clt(folder, False)
    (folder / "config.json").unlink()
    coder = from_pretrained(folder)
    assert coder.kind == "crosscoder"
    assert coder.cfg.sites[1] == gsf.Site("resid", 13)
    assert coder(torch.randn(L, 5, D)).shape == (L, 5, D)


# ---- right by construction: from the checkpoint to the model ----------------------------------------------------


def caught(model, path, end="output"):
    """What a hook written by hand sees at one module."""
    seen = []

    def hook(_module, args, output=None):
        seen.append((args[0] if end == "input" else output).detach())

    module = model.get_submodule(path)
    module.register_forward_pre_hook(hook) if end == "input" else module.register_forward_hook(hook)
    return seen


def gained(model):
    """Norms whose gain is far from one, so that leaving it out shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p.copy_(torch.linspace(-0.5, 1.0, p.numel()))
    return model


def test_gemma_scope_1_transcoder_reads_without_gain_in_the_model(tmp_path):
    w = layer_weights(0)
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n.replace("w_", "W_"): a for n, a in w.items()})
    model = gained(gemma2())
    normed = caught(model, "model.layers.1.pre_feedforward_layernorm")
    raw = caught(model, "model.layers.1.pre_feedforward_layernorm", "input")
    with gsf.attach(model, from_pretrained(folder), tokens="all") as run:
        model(ids())
    (latents,) = run.latents.values()
    x = raw[0].double()
    bare = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
    got = latents.to_dense().double()
    torch.testing.assert_close(got, features(bare, w).reshape(got.shape), rtol=1e-4, atol=1e-4)
    assert (got - features(normed[0], w).reshape(got.shape)).abs().max() > 0.1


def test_gemma_scope_2_skip_transcoder_reads_with_gain_and_multiplies_from_the_left(tmp_path):
    w = layer_weights(1)
    A = np.random.default_rng(5).standard_normal((D, D)).astype("f4")
    folder = tmp_path / "transcoder_all" / "layer_1_width_16k_l0_big_affine"
    folder.mkdir(parents=True)
    save_file(w | {"affine_skip_connection": A}, folder / "params.safetensors")
    model = gained(gemma3())
    normed = caught(model, "model.layers.1.pre_feedforward_layernorm")
    raw = caught(model, "model.layers.1.pre_feedforward_layernorm", "input")
    with gsf.attach(model, from_pretrained(folder), mode="splice", tokens="all") as run:
        written = caught(model, "model.layers.1.post_feedforward_layernorm")
        model(ids())
    (latents,) = run.latents.values()
    got = latents.to_dense().double()
    torch.testing.assert_close(got, features(normed[0], w).reshape(got.shape), rtol=1e-4, atol=1e-4)
    x = raw[0].double()
    bare = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps)
    assert (got - features(bare, w).reshape(got.shape)).abs().max() > 0.1
    decoded = features(normed[0], w) @ t(w["w_dec"]) + t(w["b_dec"])
    spliced, x = written[0].double(), normed[0].double()
    torch.testing.assert_close(spliced, decoded + x @ t(A), rtol=1e-4, atol=1e-3)
    assert (spliced - decoded - x @ t(A).T).abs().max() > 0.1


def test_attention_and_mlp_saes_read_where_gemma_scope_says(tmp_path):
    model = gained(gemma2())
    d_heads = model.model.layers[2].self_attn.o_proj.in_features
    for family, d, path, end in (
        ("att", d_heads, "model.layers.2.self_attn.o_proj", "input"),
        ("mlp", D, "model.layers.2.post_feedforward_layernorm", "output"),
    ):
        w = layer_weights(2, d_in=d, d_out=d)
        folder = tmp_path / f"gemma-scope-2b-pt-{family}" / "layer_2" / "width_16k" / "average_l0_9"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{n.replace("w_", "W_"): a for n, a in w.items()})
        seen = caught(model, path, end)
        with gsf.attach(model, from_pretrained(folder), tokens="all") as run:
            model(ids())
        got = next(iter(run.latents.values())).to_dense().double()
        torch.testing.assert_close(got, features(seen[0], w).reshape(got.shape), rtol=1e-4, atol=1e-4)


def test_embedding_sae_scales_encoder_decoder_and_bias(tmp_path):
    w = layer_weights(3)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n.replace("w_", "W_"): a for n, a in w.items()})
    sae = from_pretrained(folder)
    assert sae.cfg.site == gsf.Site("embed")
    plain, scale = torch.randn(7, D), D**0.5
    f = features(plain, w)
    want = (f @ t(w["w_dec"]) + t(w["b_dec"])) * scale
    scaled = scaled_embedding_sae(sae)
    torch.testing.assert_close(scaled(plain * scale).double(), want, rtol=1e-4, atol=1e-4)
    left = f @ t(w["w_dec"]) * scale + t(w["b_dec"])  # b_dec forgotten
    assert (left - want).abs().max() > 1
    # in a model whose embedding scales its output, the reconstruction that is written is scaled as a whole
    model = gemma2()
    tokens = ids()
    with gsf.attach(model, sae, mode="splice", tokens="all"):
        embedded = caught(model, "model.layers.0", "input")
        model(tokens)
    rows = model.get_input_embeddings().weight[tokens].detach()
    want = (features(rows, w) @ t(w["w_dec"]) + t(w["b_dec"])) * scale
    torch.testing.assert_close(embedded[0].double(), want, rtol=1e-4, atol=1e-3)
