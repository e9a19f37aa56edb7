"""Every family of Gemma Scope at its real width, written here: sizes, sites, model, and that the model has such a site.

The features are few: only d_in is the released files'.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained

F = 5


def weights(d_in, d_out=None, f=F, seed=0):
    g = np.random.default_rng(seed)
    d_out = d_out or d_in
    shapes = {"W_enc": (d_in, f), "W_dec": (f, d_out), "b_enc": f, "b_dec": d_out, "threshold": f}
    return {name: g.standard_normal(shape, dtype="f4") for name, shape in shapes.items()}


def same(sae, w):
    for name, array in w.items():
        assert torch.equal(getattr(sae, name).detach(), torch.from_numpy(array)), name


def skeleton(kind, hidden, heads, head_dim):
    """One layer of a model of this shape, without weights."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config" if kind == "Gemma2" else f"{kind}TextConfig")(
        vocab_size=16, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=1, head_dim=head_dim, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(config)


# facts of the models: hidden size, attention heads, size of a head
GEMMA_2 = {"2b": (2304, 8, 256), "9b": (3584, 16, 256), "27b": (4608, 32, 128)}
GEMMA_3 = {
    "270m": (640, 4, 256), "1b": (1152, 4, 256), "4b": (2560, 8, 256), "12b": (3840, 16, 256), "27b": (5376, 32, 128)
}  # fmt: skip


@pytest.mark.parametrize(
    ("repository", "d_in", "site", "site_out"),
    [
        ("2b-pt-res", 2304, "resid", None),
        ("9b-pt-res", 3584, "resid", None),
        ("27b-pt-res", 4608, "resid", None),
        ("9b-it-res", 3584, "resid", None),
        ("2b-pt-mlp", 2304, "mlp", None),
        ("9b-pt-mlp", 3584, "mlp", None),
        ("2b-pt-att", 2048, "attn", None),
        ("9b-pt-att", 4096, "attn", None),
        ("2b-pt-transcoders", 2304, "mlp_in_no_gain", "mlp"),
    ],
)
@pytest.mark.parametrize("width", ["16k", "1m"])
def test_gemma_scope(tmp_path, repository, d_in, site, site_out, width):
    folder = tmp_path / f"gemma-scope-{repository}" / "layer_0" / f"width_{width}" / "average_l0_71"
    folder.mkdir(parents=True)
    w = weights(d_in)
    np.savez(folder / "params.npz", **w)
    sae = from_pretrained(folder)
    same(sae, w)
    assert sae.d_in == d_in
    assert sae.cfg.site == gsf.Site(site, 0)
    assert sae.cfg.site_out == (None if site_out is None else gsf.Site(site_out, 0))
    size, tuned, _ = repository.split("-")
    assert sae.cfg.metadata.model_name == f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")
    gsf.attach(skeleton("Gemma2", *GEMMA_2[size]), sae, tokens="all")  # the site is there, and as wide as the SAE
    other = skeleton("Gemma2", *GEMMA_2["9b" if size != "9b" else "2b"])
    with pytest.raises(gsf.AttachError, match="dimensions"):
        gsf.attach(other, sae, tokens="all")


@pytest.mark.parametrize("d_in", [2304, 3584])
def test_embedding_saes(tmp_path, d_in):
    size = "2b" if d_in == 2304 else "9b"
    folder = tmp_path / f"gemma-scope-{size}-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights(d_in))
    sae = from_pretrained(folder)
    assert sae.cfg.site == gsf.Site("embed")
    gsf.attach(skeleton("Gemma2", *GEMMA_2[size]), sae, tokens="all")


HOOKS = {
    "resid_post": ("model.layers.0.output",) * 2,
    "mlp_out": ("model.layers.0.post_feedforward_layernorm.output",) * 2,
    "attn_out": ("model.layers.0.self_attn.o_proj.input",) * 2,
    "transcoder": (
        "model.layers.0.pre_feedforward_layernorm.output",
        "model.layers.0.post_feedforward_layernorm.output",
    ),
}
SITES = {"resid_post": "resid", "mlp_out": "mlp", "attn_out": "attn", "transcoder": "mlp_in"}


@pytest.mark.parametrize("size", GEMMA_3)
@pytest.mark.parametrize(("family", "affine"), [*((family, False) for family in HOOKS), ("transcoder", True)])
def test_gemma_scope_2(tmp_path, size, family, affine):
    hidden, heads, head_dim = GEMMA_3[size]
    d_in = heads * head_dim if family == "attn_out" else hidden
    name = f"layer_0_width_16k_l0_small{'_affine' if affine else ''}"
    folder = tmp_path / f"gemma-scope-2-{size}-it" / f"{family}_all" / name
    folder.mkdir(parents=True)
    w = weights(d_in)
    stored = {n.replace("W", "w"): a for n, a in w.items()}
    if affine:
        stored["affine_skip_connection"] = np.random.default_rng(1).standard_normal((d_in, d_in), dtype="f4")
    save_file(stored, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "type": "transcoder" if family == "transcoder" else "sae", "width": F}
    config |= {"affine_connection": affine, "model_name": f"gemma-v3-{size}-it", "l0": 10}
    config["hf_hook_point_in"], config["hf_hook_point_out"] = HOOKS[family]
    (folder / "config.json").write_text(json.dumps(config))
    sae = from_pretrained(folder)
    same(sae, w)
    assert sae.cfg.site == gsf.Site(SITES[family], 0)
    assert sae.cfg.metadata.model_name == f"google/gemma-3-{size}-it"
    assert sae.kind == {"transcoder": "skip_transcoder" if affine else "transcoder"}.get(family, "sae")
    if affine:
        # x @ A, as stored; transposed it is another matrix
        assert torch.equal(sae.W_skip.detach(), torch.from_numpy(stored["affine_skip_connection"]))
    if family == "transcoder":
        assert sae.cfg.site_out == gsf.Site("mlp", 0)
    gsf.attach(skeleton("Gemma3", hidden, heads, head_dim), sae, tokens="all")


@pytest.mark.parametrize(("size", "n"), [("270m", 18), ("1b", 26)])
def test_cross_layer_transcoders_keep_the_decoder_of_every_output(tmp_path, size, n):
    d, f = GEMMA_3[size][0], 2
    folder = tmp_path / f"gemma-scope-2-{size}-pt" / "clt" / "width_262k_l0_medium"
    folder.mkdir(parents=True)
    g = np.random.default_rng(2)
    decoders = [g.standard_normal((f, n, d), dtype="f4") for _ in range(n)]
    each = [weights(d, f=f, seed=i) for i in range(n)]
    for i, w in enumerate(each):
        stored = {name.replace("W", "w"): array for name, array in w.items()} | {"w_dec": decoders[i]}
        save_file(stored, folder / f"params_layer_{i}.safetensors")
    clt = from_pretrained(folder)
    x = torch.from_numpy(g.standard_normal((n, 3, d), dtype="f4"))
    latents = torch.zeros(n, 3, f, dtype=torch.float64)
    want = torch.zeros(n, 3, d, dtype=torch.float64)
    for i, w in enumerate(each):
        t = {name: torch.from_numpy(array).double() for name, array in w.items()}
        z = x[i].double() @ t["W_enc"] + t["b_enc"]
        latents[i] = torch.where((z > t["threshold"]) & (z > 0), z, 0.0)
        for out in range(i, n):
            want[out] += latents[i] @ torch.from_numpy(decoders[i][:, out]).double()
        want[i] += t["b_dec"]
    assert bool((latents > 0).any(-1).any(-1).float().mean() > 0.9)
    got = clt(x)
    # each output is a float32 sum of at most n · f products and n biases
    bound = 2.0**-23 * (n * f + n + d) * want.abs().amax()
    assert (got.double() - want).abs().max() <= bound
    assert clt.cfg.sites == tuple(gsf.Site("mlp_in", i) for i in range(n))
    assert clt.cfg.sites_out == tuple(gsf.Site("mlp", i) for i in range(n))


def test_crosscoders_read_the_layers_that_their_folder_names(tmp_path):
    d, layers = 1152, (7, 13, 17, 22)
    folder = tmp_path / "gemma-scope-2-1b-pt" / "crosscoder" / "layer_7_13_17_22_width_65k_l0_medium"
    folder.mkdir(parents=True)
    shared = weights(d)
    each = [weights(d, seed=i) | {n: shared[n] for n in ("b_enc", "threshold")} for i in range(4)]
    for i, w in enumerate(each):
        save_file({n.replace("W", "w"): a for n, a in w.items()}, folder / f"params_layer_{i}.safetensors")
    coder = from_pretrained(folder)
    assert coder.sites == tuple(gsf.Site("resid", layer) for layer in layers)
    for i, w in enumerate(each):
        assert torch.equal(coder.W_enc.detach()[i * d : (i + 1) * d], torch.from_numpy(w["W_enc"]))
        assert torch.equal(coder.W_dec.detach()[:, i * d : (i + 1) * d], torch.from_numpy(w["W_dec"]))
