"""SAELens's folders and names; names, places and links of repositories."""

import json

import numpy as np
import pytest
import torch
from checkpoint_files import D, F, dense, weights, write_saelens

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import names, native, repository
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.cli import main as cli
from gemmascope_fast.sae.topk import TopKSAE


def test_saelens_relu_is_a_threshold_of_zero_and_b_dec_leaves_the_input(tmp_path):
    w = weights()
    theta = w.pop("threshold")
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "hook_name": "blocks.2.hook_resid_pre"}
    sae = from_pretrained(write_saelens(tmp_path, config, w))  # an old config: b_dec is subtracted unless it says no
    assert sae.cfg.site == gsf.Site("resid", 1)
    assert not sae.threshold.any()
    x = torch.randn(5, D)
    f, out = dense(x - torch.from_numpy(w["b_dec"]), w | {"threshold": theta}, 0.0)
    torch.testing.assert_close(sae.encode(x), f.float())
    torch.testing.assert_close(sae(x), out.float())


def test_saelens_batchtopk_is_the_threshold_it_kept(tmp_path):
    w = {n: a for n, a in weights().items() if n != "threshold"} | {"topk_threshold": np.array(0.75)}
    config = {"architecture": "batchtopk", "apply_b_dec_to_input": False, "sae_lens_version": "6.54.0"}
    sae = from_pretrained(write_saelens(tmp_path, config, w))
    assert torch.equal(sae.threshold, torch.full((F,), 0.75))
    for value, dtype in ((1e300, "float32"), (1e6, "float16"), (float("inf"), "float32")):
        write_saelens(tmp_path, config, w | {"topk_threshold": np.array(value)})
        with pytest.raises(gsf.CheckpointError, match="threshold"):
            from_pretrained(tmp_path, dtype=dtype)
    del w["topk_threshold"]
    write_saelens(tmp_path, config, w)
    with pytest.raises(gsf.CheckpointError, match="threshold"):
        from_pretrained(tmp_path)


def test_saelens_topk_with_rescaling_by_the_decoders_norm(tmp_path):
    w = {n: a for n, a in weights().items() if n != "threshold"}
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
    sae = from_pretrained(write_saelens(tmp_path, config | {"sae_lens_version": "6.0.0"}, w))
    assert isinstance(sae, TopKSAE)
    x = torch.randn(40, D)
    norm = torch.from_numpy(w["W_dec"]).double().norm(dim=1)
    z = (x.double() @ torch.from_numpy(w["W_enc"]).double() + torch.from_numpy(w["b_enc"])) * norm
    top = z.topk(3)
    f = torch.zeros_like(z).scatter(1, top.indices, top.values.clamp(min=0))
    torch.testing.assert_close(sae.encode(x), f.float())
    out = (f / norm) @ torch.from_numpy(w["W_dec"]).double() + torch.from_numpy(w["b_dec"])
    torch.testing.assert_close(sae(x), out.float())
    assert sae.encode_sparse(x).l0().max() <= 3
    native.save(sae, tmp_path / "own.safetensors")
    again = from_pretrained(tmp_path / "own.safetensors")
    assert again.k == 3
    assert again.encode_sparse(x) == sae.encode_sparse(x)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"architecture": "gated"}, "b_gate: missing"),
        ({"architecture": "matching_pursuit"}, "matching_pursuit.*step by step"),
        ({"architecture": "temporal"}, "temporal.*other tokens"),
        ({"architecture": "nonsense"}, "architecture: expected one of"),
        ({"architecture": "topk", "k": 0}, "k"),
        ({"d_sae": 11}, "d_sae"),
        ({"architecture": "jumprelu_transcoder", "apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
    ],
)
def test_saelens_configs_that_are_refused(tmp_path, change, said):
    config = {"architecture": "jumprelu", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}
    w = weights()
    if change.get("architecture") == "topk":
        del w["threshold"]
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(write_saelens(tmp_path, config | change, w))


