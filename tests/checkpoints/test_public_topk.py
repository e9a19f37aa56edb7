"""Public top-k SAEs and transcoders: Qwen Scope, sparsify, dictionary_learning (GPT-OSS) and SAELens's AbsTopK."""

import json

import pytest
import torch
from checkpoint_files import write_saelens
from public_files import QWEN, D, F, K, dictionary_learning, qwen_scope, sparsify, tokens, top_k, weights

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained, open_checkpoint
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.cli.ls import listing

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def exact(x, w, centre=False):
    """(latents, reconstruction) in fp64 of a top-k SAE whose encoder reads x - b_dec if `centre`."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = x.double() - w["b_dec"] if centre else x.double()
    f = top_k(x @ w["W_enc"] + w["b_enc"], K)
    return f, f @ w["W_dec"] + w["b_dec"]


def assert_computes(sae, x, latents, out):
    got = sae.encode(x)
    assert torch.equal(got != 0, latents != 0)
    torch.testing.assert_close(got.double(), latents, **CLOSE)
    torch.testing.assert_close(sae(x).double(), out, **CLOSE)


# ---- Qwen Scope -------------------------------------------------------------------------------------


def test_qwen_scope(tmp_path):
    w, x = weights(), tokens()
    sae = from_pretrained(qwen_scope(tmp_path, w))
    assert type(sae) is gsf.TopKSAE
    assert (sae.k, sae.d_in, sae.d_sae) == (5, D, F)
    assert sae.cfg.site == gsf.Site("resid", 3)
    assert sae.cfg.metadata.model_name == "Qwen/Qwen3-1.7B-Base"
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(sae, name), w[name]), name
    assert_computes(sae, x, *exact(x, w))


def test_qwen_scope_in_the_cache_of_hugging_face(tmp_path):
    qwen_scope(tmp_path / "snapshots" / "0123abc", weights(), f"models--Qwen--{QWEN}")
    found = open_checkpoint(tmp_path / "snapshots" / "0123abc" / f"models--Qwen--{QWEN}" / "layer3.sae.pt")
    assert found.fields == {"k": 5}
    folder = from_pretrained(
        tmp_path / "snapshots" / "0123abc", f"models--Qwen--{QWEN}"
    )  # one file: the folder names it
    assert folder.k == 5


def test_qwen_scope_files_are_listed_by_name(tmp_path):
    for layer in (0, 1):
        qwen_scope(tmp_path, weights(), layer=layer)
    rows = listing(str(tmp_path / QWEN))
    assert [(r["sae_id"], r["format"], r["kind"]) for r in rows] == [
        (f"layer{i}.sae.pt", "qwen-scope", "topk_sae") for i in (0, 1)
    ]
    assert rows[1]["site"] == "model.layers.1.output"
    sae = from_pretrained(tmp_path / QWEN, "layer1.sae.pt")
    assert sae.cfg.site == gsf.Site("resid", 1)
    with pytest.raises(gsf.CheckpointError, match="expected one checkpoint"):
        from_pretrained(tmp_path / QWEN)


@pytest.mark.parametrize(
    ("repository", "more", "said"),
    [
        ("downloads", {}, "k: missing: Qwen Scope keeps it in the repository's name"),
        ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_0", {}, f"k: expected an integer from 1 to {F}, got 0"),
        ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_41", {}, f"k: expected an integer from 1 to {F}, got 41"),
        (QWEN, {"k": 4}, "k: 4 contradicts the repository's name, which says 5"),
        (QWEN, {"k": 4.0}, "k: expected an integer"),
        (QWEN, {"b_pre": torch.zeros(D)}, r"expected arrays .*got .*b_pre"),
        (QWEN, {"b_enc": torch.zeros(F + 1)}, rf"b_enc: expected \({F},\)"),
        (QWEN, {"b_dec": torch.full((D,), torch.nan)}, "b_dec: expected finite"),
        (QWEN, {"W_enc": torch.zeros(F)}, "expected two dimensions"),
        (QWEN, {"W_enc": torch.zeros(F, D, dtype=torch.int64)}, "expected floating"),
    ],
)
def test_qwen_scope_files_that_are_refused(tmp_path, repository, more, said):
    with pytest.raises(gsf.CheckpointError, match=said) as error:
        from_pretrained(qwen_scope(tmp_path, weights(), repository, **more))
    assert "layer3.sae.pt" in str(error.value)


def test_a_missing_array_is_named(tmp_path):
    path = tmp_path / QWEN / "layer3.sae.pt"
    path.parent.mkdir()
    torch.save({"W_enc": torch.ones(F, D), "b_enc": torch.ones(F)}, path)
    with pytest.raises(gsf.CheckpointError, match=r"expected arrays .*W_dec"):
        from_pretrained(path)
    torch.save({"other": torch.ones(F, D)}, path)
    with pytest.raises(gsf.CheckpointError, match="expected an SAE of Qwen Scope, Goodfire, OpenAI"):
        from_pretrained(path)


def test_qwen_scope_is_written(tmp_path):
    w = weights()
    source = qwen_scope(tmp_path, w)
    assert convert(source, tmp_path / "out", "qwen-scope") == ["layer3.sae.pt"]
    held = torch.load(tmp_path / "out" / "layer3.sae.pt", weights_only=True)
    assert torch.equal(held["W_enc"], w["W_enc"].t())
    assert torch.equal(held["W_dec"], w["W_dec"].t())
    again = from_pretrained(tmp_path / "out")  # the file holds k too
    assert again.k == K
    convert(tmp_path / "out", tmp_path / "native", "native")
    native = from_pretrained(tmp_path / "native")
    assert torch.equal(native.encode(tokens()), again.encode(tokens()))
    convert(tmp_path / "native", tmp_path / "lens", "saelens")
    assert from_pretrained(tmp_path / "lens").k == K
    with pytest.raises(gsf.CheckpointError, match="Gemma Scope 1 has no topk_sae"):
        convert(source, tmp_path / "g1", "gemma-scope-1")


# ---- dictionary_learning: GPT-OSS and others --------------------------------------------------------


def test_gpt_oss_top_k(tmp_path):
    w, x = weights(), tokens()
    folder = dictionary_learning(tmp_path, w, k=torch.tensor(K, dtype=torch.int32), threshold=torch.tensor(0.5))
    sae = from_pretrained(folder)
    assert type(sae) is gsf.TopKSAE
    assert (sae.k, sae.cfg.site) == (K, gsf.Site("resid", 7))
    assert sae.cfg.metadata.model_name == "openai/gpt-oss-20b"
    assert_computes(sae, x, *exact(x, w, centre=True))
    assert listing(str(tmp_path))[0]["format"] == "dictionary-learning"


@pytest.mark.parametrize(
    ("trainer", "buffers", "said"),
    [
        ({"k": None}, {}, "config.json: trainer: k: expected an integer, at least 1, got None"),
        ({"k": 0}, {}, "trainer: k: expected an integer"),
        ({"k": F + 1}, {}, f"k: expected an integer from 1 to {F}, got {F + 1}"),
        ({"k": K}, {"k": torch.tensor(K + 1)}, f"trainer: k: {K} contradicts ae.pt, which has {K + 1}"),
        ({"dict_class": "CrossCoder"}, {}, "trainer: dict_class: expected one of AutoEncoder, "),
        ({"dict_class": None}, {}, "trainer: dict_class: expected one of"),
        ({"dict_size": F + 1}, {}, f"trainer: dict_size: {F + 1} contradicts"),
        ({"activation_dim": 3}, {}, "trainer: activation_dim: 3 contradicts"),
        ({"lm_name": 3}, {}, "trainer: lm_name: expected text"),
    ],
)
def test_dictionary_learning_folders_that_are_refused(tmp_path, trainer, buffers, said):
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(dictionary_learning(tmp_path, weights(), trainer=trainer, **buffers))


def test_the_k_of_the_file_serves_where_the_config_has_none(tmp_path):
    folder = dictionary_learning(tmp_path, weights(), trainer={"k": None}, k=torch.tensor(K, dtype=torch.int32))
    assert from_pretrained(folder).k == K


def test_a_config_without_a_trainer_is_refused(tmp_path):
    dictionary_learning(tmp_path, weights())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(gsf.CheckpointError, match=r"config.json: trainer: expected an object"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(gsf.CheckpointError, match=r"config.json"):
        from_pretrained(tmp_path)


def test_dictionary_learning_top_k_is_written(tmp_path):
    w, x = weights(), tokens()
    source = dictionary_learning(tmp_path / "in", w)
    assert convert(source, tmp_path / "out", "dictionary-learning") == ["ae.pt", "config.json"]
    again = from_pretrained(tmp_path / "out")
    assert_computes(again, x, *exact(x, w, centre=True))
    assert again.cfg.site == gsf.Site("resid", 7)


# ---- sparsify ---------------------------------------------------------------------------------------


def test_sparsify(tmp_path):
    w, x = weights(), tokens()
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m"}))
    sae = from_pretrained(sparsify(tmp_path, w))
    assert type(sae) is gsf.TopKSAE
    assert (sae.k, sae.cfg.site) == (K, gsf.Site("resid", 5))
    assert sae.cfg.metadata.model_name == "EleutherAI/pythia-160m"
    assert_computes(sae, x, *exact(x, w, centre=True))
    assert listing(str(tmp_path))[0] | {"format": "sparsify", "sae_id": "layers.5"} == listing(str(tmp_path))[0]


@pytest.mark.parametrize("with_skip", [False, True])
def test_sparsify_transcoders(tmp_path, with_skip):
    w, x = weights(), tokens()
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(2)) if with_skip else None
    sae = from_pretrained(sparsify(tmp_path, w, "layers.5.mlp", {"transcode": True}, skip))
    assert type(sae) is (gsf.TopKSkipTranscoder if with_skip else gsf.TopKTranscoder)
    assert sae.cfg.site.path == "model.layers.5.mlp.input"
    assert sae.cfg.site_out.path == "model.layers.5.mlp.output"
    latents, out = exact(x, w)  # nothing is subtracted from what a transcoder reads
    assert_computes(sae, x, latents, out if skip is None else out + x.double() @ skip.double().t())
    for to in ("sparsify", "native"):
        convert(tmp_path / "layers.5.mlp", tmp_path / to / "layers.5.mlp", to)
        again = from_pretrained(tmp_path / to / "layers.5.mlp")
        assert type(again) is type(sae)
        assert again.cfg.site_out == sae.cfg.site_out
        assert torch.equal(again(x), sae(x))
    with pytest.raises(gsf.CheckpointError, match=f"SAELens has no {sae.kind}"):
        convert(tmp_path / "layers.5.mlp", tmp_path / "lens", "saelens")


def test_sparsify_is_written(tmp_path):
    w, x = weights(), tokens()
    convert(sparsify(tmp_path, w), tmp_path / "out" / "layers.5", "sparsify")
    assert_computes(from_pretrained(tmp_path / "out" / "layers.5"), x, *exact(x, w, centre=True))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"k": None}, "cfg.json: k: expected an integer"),
        ({"k": 0}, "cfg.json: k: expected an integer"),
        ({"k": F + 1}, f"k: expected an integer from 1 to {F}"),
        ({"activation": "groupmax"}, "activation: expected topk .*groupmax"),
        ({"signed": True}, "signed"),
        ({"skip_connection": True}, "skip_connection: contradicts"),
        ({"transcode": 1}, "transcode: expected true or false"),
        ({"num_latents": 7}, "num_latents: 7 contradicts"),
        ({"d_in": D + 1}, "d_in: 7 contradicts"),
    ],
)
def test_sparsify_configs_that_are_refused(tmp_path, config, said):
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(sparsify(tmp_path, weights(), config=config))


def test_an_sae_with_a_skip_is_refused(tmp_path):
    with pytest.raises(gsf.CheckpointError, match="skip_connection: expected false for an SAE"):
        from_pretrained(sparsify(tmp_path, weights(), skip=torch.eye(D)))


# ---- SAELens's AbsTopK ------------------------------------------------------------------------------


def test_abs_top_k_of_saelens(tmp_path):
    w, x = weights(), tokens()
    config = {"architecture": "abstopk", "k": K, "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}
    arrays = {name: w[name].numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    sae = from_pretrained(write_saelens(tmp_path, config, arrays))
    assert type(sae) is gsf.AbsTopKSAE
    z = x.double() @ w["W_enc"].double() + w["b_enc"].double()
    at = z.abs().topk(K, dim=-1).indices
    latents = torch.zeros_like(z).scatter_(-1, at, z.gather(-1, at))
    assert_computes(sae, x, latents, latents @ w["W_dec"].double() + w["b_dec"].double())
    convert(tmp_path, tmp_path / "again", "saelens")
    again = from_pretrained(tmp_path / "again")
    assert (type(again), again.k) == (gsf.AbsTopKSAE, K)
    del config["k"]
    with pytest.raises(gsf.CheckpointError, match="k: expected an integer"):
        from_pretrained(write_saelens(tmp_path, config, arrays))
