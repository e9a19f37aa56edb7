"""rows="mmap": the packed file, its answers, and what can go wrong with it."""

import copy
import ctypes
import json
import mmap
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gemmascope_fast as gsf
from gemmascope_fast import packed
from gemmascope_fast.bank.store import copied_to
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.checkpoints.write import write_npz, write_safetensors
from gemmascope_fast.loading import open_checkpoint
from gemmascope_fast.mapped import verify
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
    resident = gsf.SAE.from_pretrained(folder).prepare(directions=0)
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
    panel, calls = packed._panel, []

    def fails_at_the_fourth(checkpoint, start, *rest):
        calls.append(start)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return panel(checkpoint, start, *rest)

    monkeypatch.setattr(packed, "_panel", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        packed.pack(checkpoint, folder / "parts.packed")
    assert not (folder / "parts.packed").exists()
    told = told_progress(monkeypatch)
    assert packed.pack(checkpoint, folder / "parts.packed").read_bytes() == whole
    assert calls == [0, 128, 256, 384, 384, 512, 640, 768, 896]
    assert sum(told["bytes"]) == told["total"]  # what was done before counts
    assert sorted(p.name for p in folder.iterdir()) == ["parts.packed", "sae.safetensors", "whole.packed"]


def told_progress(monkeypatch):
    """What the bar of a packing is told."""
    told = {"bytes": []}

    @contextmanager
    def bar(total, _name, _shown):
        told["total"] = total
        yield told["bytes"].append

    monkeypatch.setattr(packed, "progress_bar", bar)
    return told


def test_the_bar_ends_at_its_end(folder, monkeypatch):
    small_panels(monkeypatch)
    told = told_progress(monkeypatch)
    path = packed.pack(open_checkpoint(folder / "sae.safetensors"), folder / "sae.packed")
    assert sum(told["bytes"]) == told["total"] == path.stat().st_size - packed.HEADER
    assert len(told["bytes"]) > 8


def test_two_writers_do_not_meet(folder):
    checkpoint = open_checkpoint(folder / "sae.safetensors")
    with (
        packed._locked(folder / ".sae.packed.partial"),
        pytest.raises(gsf.CheckpointError, match="another process"),
    ):
        packed.pack(checkpoint, folder / "sae.packed")


def test_the_lock_is_of_the_file_that_has_the_name(folder, monkeypatch):
    """A writer that waited for the lock of a file that has got its last name by then begins another."""
    import fcntl

    partial, lock = folder / "one.partial", fcntl.flock

    def finished_in_between(file, how):
        lock(file, how)
        monkeypatch.setattr(fcntl, "flock", lock)
        os.replace(partial, folder / "one.packed")

    monkeypatch.setattr(fcntl, "flock", finished_in_between)
    with packed._locked(partial) as file:
        assert os.path.samestat(os.fstat(file.fileno()), partial.stat())


# ---- what is read of the checkpoint -------------------------------------------------------------------


def test_each_byte_of_the_checkpoint_is_read_once(folder, monkeypatch):
    small_panels(monkeypatch)
    for name, times in (("sae.safetensors", 1), ("params.npz", 2)):  # npz: its checksums too
        checkpoint = open_checkpoint(folder / "sae.safetensors")
        if name == "params.npz":
            write_npz(folder / name, checkpoint.arrays)
            checkpoint = open_checkpoint(folder / name)
        read = {key: [] for key in checkpoint.arrays}
        checkpoint.arrays = {k: replace(e, seen=read[k].append) for k, e in checkpoint.arrays.items()}
        packed.pack(checkpoint, folder / f"{name}.packed")
        for key in ("W_enc", "W_dec"):
            assert sum(read[key]) == times * checkpoint.arrays[key].nbytes, (name, key)


def compressed(folder):
    arrays = load_file(folder / "sae.safetensors")
    np.savez_compressed(folder / "params.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder / "params.npz"


def stored(folder, alignment):
    """An npz whose W_dec begins at a byte of this remainder by four, as the length of a name before it makes it."""
    arrays = {name: array.numpy() for name, array in load_file(folder / "sae.safetensors").items()}
    for length in range(1, 5):
        with zipfile.ZipFile(folder / "params.npz", "w") as archive:
            for name, array in sorted(arrays.items(), key=lambda item: item[0] == "W_dec"):
                member = zipfile.ZipInfo(f"{name}.npy")
                member.extra = struct.pack("<HH", 0xCAFE, length) + bytes(length) if name == "b_enc" else b""
                with archive.open(member, "w") as file:
                    np.lib.format.write_array(file, array)
        if open_checkpoint(folder / "params.npz").arrays["W_dec"].at % 4 == alignment:
            return folder / "params.npz"
    raise AssertionError


def mapped_files():
    return {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if line[-1] != "0"}


@pytest.mark.parametrize("how", ["safetensors", "stored, aligned", "stored, unaligned", "compressed"])
def test_the_decoder_is_mapped_where_it_lies(folder, monkeypatch, how):
    """In a safetensors file and in an npz's stored member; a member at an odd byte or compressed is copied."""
    small_panels(monkeypatch)
    make = {"stored, aligned": lambda: stored(folder, 0), "stored, unaligned": lambda: stored(folder, 3)}
    make |= {"safetensors": lambda: folder / "sae.safetensors", "compressed": lambda: compressed(folder)}
    path, x = make[how](), make_activations(2, 9, 200)
    sae, whole = gsf.SAE.from_pretrained(path, rows="mmap", kind="sae"), load_file(folder / "sae.safetensors")
    there = how in ("safetensors", "stored, aligned")
    file = path.with_name(path.name + ".packed")
    assert (path in mapped_files()) == there
    assert file in mapped_files()
    assert ("W_dec" in load_file(file)) == (not there)
    assert file.stat().st_size < packed.HEADER + (2 if there else 3) * 4 * 902 * 200
    assert same_bytes(sae.W_enc.detach().contiguous(), whole["W_enc"])
    assert same_bytes(sae.W_dec.detach(), whole["W_dec"])
    assert sae._mapped.holds(sae.W_dec)
    assert same_bytes(sae(x), gsf.SAE.from_pretrained(folder / "sae.safetensors")(x))
    verify(file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_decoder_of_another_dtype_is_copied(folder, dtype):
    sae = gsf.SAE.from_pretrained(folder / "sae.safetensors")
    write_safetensors(folder / "params.safetensors", dict(sae.state_dict()), {}, dtype)
    mapped = gsf.SAE.from_pretrained(folder / "params.safetensors", rows="mmap", kind="sae")
    assert folder / "params.safetensors" not in mapped_files()
    assert same_bytes(mapped.W_dec.detach(), sae.W_dec.detach().to(dtype).float())


def test_a_checkpoint_that_is_written_to_while_it_is_mapped(folder):
    """Its decoder would not be that of the rows any more."""
    path, x = folder / "sae.safetensors", make_activations(2, 3, 200)
    mapped = gsf.SAE.from_pretrained(path, rows="mmap")
    latents = mapped.encode_sparse(x)
    flip(path, path.stat().st_size - 100)
    for use in (lambda: mapped.encode_sparse(x), lambda: mapped.decode(latents), lambda: copy.deepcopy(mapped)(x)):
        with pytest.raises(gsf.CheckpointError, match=r"sae\.safetensors: written to since it was opened"):
            use()
    assert same_bytes(gsf.SAE.from_pretrained(path, rows="mmap")(x), gsf.SAE.from_pretrained(path)(x))
    os.truncate(path, 2000)
    with pytest.raises(gsf.CheckpointError, match=r"sae\.safetensors: truncated to"):
        mapped.decode(latents)
    with pytest.raises(gsf.CheckpointError, match=r"W_dec lies in .*sae\.safetensors, which is not there or another"):
        verify(path.with_name(path.name + ".packed"))


def test_npz(folder, monkeypatch):
    small_panels(monkeypatch)
    whole = load_file(folder / "sae.safetensors")
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in whole.items()})
    sae = gsf.SAE.from_pretrained(folder / "params.npz", rows="mmap", kind="sae")
    assert same_bytes(sae.W_enc.detach().contiguous(), whole["W_enc"])
    assert same_bytes(sae.W_dec.detach(), whole["W_dec"])


def test_damage_that_a_checksum_of_the_checkpoint_shows(folder):
    checkpoint = open_checkpoint(folder / "sae.safetensors")
    write_npz(folder / "params.npz", checkpoint.arrays)
    flip(folder / "params.npz", open_checkpoint(folder / "params.npz").arrays["W_enc"].at + 5000)
    with pytest.raises(gsf.CheckpointError, match=r"W_enc.*CRC"):
        gsf.SAE.from_pretrained(folder / "params.npz", rows="mmap", kind="sae")
    assert not (folder / "params.npz.packed").exists()


# ---- damage -------------------------------------------------------------------------------------------


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


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
    assert twin._mapped.holds(twin.W_enc)
    assert twin._mapped.holds(twin.W_dec)
    assert not sae._mapped.holds(twin.W_enc)
    assert twin._prepared.screen is sae._prepared.screen
    assert not twin._prepared.stale()
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
    assert moved._mapped is None
    assert same_bytes(moved(x), sae(x))


def test_a_cast_makes_it_resident(folder):
    sae, x = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap"), make_activations(2, 9, 200)
    assert sae.to("cpu")._mapped is not None
    cast = sae.to(torch.bfloat16)
    os.truncate(folder / "sae.safetensors.packed", 0)
    assert cast.encode_sparse(x) == pickle.loads(pickle.dumps(cast)).encode_sparse(x, screen=False)


def test_pickling_is_refused(folder):
    sae = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(sae)


# ---- the disk -----------------------------------------------------------------------------------------


def test_the_mapping_is_not_counted_as_memory(folder):
    """Without NORESERVE ("nr") a private writable mapping wider than memory is refused."""
    sae = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    after = Path("/proc/self/smaps").read_text().split(str(sae._mapped.path))[1]
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


def test_the_benchmark_of_wide_saes(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "wide_sae.py"
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