@pytest.mark.parametrize(
    ("hook", "model", "site"),
    [
        ("blocks.4.hook_resid_post", None, gsf.Site("resid", 4)),
        ("blocks.4.attn.hook_z", "gemma-2-2b", gsf.Site("attn", 4)),
        ("blocks.4.hook_mlp_out", "google/gemma-3-1b-pt", gsf.Site("mlp", 4)),
        ("blocks.4.ln2.hook_normalized", "gemma-2-2b", gsf.Site("mlp_in_no_gain", 4)),
        ("blocks.4.hook_mlp_out", "meta-llama/Llama-3.1-8B", gsf.Site("mlp", 4)),
        ("blocks.4.mlp.hook_in", "Qwen/Qwen3-4B", gsf.Site("mlp_in", 4)),
        ("blocks.4.hook_mlp_out", "gpt2-small", None),  # no norm follows: another tensor
        ("blocks.0.hook_resid_pre", "gemma-2-2b", None),
        ("blocks.4.hook_resid_mid", "gemma-2-2b", None),
        ("hook_embed", "gemma-2-2b", None),  # scaled in TransformerLens
        (7, None, None),
    ],
)
def test_saelens_hook_names(tmp_path, hook, model, site):
    config = {"architecture": "jumprelu", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}
    metadata = {"hook_name": hook, "model_name": model}
    sae = from_pretrained(write_saelens(tmp_path, config | {"metadata": metadata}, weights()))
    assert sae.cfg.site == site


# ---- names, places, links --------------------------------------------------------------------------------------


def test_saelens_names(monkeypatch, tmp_path):
    folder = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "0"
    at = "layer_20/width_16k/average_l0_71"
    (folder / at).mkdir(parents=True)
    np.savez(folder / at / "params.npz", **weights())
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_args, **_options: None)
    sae = gsf.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical", revision="r")
    assert (asked["repo"], asked["revision"]) == ("google/gemma-scope-2b-pt-res", "r")
    assert f"{at}/params.npz" in asked["allow_patterns"]
    assert sae.cfg.site == gsf.Site("resid", 20)
    assert sae.cfg.metadata.neuronpedia_id == "gemma-2-2b/20-gemmascope-res-16k"
    with pytest.raises(gsf.CheckpointError, match="canonical"):
        gsf.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_20/width_17k/canonical")
    with pytest.raises(gsf.CheckpointError, match="no such checkpoint"):
        gsf.SAE.from_pretrained("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_72")


def test_the_table_knows_every_gemma_scope(capsys):
    releases = names.releases()
    assert len(names.ids("gemma-scope-2b-pt-res")) == 316
    assert {"gemma-scope-9b-it-res-canonical", "gemma-scope-2-27b-it-res-all"} <= set(releases)
    assert names.lookup("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76").model == "gemma-2-2b"
    assert names.lookup("nothing of the kind", "a") is None
    assert cli.main(["ls", "gemma-scope-2b-pt-res-canonical", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 58


def test_a_repository_of_many_is_not_downloaded_whole(monkeypatch):
    files = [f"layer_{i}/width_16k/average_l0_9/params.npz" for i in range(3)] + ["README.md"]
    monkeypatch.setattr(repository, "repository_files", lambda repo, revision=None: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(gsf.CheckpointError, match=r"3 checkpoints.*layer_0/width_16k.*ls"):
        from_pretrained("google/gemma-scope-2b-pt-res")


@pytest.mark.parametrize("sae_id", ["../x", "/etc", "a/../../x", "*", "a?b", ""])
def test_ids_that_leave_the_folder_or_match_more(tmp_path, sae_id):
    with pytest.raises(gsf.CheckpointError, match="sae_id"):
        from_pretrained(tmp_path, sae_id)


def test_links_that_leave_the_folder_and_those_of_the_cache(tmp_path):
    (tmp_path / "outside").mkdir()
    np.savez(tmp_path / "outside" / "params.npz", **weights())
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "params.npz").symlink_to(tmp_path / "outside" / "params.npz")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "outside")
    for sae_id in ("a", "b"):
        with pytest.raises(gsf.CheckpointError, match="outside"):
            from_pretrained(tmp_path / "in", sae_id)
    cache = tmp_path / "models--google--gemma-scope-2b-pt-res"
    folder = cache / "snapshots" / "0" / "layer_1" / "width_16k" / "average_l0_9"
    folder.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (tmp_path / "outside" / "params.npz").rename(cache / "blobs" / "abc")
    (folder / "params.npz").symlink_to(cache / "blobs" / "abc")
    sae = from_pretrained(cache / "snapshots" / "0", "layer_1/width_16k/average_l0_9")
    assert sae.cfg.site == gsf.Site("resid", 1)
