"""The packed file of mapped rows: damage, copies, bad arguments."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from packed_files import compressed, flip, small_panels

import gemmascope_fast as gsf
from gemmascope_fast.bank.store import copied_to
from gemmascope_fast.checkpoints import packed
from gemmascope_fast.checkpoints.loading import open_checkpoint
from gemmascope_fast.checkpoints.mapped import verify
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes


@pytest.fixture
def folder(tmp_path):
    save(make_sae(1, 200, 902, 20), tmp_path / "sae.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", [n for n in packed.Layout(1, 1, 1, 64).arrays() if n not in (packed.ROWS, "W_dec")])
def test_a_damaged_resident_array_is_named(folder, monkeypatch, name):
    small_panels(monkeypatch)
    path = packed.pack(open_checkpoint(folder / "sae.safetensors"), folder / "sae.safetensors.packed")
    verify(path)
    dtype, shape, at = packed.open_layout(path)[0].arrays()[name]
    flip(path, at + int(np.prod(shape)) * dtype.itemsize - 1)
    with pytest.raises(gsf.CheckpointError, match=rf"sae\.safetensors\.packed: {name}: damaged"):
        gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")


@pytest.mark.parametrize("where", ["rows", "decoder in the checkpoint", "decoder in the packed file"])
def test_damaged_rows_show_when_they_are_verified(folder, monkeypatch, where):
    small_panels(monkeypatch)
    checkpoint, name = folder / "sae.safetensors", packed.ROWS if where == "rows" else "W_dec"
    if where == "decoder in the packed file":
        checkpoint = compressed(folder)
    path = packed.pack(open_checkpoint(checkpoint), checkpoint.with_name(checkpoint.name + ".packed"))
    verify(path)
    layout, stat = packed.open_layout(path)[0], checkpoint.stat()
    if where == "decoder in the checkpoint":
        flip(checkpoint, layout.decoder + 4 * 200 * 300)
        os.utime(checkpoint, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk that fails would
    else:
        flip(path, layout.arrays()[name][2] + 4 * 200 * 300)
    gsf.SAE.from_pretrained(checkpoint, rows="mmap", kind="sae")
    with pytest.raises(gsf.CheckpointError, match=rf"{name}: damaged in panel 2"):
        verify(path)


def test_a_header_that_does_not_fit(folder):
    gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    path = folder / "sae.safetensors.packed"
    head = path.read_bytes()[: packed.HEADER]
    changes = [(rb"\"d_in\": 200", rb"\"d_in\": 201"), (rb"\"panel\"", rb"\"pamel\""), (b'"b_dec"', b'"b_dek"')]
    decoder = rb"\"decoder\": %d," % packed.open_layout(path)[0].decoder
    changes += [(decoder, decoder.replace(b": ", b": -")), (decoder, decoder.replace(b",", b"1,"))]
    changes += [(rb"\"file\": \"sae", rb"\"file\": \"../sae"), (rb"\"file\": \"sae", rb"\"file\": \"so")]
    for old, new in changes:
        assert old in head
        with open(path, "r+b") as file:
            file.write(head.replace(old, new)[: packed.HEADER].ljust(packed.HEADER))
        with pytest.raises(gsf.CheckpointError, match=str(path)):
            gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")


# ---- copies -------------------------------------------------------------------------------------------


def test_a_deepcopy_is_mapped_too_and_of_its_own(folder):
    sae, x = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap"), make_activations(2, 9, 200)
    twin, latents = copy.deepcopy(sae), sae.encode_sparse(x)
    assert twin.rows.holds(twin.W_enc)
    assert twin.rows.holds(twin.W_dec)
    assert not sae.rows.holds(twin.W_enc)
    assert twin.screen_cache.screen is sae.screen_cache.screen
    assert not twin.screen_cache.stale()
    assert twin.encode_sparse(x) == latents
    assert same_bytes(twin(x), sae(x))
    with torch.no_grad():
        twin.W_dec.mul_(2)
        twin.threshold.mul_(3)
    assert sae.encode_sparse(x) == latents
    assert same_bytes(sae.decode(latents), make_sae(1, 200, 902, 20).decode(latents).detach())
    assert twin.encode_sparse(x) == twin.encode_sparse(x, screen=False) != latents
    with pytest.raises(ValueError, match=r"W_dec: expected the rows of .*edited"):
        copy.deepcopy(twin)


def test_a_deepcopy_goes_on_when_the_file_is_replaced(folder):
    sae, x = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap"), make_activations(2, 9, 200)
    (folder / "other").write_bytes(b"nothing")
    os.replace(folder / "other", folder / "sae.safetensors.packed")
    assert same_bytes(copy.deepcopy(sae)(x), sae(x))


def test_a_copy_for_another_device_is_resident(folder):
    sae, x = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap"), make_activations(2, 9, 200)
    moved = copied_to(sae, torch.device("cpu"))
    assert moved.rows.in_memory
    assert same_bytes(moved(x), sae(x))


def test_a_cast_makes_it_resident(folder):
    sae, x = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap"), make_activations(2, 9, 200)
    assert not sae.to("cpu").rows.in_memory
    cast = sae.to(torch.bfloat16)
    os.truncate(folder / "sae.safetensors.packed", 0)
    assert cast.encode_sparse(x) == pickle.loads(pickle.dumps(cast)).encode_sparse(x, screen=False)


def test_pickling_is_refused(folder):
    sae = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(sae)


def test_bad_arguments(folder):
    for wrong in ({"rows": "disk"}, {"rows": "mmap", "dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="rows"):
            gsf.SAE.from_pretrained(folder / "sae.safetensors", **wrong)
