"""Public SAEs of ReLU and JumpReLU: Llama Scope, Goodfire, qresearch, OpenAI, dictionary_learning, gated SAEs and
circuit-tracer's transcoders."""

import math
from pathlib import PurePosixPath

import pytest
import torch
from checkpoint_files import write_saelens
from public_files import (
    D,
    F,
    circuit_tracer,
    dictionary_learning,
    goodfire,
    llama_scope,
    llama_scope_r1,
    openai,
    tokens,
    weights,
)

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import names
from gemmascope_fast.checkpoints.loading import find_checkpoint, from_pretrained, open_checkpoint
from gemmascope_fast.checkpoints.repository import _patterns
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.cli.ls import listing

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NORM, THRESHOLD = 6.3125, 0.25
S = math.sqrt(D) / NORM


def in_double(w):
    return {name: tensor.double() for name, tensor in w.items()}


def relu(x, w, centre=False):
    """(latents, reconstruction) in fp64."""
    w = in_double(w)
    x = x.double() - w["b_dec"] if centre else x.double()
    f = (x @ w["W_enc"] + w["b_enc"]).relu()
    return f, f @ w["W_dec"] + w["b_dec"]


def assert_computes(sae, x, latents, out):
    got = sae.encode(x)
    assert torch.equal(got != 0, latents != 0)
    assert 0 < int((latents != 0).sum()) < latents.numel()
    torch.testing.assert_close(got.double(), latents, **CLOSE)
    torch.testing.assert_close(sae(x).double(), out, **CLOSE)


# ---- Llama Scope ------------------------------------------------------------------------------------


