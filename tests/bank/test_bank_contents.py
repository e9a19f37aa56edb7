"""The contents of a bank: names, patterns, repositories, coders of several sites, and errors."""

import numpy as np
import pytest
import torch
from bank_releases import D, F, arrays, device, release
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.bank import Bank
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.sae.screen import most_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_patterns_and_errors(tmp_path, monkeypatch):
    folder = release(tmp_path, 3)
    bank = Bank(folder)
    assert len(bank) == 3
    assert bank.models == ["google/gemma-2-2b"]
    part = bank.select("layer_[12]/*")
    assert [n[:7] for n in part] == ["layer_1", "layer_2"]
    part[next(iter(part))].lease().release()
    assert device(bank) == device(part)
    for wrong in (lambda: bank.select("x*"), lambda: bank["x"], lambda: bank.of("x")):
        with pytest.raises(KeyError, match=r"layer_0|gemma-2-2b"):
            wrong()
    for options in (
        {"device_bytes": -1},
        {"host_bytes": 1.5},
        {"dtype": "int8"},
        {"ahead": -1},
        {"device_bytes": True},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Bank(folder, **options)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in (tmp_path / "empty", "nobody/nothing"):
        with pytest.raises(gsf.CheckpointError, match=r"no checkpoint|reach"):
            Bank(place)
    with bank:
        pass
    with pytest.raises(gsf.BankError, match="closed"):
        bank[next(iter(bank))].lease()
    assert device(bank)["bytes"] == 0


def test_a_repository_is_fetched_one_sae_at_a_time(tmp_path, monkeypatch):
    folder = release(tmp_path, 3)
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*.npz")]
    fetched = []

    def snapshot_download(repo, **options):
        fetched.append([p for p in files if p in options["allow_patterns"]])
        return str(folder)

    monkeypatch.setattr("gemmascope_fast.bank.members.repository_files", lambda repo, revision=None: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    bank = Bank("google/gemma-scope-2b-pt-res")
    assert len(bank) == 3
    assert not fetched
    name = list(bank)[1]
    x = torch.randn(2, D)
    assert torch.equal(bank[name](x), from_pretrained(folder, name)(x))
    assert fetched == [[f"{name}/params.npz"]]
    named = Bank("gemma-scope-2b-pt-res-canonical")
    assert len(named) == 58
    assert len(fetched) == 1


def test_coders_of_several_sites_are_counted_too(tmp_path):
    folder = tmp_path / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_medium"
    folder.mkdir(parents=True)
    for i in range(3):
        w = arrays(i)
        stored = {"w_enc": w["W_enc"], "w_dec": np.stack([w["W_dec"]] * 3, 1)}
        save_file(stored | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}, folder / f"params_layer_{i}.safetensors")
    bank = Bank(tmp_path)
    (name,) = bank
    with bank.use(name) as clt:
        assert sum(p.nbytes for p in clt.parameters()) + 3 * most_bytes(D, F) == bank[name].nbytes
        assert clt(torch.randn(3, 5, D)).shape == (3, 5, D)
    with pytest.raises(gsf.CheckpointError, match="one site"):
        _ = bank[name].cfg
