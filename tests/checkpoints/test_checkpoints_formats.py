"""Gemma Scope 2's folders, damaged archives, writing, converting and listing."""

import json
import os
import resource
import zipfile

import numpy as np
import pytest
import torch
from checkpoint_files import D, F, weights, write_gemma_scope_2
from safetensors.numpy import load_file

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import native
from gemmascope_fast.checkpoints.loading import from_pretrained, open_checkpoint
from gemmascope_fast.cli import main as cli
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.cli.ls import listing


@pytest.mark.parametrize(
    ("name", "kind", "site", "site_out"),
    [
        ("resid_post/layer_12_width_16k_l0_small", "sae", gsf.Site("resid", 12), None),
        ("resid_post_all/layer_3_width_16k_l0_big", "sae", gsf.Site("resid", 3), None),
        ("mlp_out/layer_5_width_16k_l0_small_seed_1", "sae", gsf.Site("mlp", 5), None),
        ("attn_out_all/layer_0_width_16k_l0_small", "sae", gsf.Site("attn", 0), None),
        ("transcoder/layer_7_width_16k_l0_small", "transcoder", gsf.Site("mlp_in", 7), gsf.Site("mlp", 7)),
    ],
)
def test_without_a_config_the_folder_says_what_it_is(tmp_path, name, kind, site, site_out):
    folder = write_gemma_scope_2(tmp_path / "gemma-scope-2-270m-pt" / name)
    sae = from_pretrained(tmp_path / "gemma-scope-2-270m-pt", name)
    assert (sae.kind, sae.cfg.site, sae.cfg.site_out) == (kind, site, site_out)
    assert sae.cfg.metadata.model_name == "google/gemma-3-270m"  # the hub's name of the 270M has no -pt
    assert open_checkpoint(folder).kind_known


def test_an_affine_transcoder_without_a_config(tmp_path):
    folder = write_gemma_scope_2(tmp_path / "transcoder_all" / "layer_2_width_16k_l0_big_affine", skip=True)
    sae = from_pretrained(folder)
    assert (sae.kind, sae.cfg.site) == ("skip_transcoder", gsf.Site("mlp_in", 2))


def test_what_nothing_names_has_no_site_and_says_that_its_kind_is_assumed(tmp_path):
    sae = from_pretrained(write_gemma_scope_2(tmp_path / "x"))
    assert sae.cfg.site is None
    assert sae.cfg.metadata.extra["kind_assumed"]
    told = from_pretrained(tmp_path / "x", kind="transcoder", site=gsf.Site("mlp_in", 1), site_out=gsf.Site("mlp", 1))
    assert told.kind == "transcoder"
    assert told.cfg.site == gsf.Site("mlp_in", 1)
    # different widths in and out can only be a transcoder's
    assert from_pretrained(write_gemma_scope_2(tmp_path / "y", d_out=4)).kind == "transcoder"
    np.savez(tmp_path / "params.npz", **weights())
    assert from_pretrained(tmp_path / "params.npz").cfg.metadata.extra["kind_assumed"]


RESID = {"hf_hook_point_in": "model.layers.3.output", "type": "sae", "architecture": "jump_relu"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hf_hook_point_in": "model.layers.4.output"}, "hf_hook_point_in"),
        ({"hf_hook_point_in": "model.layers.3.self_attn.o_proj.input"}, "hf_hook_point_in"),
        ({"hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output"}, "hf_hook_point_out"),
        ({"type": "transcoder"}, "type"),
        ({"type": "clt"}, "type"),
        ({"affine_connection": True}, "affine_connection"),
        ({"width": 11}, "width"),
        ({"architecture": "topk"}, "architecture"),
        ({"hf_hook_point_in": 3}, "hook name"),
    ],
)
def test_a_config_that_contradicts_weights_or_name(tmp_path, change, said):
    folder = write_gemma_scope_2(tmp_path / "resid_post" / "layer_3_width_16k_l0_big", RESID | change)
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(RESID))
    assert from_pretrained(folder).cfg.site == gsf.Site("resid", 3)


def test_a_kind_or_site_that_the_checkpoint_denies(tmp_path):
    folder = write_gemma_scope_2(tmp_path / "resid_post" / "layer_3_width_16k_l0_big", RESID)
    for told in ({"kind": "transcoder"}, {"site": gsf.Site("resid", 4)}):
        with pytest.raises(ValueError, match=next(iter(told))):
            from_pretrained(folder, **told)


# ---- damage ----------------------------------------------------------------------------------------------------