def in_their_library(x, w, s, s_out, theta, by_norm):
    """(what fires, reconstruction) in fp64 as OpenMOSS's library has it once `standardize_parameters_of_dataset_norm`
    has scaled its parameters: raw activations go in, and the threshold is compared with what they give."""
    w = in_double(w)
    W_dec = w["W_dec"] * s / s_out
    hidden = x.double() @ w["W_enc"] + w["b_enc"] / s
    score = hidden * W_dec.norm(dim=1) if by_norm else hidden
    f = hidden * (score > theta)
    return f, f @ W_dec + w["b_dec"] / s_out


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("transcodes", [False, True])
def test_llama_scope_folds_the_scale_of_the_activations(tmp_path, by_norm, transcodes):
    w, x = weights(), tokens()
    config = {"sparsity_include_decoder_norm": by_norm}
    out_norm = NORM
    if transcodes:
        out_norm = 3.390625
        config["dataset_average_activation_norm"] = {"in": NORM, "out": out_norm}
        config |= {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    sae = from_pretrained(llama_scope(tmp_path, w, config=config))
    assert type(sae) is (gsf.JumpReLUTranscoder if transcodes else gsf.JumpReLUSAE)
    s_out = math.sqrt(D) / out_norm
    f, out = in_their_library(x, w, S, s_out, THRESHOLD, by_norm)
    assert_computes(sae, x, f * S, out)  # latents are those of the scaled activations, as SAELens has them
    assert sae.encode_sparse(x).l0().tolist() == (f != 0).sum(1).tolist()
    assert sae.cfg.metadata.model_name == "meta-llama/Llama-3.1-8B"
    site = gsf.Site("mlp_in_no_gain", 8) if transcodes else gsf.Site("resid", 8)
    assert (sae.cfg.site, sae.cfg.site_out) == (site, gsf.Site("mlp", 8) if transcodes else None)


def test_llama_scope_is_what_saelens_makes_of_it(tmp_path):
    """SAELens: threshold · s, then `fold_activation_norm_scaling_factor`: W_enc · s, W_dec / s, b_dec / s."""
    w = weights()
    sae = from_pretrained(llama_scope(tmp_path, w))
    torch.testing.assert_close(sae.W_enc, w["W_enc"] * S)
    torch.testing.assert_close(sae.W_dec, w["W_dec"] / S)
    torch.testing.assert_close(sae.b_dec, w["b_dec"] / S)
    assert torch.equal(sae.b_enc, w["b_enc"])
    torch.testing.assert_close(sae.threshold, torch.full((F,), THRESHOLD * S))


@pytest.mark.parametrize(
    ("config", "drop", "said"),
    [
        ({}, ["dataset_average_activation_norm"], "dataset_average_activation_norm: missing, and with it the scale"),
        (
            {"dataset_average_activation_norm": {"in": 3.0}},
            [],
            "dataset_average_activation_norm: out: expected a number",
        ),
        ({"dataset_average_activation_norm": {"in": 0, "out": 1}}, [], "expected norms above 0"),
        ({"dataset_average_activation_norm": 3.0}, [], "expected an object"),
        ({"dataset_average_activation_norm": {"in": True, "out": 1}}, [], "in: expected a number, got True"),
        ({}, ["jump_relu_threshold"], "jump_relu_threshold: expected a number, got None"),
        ({"jump_relu_threshold": "0.2"}, [], "jump_relu_threshold: expected a number"),
        ({"jump_relu_threshold": float("nan")}, [], "jump_relu_threshold: expected a number"),
        ({"act_fn": "topk"}, [], "act_fn: expected one of jumprelu, got 'topk'"),
        ({"norm_activation": "token-wise"}, [], "norm_activation: expected one of dataset-wise, inference"),
        ({"use_glu_encoder": True}, [], "use_glu_encoder"),
        ({"d_sae": F + 1}, [], "d_sae: 41 contradicts"),
        ({}, ["d_model"], "d_model: expected an integer"),
        ({"sparsity_include_decoder_norm": 1}, [], "sparsity_include_decoder_norm: expected true or false"),
    ],
)
def test_llama_scope_configs_that_are_refused(tmp_path, config, drop, said):
    with pytest.raises(gsf.CheckpointError, match=said) as error:
        from_pretrained(llama_scope(tmp_path, weights(), config=config, drop=drop))
    assert "hyperparams.json" in str(error.value)


def test_llama_scope_is_found_listed_and_written(tmp_path):
    w, x = weights(), tokens()
    folder = llama_scope(tmp_path / "Llama3_1-8B-Base-LXR-8x", w, dtype=torch.bfloat16)
    rows = listing(str(folder.parent))
    assert [(r["sae_id"], r["format"], r["kind"], r["site"], r["dtype"]) for r in rows] == [
        ("Llama3_1-8B-Base-L8R-8x", "llama-scope", "sae", "model.layers.8.output", "bfloat16")
    ]
    sae = from_pretrained(folder.parent, rows[0]["sae_id"])
    assert sae.cfg.metadata.neuronpedia_id == "llama3.1-8b/8-llamascope-res-32k"
    written = convert(folder, tmp_path / "again", "llama-scope", dtype="float32")
    assert written == ["checkpoints/final.safetensors", "hyperparams.json"]
    again = from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(x), sae(x))
    assert torch.equal(again.encode(x) != 0, sae.encode(x) != 0)
    assert again.cfg.site == sae.cfg.site
    (folder / "hyperparams.json").unlink()
    with pytest.raises(gsf.CheckpointError, match=r"hyperparams.json"):
        from_pretrained(folder)


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("where", ["config", "file"])
def test_llama_scope_r1(tmp_path, where, by_norm):
    w, x = weights(), tokens()
    config = {"sparsity_include_decoder_norm": by_norm}
    config |= {"dataset_average_activation_norm": {"in": NORM, "out": NORM}} if where == "config" else {}
    norms = {"blocks.15.hook_resid_post": NORM} if where == "file" else None
    sae = from_pretrained(llama_scope_r1(tmp_path, w, config, norms))
    v = in_double(w)
    z = S * (x.double() @ v["W_enc"]) + v["b_enc"]
    f = z * ((z * v["W_dec"].norm(dim=1) if by_norm else z) > v["threshold"])
    assert_computes(sae, x, f, (f @ v["W_dec"] + v["b_dec"]) / S)
    assert sae.cfg.site == gsf.Site("resid", 15)


def test_llama_scope_r1_takes_the_scale_that_saelens_knows(tmp_path, monkeypatch):
    w = weights()
    folder = llama_scope_r1(tmp_path, w)
    with pytest.raises(gsf.CheckpointError, match=r"normalize_activations|fold_activation_norm_scaling_factor"):
        from_pretrained(folder)
    entry = names.releases()["llama_scope_r1_distill"]
    sae_id = entry["ids"][0]
    monkeypatch.setattr("gemmascope_fast.checkpoints.repository._download", lambda *_: folder)
    sae = from_pretrained("llama_scope_r1_distill", sae_id)
    scale = entry["scale"][sae_id]
    torch.testing.assert_close(sae.W_enc, w["W_enc"] * scale)
    torch.testing.assert_close(sae.W_dec, w["W_dec"] / scale)
    torch.testing.assert_close(sae.threshold, w["threshold"])
    assert sae.cfg.metadata.neuronpedia_id == entry["neuronpedia"][sae_id]


