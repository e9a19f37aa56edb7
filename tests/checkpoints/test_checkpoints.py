"""Checkpoints of every format, written here independently, load with the right weights and site."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import native
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.files import arrays


def weights(d_in=6, d_sae=10, d_out=6):
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": d_sae, "b_dec": d_out, "threshold": d_sae}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def same(sae, w):
    for name, array in w.items():
        assert torch.equal(getattr(sae, name).detach(), torch.from_numpy(array)), name
    assert sae.W_enc.t().is_contiguous()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope_1(tmp_path, save):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    save(folder / "params.npz", **weights())
    sae = from_pretrained(tmp_path / "gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
    same(sae, weights())
    assert sae.cfg.site == gsf.Site("resid", 20)
    assert sae.cfg.metadata.model_name == "google/gemma-2-2b"


def test_gemma_scope_1_transcoder_reads_the_norm_without_gain(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3/width_16k/average_l0_9"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights())
    sae = gsf.JumpReLUTranscoder.from_pretrained(folder)
    assert (sae.cfg.site, sae.cfg.site_out) == (gsf.Site("mlp_in_no_gain", 3), gsf.Site("mlp", 3))


def test_gemma_scope_2_skip_is_x_at_A_and_reads_the_norm_with_gain(tmp_path):
    w, A = weights(d_out=4), np.arange(24, dtype="f4").reshape(6, 4)
    stored = {"w_enc": w["W_enc"], "w_dec": w["W_dec"], "affine_skip_connection": A}
    save_file(stored | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}, tmp_path / "params.safetensors")
    config = {"type": "transcoder", "affine_connection": True, "width": 10, "architecture": "jump_relu"}
    config["hf_hook_point_in"] = "model.layers.2.pre_feedforward_layernorm.output"
    config["hf_hook_point_out"] = "model.layers.2.post_feedforward_layernorm.output"
    (tmp_path / "config.json").write_text(json.dumps(config))
    sae = from_pretrained(tmp_path)
    same(sae, w)
    assert (sae.cfg.site, sae.cfg.site_out) == (gsf.Site("mlp_in", 2), gsf.Site("mlp", 2))
    x = torch.ones(3, 6)
    torch.testing.assert_close(sae(x) - sae.decode(sae.encode_sparse(x)), x @ torch.from_numpy(A))
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 11}))
    with pytest.raises(gsf.CheckpointError, match="width"):
        from_pretrained(tmp_path)


def test_saelens_and_native(tmp_path):
    save_file(weights(), tmp_path / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": 6, "d_sae": 10, "apply_b_dec_to_input": False}
    config["metadata"] = {"hook_name": "blocks.4.hook_resid_post"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = from_pretrained(tmp_path)
    same(sae, weights())
    native.save(sae, tmp_path / "own.safetensors")
    again = from_pretrained(tmp_path / "own.safetensors")
    same(again, weights())
    assert again.cfg.site == gsf.Site("resid", 4)
    half = from_pretrained(tmp_path, dtype="bfloat16")
    assert torch.equal(half.W_enc, sae.W_enc.bfloat16())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
    centred, x = from_pretrained(tmp_path), torch.randn(3, 6)
    w = {name: torch.from_numpy(array).double() for name, array in weights().items()}
    z = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    want = torch.where(z > w["threshold"].clamp(min=0), z, 0.0)
    torch.testing.assert_close(centred.encode(x), want.float())


@pytest.mark.parametrize(
    "change",
    [
        {"W_dec": np.zeros((9, 6), "f4")},
        {"extra": np.zeros(1, "f4")},
        {"b_enc": np.array([None] * 10, dtype=object)},
        {"threshold": np.full(10, np.nan, "f4")},
    ],
)
def test_bad_npz(tmp_path, change):
    np.savez(tmp_path / "params.npz", **(weights() | change))
    with pytest.raises(gsf.CheckpointError, match=r"params\.npz"):
        from_pretrained(tmp_path)


def test_a_jumprelu_without_thresholds_is_no_relu(tmp_path):
    w = {n: a for n, a in weights().items() if n != "threshold"}
    np.savez(tmp_path / "params.npz", **w)
    save_file({n.replace("W", "w"): a for n, a in w.items()}, tmp_path / "params.safetensors")
    for name in ("params.npz", "params.safetensors"):
        with pytest.raises(gsf.CheckpointError, match="threshold: expected"):
            from_pretrained(tmp_path / name)


def test_paths_and_repositories(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for where, sae_id in ((tmp_path, "../x"), (tmp_path / "none", None), ("nobody/nothing", "a")):
        with pytest.raises(gsf.CheckpointError):
            from_pretrained(where, sae_id)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed"])
def test_parts_of_matrices(tmp_path, kind, monkeypatch):
    """Any rows and columns, of an array as it is, transposed, or changed on the way; only what is asked for is read."""
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 100)  # a few rows a block
    a = np.random.default_rng(0).standard_normal((13, 11)).astype(np.float32)
    before = np.zeros(7, np.float32)
    if kind == "safetensors":
        save_file({"before": before, "a": a}, tmp_path / "x")
        plain = arrays.open_safetensors(tmp_path / "x")[0]["a"]
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(tmp_path / "x.npz", before=before, a=a)
        plain = arrays.open_npz(tmp_path / "x.npz")["a"]
    assert (plain.at is None) == (kind == "compressed")
    numbered = plain.mapped(lambda block, start: block.double() * torch.arange(start, start + len(block))[:, None])
    want = torch.from_numpy(a)
    times = want.double() * torch.arange(13)[:, None]
    forms = [(plain, want), (plain.transposed(), want.t()), (numbered, times), (numbered.transposed(), times.t())]
    for row, column, m, n in ((0, 0, 11, 11), (2, 3, 5, 4), (9, 0, 2, 11), (0, 10, 11, 1), (4, 4, 0, 2)):
        for entry, whole in forms:
            for target in (torch.empty(m, n, dtype=torch.float64), torch.empty(n, m, dtype=torch.float64).t()):
                entry.read_part_into(target, row, column)
                assert torch.equal(target, whole[row : row + m, column : column + n].double())
    if kind != "compressed":
        read = []
        replace(plain, seen=read.append).read_part_into(torch.empty(5, 4), 2, 3)
        assert sum(read) == 5 * 4 * 4
    if kind == "safetensors":
        with open(tmp_path / "x", "r+b") as file:
            file.truncate(plain.at + 4 * 11 * 6)
        plain.read_part_into(torch.empty(6, 11), 0, 0)
        with pytest.raises(gsf.CheckpointError, match="a: truncated"):
            plain.read_part_into(torch.empty(3, 4), 5, 3)


def test_parts_are_checked_for_finite_values(tmp_path):
    a = torch.zeros(3, 4)
    a[1, 2] = torch.nan
    np.savez(tmp_path / "x.npz", a=a.numpy())
    entry = arrays.open_npz(tmp_path / "x.npz")["a"]
    entry.read_part_into(torch.empty(3, 2), 0, 0)
    with pytest.raises(gsf.CheckpointError, match="finite"):
        entry.read_part_into(torch.empty(3, 2), 0, 1)
