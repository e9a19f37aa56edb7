"""Rows in pinned host memory, tested without a device: device "meta" and memory that only claims to be pinned.
tests/interpreter/test_screen.py has the kernels' side, tests/device/test_pinned.py the bytes."""

import copy

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.sae import pinned
from gemmascope_fast.sae.rows import Rows
from gemmascope_fast.sae.screen import Screen


@pytest.fixture
def lent(monkeypatch):
    """What was pinned, as data pointers; "meta" passes for a device."""
    kept = {}

    def page_locked(rows):
        made = rows.contiguous().clone()
        kept[made.data_ptr()] = made
        return made

    monkeypatch.setattr(pinned, "check_device", lambda device: None)
    monkeypatch.setattr(pinned, "page_locked", page_locked)
    monkeypatch.setattr(pinned, "in_host_memory", lambda rows: rows.data_ptr() in kept)
    return kept


@pytest.fixture
def encoded(monkeypatch):
    """The arguments of each screened encode, which runs on the host in place of the device."""
    seen = []

    def encode(self, x, W_enc, b_enc, threshold, **more):
        seen.append((self, x, W_enc, b_enc, threshold))
        crow = torch.zeros(x.shape[0] + 1, dtype=torch.int64)
        return crow, torch.empty(0, dtype=torch.int32), torch.empty(0)

    monkeypatch.setattr(Screen, "encode", encode)
    return seen


def test_the_screen_decides_and_the_rows_stay(lent, encoded):
    sae = make_sae(0, 40, 67, 5)
    want = sae.W_enc.detach().clone()
    screen = sae.prepare().screen_cache.screen
    assert sae.pin_rows("meta") is sae
    assert {n: p.device.type for n, p in sae.named_parameters()} == {
        "W_enc": "cpu", "W_dec": "meta", "b_enc": "meta", "b_dec": "meta", "threshold": "meta"
    }  # fmt: skip
    assert sae.device.type == "meta"
    assert torch.equal(sae.W_enc, want)
    assert not any(p.requires_grad for p in sae.parameters())
    for T in (1, 700):
        sae.encode_sparse(torch.empty(T, 40, device="meta"))
    for used, x, W_enc, b_enc, threshold in encoded:
        assert used is screen  # of these very weights, on the host with them
        assert W_enc.data_ptr() in lent
        assert (x.device.type, b_enc.device.type, threshold.device.type) == ("meta",) * 3
    assert len(encoded) == 2
    assert len(lent) == 1


def test_copies_and_casts_are_pinned_again(lent, encoded):
    sae = make_sae(0, 40, 67, 5).prepare().pin_rows("meta")
    twin = copy.deepcopy(sae)
    assert twin.W_enc.data_ptr() not in lent
    weights = twin.screen_cache.refresh(twin)
    assert weights[0].data_ptr() in lent
    assert weights[0].data_ptr() != sae.W_enc.data_ptr()
    assert torch.equal(weights[0], sae.W_enc)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    assert half.screen_cache.refresh(half)[0].data_ptr() in lent
    assert half.W_enc.dtype == torch.bfloat16
    assert half.W_enc.t().is_contiguous()


def test_moved_to_the_device_they_are_resident(lent):
    sae = make_sae(0, 40, 67, 5).prepare().pin_rows("meta").to("meta")
    assert sae.screen_cache.refresh(sae)[0].device.type == "meta"
    assert type(sae.rows) is Rows


def test_what_host_rows_cannot_do(lent, encoded):
    sae, x = make_sae(0, 40, 67, 5).prepare().pin_rows("meta"), torch.empty(3, 40, device="meta")
    with pytest.raises(ValueError, match="screen: expected None or True"):
        sae.encode_sparse(x, screen=False)
    with pytest.raises(ValueError, match="no gradients through rows in host memory"):
        sae.encode_sparse(x.clone().requires_grad_())
    with torch.no_grad():
        sae.encode_sparse(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="x: expected a tensor on meta, like the SAE, got cpu"):
        sae.encode_sparse(make_activations(1, 3, 40))
    with pytest.raises(ValueError, match="precision: 'tensor' reads every row"):
        sae.encode_sparse(x, precision="tensor")


def test_a_checkpoint_loads_pinned(lent, tmp_path):
    path = tmp_path / "sae.safetensors"
    save(make_sae(0, 40, 67, 5), path)
    sae = gsf.SAE.from_pretrained(path, device="meta", rows="pinned")
    assert sae.W_enc.data_ptr() in lent
    assert torch.equal(sae.W_enc, gsf.SAE.from_pretrained(path).W_enc)
    assert sae.device.type == "meta"


def test_no_device_says_so(tmp_path):
    sae = make_sae(0, 40, 67, 5)
    with pytest.raises(ValueError, match='"pinned" needs a CUDA device, got cpu'):
        sae.pin_rows("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(gsf.BackendError, match="there is no CUDA device in this process"):
            sae.pin_rows()
    assert sae.encode_sparse(make_activations(1, 3, 40)).nnz > 0  # it is as it was
    path = tmp_path / "sae.safetensors"
    save(sae, path)
    with pytest.raises(ValueError, match='"pinned" needs a CUDA device, got cpu'):
        gsf.SAE.from_pretrained(path, rows="pinned")
    with pytest.raises(ValueError, match="got 'disk'"):
        gsf.SAE.from_pretrained(path, rows="disk")


def test_mapped_rows_are_not_pinned(lent, tmp_path):
    path = tmp_path / "sae.safetensors"
    save(make_sae(0, 40, 67, 5), path)
    with pytest.raises(ValueError, match="mapped rows cannot be pinned"):
        gsf.SAE.from_pretrained(path, rows="mmap").pin_rows("meta")


def test_the_fused_loop_leaves_them_to_the_steps(lent):
    """Its first launch reads every row of the encoder."""
    from types import SimpleNamespace

    from gemmascope_fast.attach.fused import Fused

    fused = Fused(SimpleNamespace(state=SimpleNamespace(path=None)), [])
    call, rows = SimpleNamespace(chosen=None), SimpleNamespace(is_cuda=True, shape=(1, 40), dtype=torch.float32)
    sae = make_sae(0, 40, 67, 5).prepare()
    with torch.no_grad():
        assert fused._serves(sae, rows, call)
        assert not fused._serves(sae.pin_rows("meta"), rows, call)