# ---- Goodfire, qresearch, OpenAI --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "infix", "model", "layer"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", "meta-llama/Llama-3.1-8B-Instruct", 19),
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "_linear", "meta-llama/Llama-3.3-70B-Instruct", 50),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 19),
    ],
)
def test_two_linear_layers(tmp_path, name, infix, model, layer):
    w, x = weights(), tokens()
    path = goodfire(tmp_path, w, name, infix)
    for place in (path, tmp_path):
        sae = from_pretrained(place)
        assert type(sae) is gsf.JumpReLUSAE
        assert sae.cfg.site == gsf.Site("resid", layer)
        assert sae.cfg.metadata.model_name == model
        assert_computes(sae, x, *relu(x, w))
    assert listing(str(tmp_path))[0]["format"] == "goodfire"
    assert convert(path, tmp_path / "out", "goodfire") == [f"{model.rpartition('/')[2]}-SAE-l{layer}.pt"]
    assert torch.equal(from_pretrained(tmp_path / "out").encode(x), sae.encode(x))


def test_goodfire_without_a_name_has_no_site(tmp_path):
    assert from_pretrained(goodfire(tmp_path, weights(), "sae.pt")).cfg.site is None


@pytest.mark.parametrize("tied", [False, True])
def test_openai_relu(tmp_path, tied):
    w, x = weights(), tokens()
    if tied:
        w["W_dec"] = w["W_enc"].t().contiguous()
    path = openai(tmp_path, w, "resid_delta_mlp_v4", 3, tied=tied)
    sae = from_pretrained(path)
    assert sae.cfg.site == gsf.Site("mlp", 3)
    assert sae.cfg.metadata.model_name == "gpt2"
    assert_computes(sae, x, *relu(x, w, centre=True))
    assert [(r["sae_id"], r["format"]) for r in listing(str(tmp_path))] == [
        ("resid_delta_mlp_v4/autoencoders/3.pt", "openai")
    ]
    assert convert(path, tmp_path / "out", "openai") == ["autoencoder.pt"]
    torch.testing.assert_close(from_pretrained(tmp_path / "out").encode(x), sae.encode(x))


def test_openai_top_k_is_refused_by_name(tmp_path):
    with pytest.raises(gsf.CheckpointError, match="activation: OpenAI's TopK SAEs normalise each token"):
        from_pretrained(openai(tmp_path, weights(), activation="TopK"))
    with pytest.raises(gsf.CheckpointError, match="activation: expected ReLU, got 'Identity'"):
        from_pretrained(openai(tmp_path, weights(), activation="Identity"))


@pytest.mark.parametrize("to", ["goodfire", "openai", "qwen-scope"])
def test_thresholds_are_not_written_where_there_is_no_place_for_them(tmp_path, to):
    with pytest.raises(gsf.CheckpointError, match=r"has no thresholds|is for top-k SAEs"):
        convert(llama_scope(tmp_path, weights()), tmp_path / "out", to)


def test_several_thresholds_are_not_written_as_one(tmp_path):
    source = dictionary_learning(tmp_path, weights(), "JumpReluAutoEncoder", threshold=weights()["threshold"])
    with pytest.raises(gsf.CheckpointError, match="one threshold for all features"):
        convert(source, tmp_path / "out", "llama-scope")


# ---- dictionary_learning ----------------------------------------------------------------------------


def gated(x, W_enc, W_dec, b_dec, b_gate, b_mag, r_mag, centre):
    """SAELens's and dictionary_learning's gated SAE in fp64."""
    x, W_enc, W_dec, b_dec = x.double(), W_enc.double(), W_dec.double(), b_dec.double()
    a = (x - b_dec if centre else x) @ W_enc
    f = (a + b_gate.double() > 0) * (r_mag.double().exp() * a + b_mag.double()).relu()
    return f, f @ W_dec + b_dec


def gates(seed=5):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(F, generator=g) for name in ("b_gate", "b_mag", "r_mag")}


