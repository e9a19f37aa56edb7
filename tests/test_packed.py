"""rows="mmap": the packed file, its answers, and what can go wrong with it."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import gemmascope_fast as gsf
from gemmascope_fast import packed
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.loading import open_checkpoint
from gemmascope_fast.testing import make_activations, make_sae, same_bytes


@pytest.fixture
def folder(tmp_path):
    save(make_sae(1, 200, 902, 20), tmp_path / "sae.safetensors")
    return tmp_path


def small_panels(monkeypatch):
    monkeypatch.setattr(packed, "PANEL_BYTES", 4 * 200 * 128)  # 128 features: eight panels, the last one short


def test_answers_are_those_of_the_resident_sae(folder, monkeypatch):
    small_panels(monkeypatch)
    resident, x = gsf.SAE.from_pretrained(folder), make_activations(2, 9, 200)
    mapped = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    assert mapped._mapped is not None
    for T in (0, 1, 9):
        latents = mapped.encode_sparse(x[:T])
        assert latents == resident.encode_sparse(x[:T], screen=False)
        assert latents == mapped.encode_sparse(x[:T], screen=False)
        assert same_bytes(mapped.decode(latents), resident.decode(latents))
    assert same_bytes(mapped(x), resident(x))
    assert same_bytes(mapped.W_enc, resident.W_enc)


def test_the_screen_is_the_one_that_is_built_in_memory(folder, monkeypatch):
    small_panels(monkeypatch)
    resident = gsf.SAE.from_pretrained(folder).prepare()
    mapped = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    for name, tensor in resident._prepared.screen.tensors().items():
        assert torch.equal(mapped._prepared.screen.tensors()[name], tensor), name


def test_the_file_is_a_safetensors_file_with_one_row_after_the_other(folder):
    gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    arrays = load_file(folder / "sae.safetensors.packed")
    assert torch.equal(arrays["W_enc.rows"], gsf.SAE.from_pretrained(folder).W_enc.detach().t())


def test_it_is_written_once_and_again_for_another_checkpoint(folder):
    path, x = folder / "sae.safetensors", make_activations(2, 9, 200)
    gsf.SAE.from_pretrained(path, rows="mmap")
    first = os.stat(folder / "sae.safetensors.packed").st_mtime_ns
    gsf.SAE.from_pretrained(path, rows="mmap")
    assert os.stat(folder / "sae.safetensors.packed").st_mtime_ns == first
    save(make_sae(5, 200, 902, 20), path)
    mapped = gsf.SAE.from_pretrained(path, rows="mmap")
    assert mapped.encode_sparse(x) == make_sae(5, 200, 902, 20).encode_sparse(x, screen=False)
    assert sorted(p.name for p in folder.iterdir()) == ["sae.safetensors", "sae.safetensors.packed"]


def test_an_interrupted_packing_goes_on(folder, monkeypatch):
    small_panels(monkeypatch)
    checkpoint = open_checkpoint(folder / "sae.safetensors")
    whole = packed.pack(checkpoint, folder / "whole.packed").read_bytes()
    read, calls = packed._columns, []

    def fails_at_the_fourth(entry, start, end):
        calls.append(start)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(entry, start, end)

    monkeypatch.setattr(packed, "_columns", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        packed.pack(checkpoint, folder / "parts.packed")
    assert not (folder / "parts.packed").exists()
    assert packed.pack(checkpoint, folder / "parts.packed").read_bytes() == whole
    assert calls == [0, 128, 256, 384, 384, 512, 640, 768, 896]


def test_a_file_truncated_after_opening_raises(folder):
    mapped = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    x = make_activations(2, 3, 200)
    latents = mapped.encode_sparse(x)
    os.truncate(folder / "sae.safetensors.packed", 1 << 20)
    with pytest.raises(gsf.CheckpointError, match="truncated"):
        mapped.encode_sparse(x)
    with pytest.raises(gsf.CheckpointError, match="truncated"):
        mapped.decode(latents)


def test_too_little_room(folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(gsf.CheckpointError, match="disk"):
        gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")


def test_bad_arguments(folder):
    for wrong in ({"rows": "disk"}, {"rows": "mmap", "dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="rows"):
            gsf.SAE.from_pretrained(folder / "sae.safetensors", **wrong)


def test_the_rows_are_not_resident(tmp_path):
    """Anonymous memory of a process that opens and uses it: the screen, not the rows."""
    save(make_sae(1, 256, 16_384, 20).requires_grad_(False), tmp_path / "sae.safetensors")
    script = f"""
import torch, gemmascope_fast as gsf
from gemmascope_fast.testing import make_activations
def anonymous():
    with open('/proc/self/smaps_rollup') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('Anonymous:')) * 1024
x = make_activations(2, 4, 256)
path = {str(tmp_path / "sae.safetensors")!r}
gsf.SAE.from_pretrained(path, rows='mmap')  # packs
small = gsf.JumpReLUSAE(*(torch.zeros(s) for s in ((256, 16), (16, 256), (16,), (256,))), torch.ones(16))
small.requires_grad_(False)(x)
before = anonymous()
sae = gsf.SAE.from_pretrained(path, rows='mmap')
sae(x)
print(anonymous() - before, sae.packed_bytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, resident = map(int, done.stdout.split())
    rows = 16_384 * 256 * 4
    assert grown < resident + rows // 2