def npy(array, shape=None):
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": tuple(shape or array.shape)}
    head = str(header).encode()
    head += b" " * (-(10 + len(head) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + array.tobytes()


def write_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


def test_a_header_that_promises_more_than_the_member_holds(tmp_path):
    members = {name: npy(array) for name, array in weights().items()}
    members["W_enc"] = npy(weights()["W_enc"], shape=(1 << 20, 1 << 20))
    write_members(tmp_path / "params.npz", members)
    with pytest.raises(gsf.CheckpointError, match="W_enc"):
        from_pretrained(tmp_path / "params.npz")


@pytest.mark.parametrize("claimed", [1 << 31, None])
def test_a_zip_bomb_is_refused_before_memory_is_taken(tmp_path, claimed):
    """128 MB of zeros in 130 kB, as they are and with a directory that claims 2 GB."""
    path, zeros = tmp_path / "params.npz", np.zeros((16, 1 << 21), "f4")
    rows = {name: np.zeros(1 << 21, "f4") for name in ("b_enc", "threshold")}
    np.savez_compressed(path, W_enc=zeros, W_dec=zeros.T.copy(), b_dec=np.zeros(16, "f4"), **rows)
    if claimed is not None:
        size = (128 + zeros.nbytes).to_bytes(4, "little")
        path.write_bytes(path.read_bytes().replace(size, (128 + claimed).to_bytes(4, "little")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(gsf.CheckpointError, match=r"params\.npz"):
        from_pretrained(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # kB


def test_damaged_stored_data_fails_its_checksum(tmp_path):
    path = tmp_path / "params.npz"
    np.savez(path, **weights())
    data = bytearray(path.read_bytes())
    at = data.find(weights()["W_dec"].tobytes())
    data[at + 5] ^= 1  # still a finite number: only the checksum knows
    path.write_bytes(data)
    with pytest.raises(gsf.CheckpointError, match="W_dec"):
        from_pretrained(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "own.safetensors"
    sae = gsf.JumpReLUSAE.from_weights(**{n: torch.from_numpy(a) for n, a in weights().items()})
    native.save(sae, path)
    before = path.read_bytes()
    monkeypatch.setattr("gemmascope_fast.files.write._bytes", lambda block: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        native.save(sae, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["own.safetensors"]


def test_files_get_the_permissions_of_the_umask(tmp_path):
    sae = gsf.JumpReLUSAE.from_weights(**{n: torch.from_numpy(a) for n, a in weights().items()})
    old = os.umask(0o027)
    try:
        native.save(sae, tmp_path / "own.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "own.safetensors").stat().st_mode & 0o777 == 0o640


# ---- writing, converting, listing ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_files_are_safetensors_of_what_is_held(tmp_path, dtype):
    from safetensors.torch import load_file as load_torch

    held = {n: torch.from_numpy(a).to(dtype) for n, a in weights().items()}
    native.save(gsf.JumpReLUSAE.from_weights(**held), tmp_path / "own.safetensors")
    stored = load_torch(tmp_path / "own.safetensors")
    assert all(torch.equal(stored[name], held[name]) and stored[name].dtype == dtype for name in held)
    again = from_pretrained(tmp_path / "own.safetensors", dtype=dtype)
    assert again.W_enc.dtype == dtype


def test_conversions_keep_every_bit_and_the_site(tmp_path):
    folder = tmp_path / "transcoder" / "layer_3_width_16k_l0_big"
    write_gemma_scope_2(folder, d_out=4, skip=True)
    first = from_pretrained(folder)
    for i, to in enumerate(("saelens", "native", "gemma-scope-2", "saelens")):
        convert(folder, tmp_path / f"{i}", to)
        folder = tmp_path / f"{i}"
        again = from_pretrained(folder)
        assert (again.kind, again.cfg.site, again.cfg.site_out) == (first.kind, first.cfg.site, first.cfg.site_out)
        for name, value in first.named_parameters():
            assert torch.equal(getattr(again, name), value), (to, name)
    stored = load_file(folder / "sae_weights.safetensors")
    assert stored["W_skip"].shape == (4, D)  # SAELens holds [d_out, d_in]
    with pytest.raises(gsf.CheckpointError, match="skip"):
        convert(folder, tmp_path / "no", "gemma-scope-1")
    assert not (tmp_path / "no").exists()


def test_convert_and_ls_on_the_command_line(tmp_path, capsys):
    source = tmp_path / "all" / "layer_1"
    source.mkdir(parents=True)
    np.savez(source / "params.npz", **weights())
    (tmp_path / "all" / "bad").mkdir()
    (tmp_path / "all" / "bad" / "params.npz").write_bytes(b"PK")
    options = ["--to", "native", "--save-dtype", "bfloat16", "--sae-id", "layer_1"]
    assert cli.main(["convert", str(tmp_path / "all"), str(tmp_path / "out"), *options]) == 0
    assert from_pretrained(tmp_path / "out", dtype="bfloat16").W_enc.dtype == torch.bfloat16
    rows = {row["sae_id"]: row for row in listing(str(tmp_path / "all"))}
    assert rows["layer_1"]["d_sae"] == F
    assert rows["layer_1"]["kind"] == "sae?"
    assert "params.npz" in rows["bad"]["error"]
    capsys.readouterr()
    assert cli.main(["ls", str(tmp_path)]) == 0
    assert "3 checkpoints" in capsys.readouterr().out
    assert cli.main(["convert", "demo", str(tmp_path / "demo"), "--to", "saelens"]) == 0
    assert from_pretrained(tmp_path / "demo").cfg.site == gsf.Site("resid", 12)
    # names of a converted Gemma Scope 1 file are numpy's own again
    convert(tmp_path / "out", tmp_path / "one", "gemma-scope-1")
    loaded = np.load(tmp_path / "one" / "params.npz")
    assert set(loaded) == set(weights())
    assert loaded["W_enc"].dtype == np.float32


def test_a_progress_bar_counts_the_bytes(tmp_path, capsys):
    np.savez(tmp_path / "params.npz", **weights())
    from_pretrained(tmp_path / "params.npz", progress=True)
    assert "params.npz" in capsys.readouterr().err
    from_pretrained(tmp_path / "params.npz")
    assert not capsys.readouterr().err
