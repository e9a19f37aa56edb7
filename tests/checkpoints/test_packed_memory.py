"""Memory and disk with mapped rows: what is resident, what is read from the disk, too little space."""

import ctypes
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import packed
from gemmascope_fast.checkpoints.loading import open_checkpoint
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_activations, make_sae


@pytest.fixture
def folder(tmp_path):
    save(make_sae(1, 200, 902, 20), tmp_path / "sae.safetensors")
    return tmp_path


def test_the_mapping_is_not_counted_as_memory(folder):
    """Without NORESERVE ("nr") a private writable mapping wider than memory is refused."""
    sae = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    after = Path("/proc/self/smaps").read_text().split(str(sae.rows.path))[1]
    flags = next(line for line in after.splitlines() if line.startswith("VmFlags:")).split()
    assert "nr" in flags
    assert "ac" not in flags


def cached_pages(tensor):
    """Which pages of a mapped tensor are in memory."""
    base = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(tensor.data_ptr() + tensor.numel() * 4 - base) // mmap.PAGESIZE)
    there = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(base), ctypes.c_size_t(pages * mmap.PAGESIZE), there) == 0
    return np.frombuffer(there, np.uint8) & 1


def pages_of_rows(tensor, rows):
    first = (tensor.data_ptr() % mmap.PAGESIZE + rows * tensor.shape[1] * 4) // mmap.PAGESIZE
    last = (tensor.data_ptr() % mmap.PAGESIZE + (rows + 1) * tensor.shape[1] * 4 - 1) // mmap.PAGESIZE
    return {int(p) for f, l in zip(first, last, strict=True) for p in range(f, l + 1)}


def test_only_rows_that_are_needed_come_from_the_disk(tmp_path):
    """Announced pages are read alone; a page fault that nobody announced brings its neighbours too."""
    save(make_sae(1, 512, 16_384, 20).requires_grad_(False), tmp_path / "sae.safetensors")
    packed.pack(open_checkpoint(tmp_path / "sae.safetensors"), tmp_path / "sae.safetensors.packed")
    sae, x = gsf.SAE.from_pretrained(tmp_path / "sae.safetensors", rows="mmap"), make_activations(2, 3, 512)
    for name in ("sae.safetensors", "sae.safetensors.packed"):
        with open(tmp_path / name, "rb") as file:  # opening reads ahead
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows, decoder = sae.W_enc.detach().t(), sae.W_dec.detach()
    if cached_pages(rows).any() or cached_pages(decoder).any():
        pytest.skip("this file system keeps its files in memory")
    latents = sae.encode_sparse(x)
    fired = np.unique(latents.col_indices.numpy())
    there = set(np.flatnonzero(cached_pages(rows)).tolist())
    assert pages_of_rows(rows, fired) <= there
    assert len(there) < 1.2 * len(pages_of_rows(rows, fired)) + 4
    sae.decode(latents)
    assert set(np.flatnonzero(cached_pages(decoder)).tolist()) == pages_of_rows(decoder, fired)


def test_a_file_truncated_after_opening_raises(folder):
    mapped = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    x = make_activations(2, 3, 200)
    latents = mapped.encode_sparse(x)
    os.truncate(folder / "sae.safetensors.packed", 1 << 20)
    with pytest.raises(gsf.CheckpointError, match="packed: truncated to"):
        mapped.encode_sparse(x)
    with pytest.raises(gsf.CheckpointError, match="packed: truncated to"):
        mapped.decode(latents)


def test_too_little_room(folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(gsf.CheckpointError, match="disk"):
        gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    # what an interrupted packing has on the disk is not needed again
    path = folder / "there"
    path.write_bytes(bytes(1 << 20))
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        usage.free = packed.SPARE_BYTES
        packed._make_room(path, file, 1 << 20)
        with pytest.raises(gsf.CheckpointError, match="disk"):
            packed._make_room(path, file, 2 << 20)


def test_the_rows_are_not_resident(tmp_path):
    """Anonymous memory of a process that opens and uses it: the screen, not the rows."""
    save(make_sae(1, 256, 16_384, 20).requires_grad_(False), tmp_path / "sae.safetensors")
    script = f"""
import torch, gemmascope_fast as gsf
from gemmascope_fast.dev.testing import make_activations
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


def test_the_benchmark_of_wide_saes(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "wide_sae.py"
    sizes = ["--d-sae", "16384", "--d-in", "256", "--dtype", "float32", "--folder", str(tmp_path), "--compare"]
    done = subprocess.run([sys.executable, str(script), *sizes], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["equal"] is True
    assert [row["tokens"] for row in report["runs"]] == [1, 16, 64]
    for row in report["runs"]:
        assert 10 < row["l0"] < 200
        assert row["l0"] <= row["rows_read_per_token"] < 2 * row["l0"] + 1
        assert row["encode_ms"] > 0
    assert 1.5 * 4 * 256 * 16384 < report["files"]["packed"] < 2 * 4 * 256 * 16384
    assert report["files"]["checkpoint"] > 2 * 4 * 256 * 16384
    assert report["memory"]["anonymous_peak"] > 0