@pytest.mark.parametrize("dict_class", ["AutoEncoder", "AutoEncoderNew"])
def test_dictionary_learning_relu(tmp_path, dict_class):
    w, x = weights(), tokens()
    sae = from_pretrained(dictionary_learning(tmp_path, w, dict_class))
    assert_computes(sae, x, *relu(x, w, centre=dict_class == "AutoEncoder"))
    convert(tmp_path, tmp_path / "out", "dictionary-learning")
    torch.testing.assert_close(from_pretrained(tmp_path / "out")(x), sae(x))


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"])
def test_dictionary_learning_thresholds(tmp_path, dict_class):
    w, x = weights(), tokens()
    single = dict_class != "JumpReluAutoEncoder"
    buffers = {"threshold": torch.tensor(0.75) if single else w["threshold"]}
    if single:
        buffers["k"] = torch.tensor(5, dtype=torch.int32)
    if dict_class.startswith("Matryoshka"):
        buffers["group_sizes"] = torch.tensor([10, 30])
    sae = from_pretrained(dictionary_learning(tmp_path, w, dict_class, **buffers))
    v = in_double(w)
    z = (x.double() - v["b_dec"] if single else x.double()) @ v["W_enc"] + v["b_enc"]
    f = z * (z > buffers["threshold"].double())
    assert_computes(sae, x, f, f @ v["W_dec"] + v["b_dec"])
    convert(tmp_path, tmp_path / "out", "dictionary-learning")
    torch.testing.assert_close(from_pretrained(tmp_path / "out")(x), sae(x))


def test_batch_top_k_without_a_threshold_is_refused(tmp_path):
    with pytest.raises(gsf.CheckpointError, match="threshold: expected one number, got none"):
        from_pretrained(dictionary_learning(tmp_path, weights(), "BatchTopKSAE"))


@pytest.mark.parametrize("library", ["dictionary_learning", "saelens", "saelens, centred"])
def test_gated_saes_are_jumprelu(tmp_path, library):
    w, x, held = weights(), tokens(), gates()
    centre = library != "saelens"
    if library == "dictionary_learning":
        buffers = {"gate_bias": held["b_gate"], "mag_bias": held["b_mag"], "r_mag": held["r_mag"]}
        folder = dictionary_learning(tmp_path, w, "GatedAutoEncoder", **buffers)
    else:
        config = {"architecture": "gated", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": centre}
        arrays = {name: w[name].numpy() for name in ("W_enc", "W_dec", "b_dec")}
        folder = write_saelens(tmp_path, config, arrays | {n: v.numpy() for n, v in held.items()})
    sae = from_pretrained(folder)
    assert type(sae) is gsf.JumpReLUSAE
    assert_computes(sae, x, *gated(x, w["W_enc"], w["W_dec"], w["b_dec"], **held, centre=centre))
    convert(folder, tmp_path / "jumprelu", "saelens")
    assert torch.equal(from_pretrained(tmp_path / "jumprelu").encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r_mag": torch.full((F,), 1000.0)}, "r_mag: expected values whose exp is finite"),
        ({"r_mag": torch.ones(F + 1)}, "expected three vectors of one length"),
        ({"b_gate": torch.full((F,), torch.nan)}, "b_gate: expected finite"),
        ({"W_enc": torch.ones(D, F + 1)}, r"W_enc: expected \[d_in, 40\]"),
    ],
)
def test_damaged_gated_saes(tmp_path, change, said):
    w = weights()
    config = {"architecture": "gated", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}
    arrays = {name: w[name] for name in ("W_enc", "W_dec", "b_dec")} | gates() | change
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(write_saelens(tmp_path, config, {n: v.numpy() for n, v in arrays.items()}))


# ---- circuit-tracer ---------------------------------------------------------------------------------

CONFIG = """model_name: "Qwen/Qwen3-4B"
feature_input_hook: "mlp.hook_in"
feature_output_hook: hook_mlp_out
"""


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("with_threshold", [False, True])
def test_circuit_tracers_transcoders(tmp_path, with_skip, with_threshold):
    w, x = weights(), tokens()
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(2)) if with_skip else None
    theta = w["threshold"] if with_threshold else None
    made = from_pretrained(circuit_tracer(tmp_path, w, 2, skip, theta, CONFIG))
    assert type(made) is (gsf.JumpReLUSkipTranscoder if with_skip else gsf.JumpReLUTranscoder)
    assert (made.cfg.site, made.cfg.site_out) == (gsf.Site("mlp_in", 2), gsf.Site("mlp", 2))
    assert made.cfg.metadata.model_name == "Qwen/Qwen3-4B"
    v = in_double(w)
    z = x.double() @ v["W_enc"] + v["b_enc"]
    f = z * (z > (v["threshold"] if with_threshold else 0))
    out = f @ v["W_dec"] + v["b_dec"]
    assert_computes(made, x, f, out if skip is None else out + x.double() @ skip.double().t())
    assert listing(str(tmp_path))[0]["format"] == "circuit-tracer"


def test_circuit_tracers_transcoders_without_a_config_have_no_site(tmp_path):
    path = circuit_tracer(tmp_path, weights())
    assert open_checkpoint(path).site is None
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(gsf.CheckpointError, match=r"config.yaml: not readable as text"):
        open_checkpoint(path)


# ---- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "sae_id", "repo", "path"),
    [
        ("qwen-scope-3-8b-base-w64k-l50", "layer7", "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "layer7.sae.pt"),
        ("llama_scope_lxr_8x", "l8r_8x", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x"),
        (
            "gpt-oss-20b-andyrdt",
            "resid_post_layer_3_trainer_0",
            "andyrdt/saes-gpt-oss-20b",
            "resid_post_layer_3/trainer_0",
        ),
        (
            "goodfire-llama-3.1-8b-instruct",
            "layer_19",
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
            "Llama-3.1-8B-Instruct-SAE-l19.pth",
        ),
        ("mwhanna-qwen3-4b-transcoders", "layer_0", "mwhanna/qwen3-4b-transcoders", "layer_0.safetensors"),
    ],
)
def test_names_resolve_as_saelens_has_them(release, sae_id, repo, path):
    named = names.lookup(release, sae_id)
    assert (named.repo, named.path) == (repo, path)
    assert {"sae_id": sae_id, "format": names.releases()[release]["format"]} in listing(release)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("layer7.sae.pt", ["layer7.sae.pt"]),
        (
            "Llama3_1-8B-L8R-8x",
            ["Llama3_1-8B-L8R-8x/hyperparams.json", "Llama3_1-8B-L8R-8x/checkpoints/final.safetensors"],
        ),
        ("800M/L0R", ["800M/L0R/config.json", "800M/L0R/sae_weights.safetensors"]),
        ("resid_post_layer_3/trainer_0", [f"resid_post_layer_3/trainer_0/{name}" for name in ("ae.pt", "config.json")]),
        ("layer_0.safetensors", ["layer_0.safetensors", "config.yaml"]),
        ("layers.5", ["layers.5/sae.safetensors", "layers.5/cfg.json", "config.json"]),
        ("v5_32k_layer_0.pt", ["v5_32k_layer_0.pt/sae_weights.safetensors", "v5_32k_layer_0.pt/cfg.json"]),  # a folder
    ],
)
def test_what_is_fetched_of_a_repository(path, wanted):
    patterns = _patterns(PurePosixPath(path))
    assert set(wanted) <= set(patterns)
    assert not any("*" in pattern.replace("params_layer_*", "") for pattern in patterns)


def test_the_name_of_a_release_says_the_model_where_the_files_do_not(tmp_path, monkeypatch):
    path = goodfire(tmp_path, weights(), "layer.pt")
    monkeypatch.setattr("gemmascope_fast.checkpoints.repository._download", lambda *_: path)
    found = find_checkpoint("goodfire-llama-3.1-8b-instruct", "layer_19")
    assert found.model_name == "meta-llama/Llama-3.1-8B-Instruct"
    assert found.extra["neuronpedia_id"] == "llama3.1-8b-it/19-resid-post-gf"


def test_temporal_releases_are_refused_by_name():
    with pytest.raises(
        gsf.CheckpointError, match="temporal SAEs are not supported: a temporal SAE reads the other tokens"
    ):
        find_checkpoint("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post")


def test_our_own_file_may_have_the_name_of_another_format(tmp_path):
    """Banks of layer_N.safetensors, as circuit-tracer names its files, are read by what they say."""
    from gemmascope_fast.checkpoints.native import save
    from gemmascope_fast.dev.testing import make_sae

    sae = make_sae(3, 16, 40, 5)
    save(sae, tmp_path / "layer_4.safetensors")
    for place in (tmp_path / "layer_4.safetensors", tmp_path):
        again = from_pretrained(place)
        assert type(again) is type(sae)
        assert torch.equal(again.W_dec, sae.W_dec)
    assert list(gsf.Bank(tmp_path)) != []
