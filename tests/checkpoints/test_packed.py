"""The packed file of mapped rows: the same results, written once, and which parts of the checkpoint are read."""

import copy
import os
import struct
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_files import compressed, flip, small_panels
from safetensors.torch import load_file

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import packed
from gemmascope_fast.checkpoints.loading import open_checkpoint
from gemmascope_fast.checkpoints.mapped import verify
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes
from gemmascope_fast.files.write import write_npz, write_safetensors
from gemmascope_fast.sae.screen import Screen


@pytest.fixture
def folder(tmp_path):
    save(make_sae(1, 200, 902, 20), tmp_path / "sae.safetensors")
    return tmp_path


def test_answers_are_those_of_the_resident_sae(folder, monkeypatch):
    small_panels(monkeypatch)
    resident, x = gsf.SAE.from_pretrained(folder), make_activations(2, 9, 200)
    mapped = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    assert not mapped.rows.in_memory
    for T in (0, 1, 9):
        latents = mapped.encode_sparse(x[:T])
        assert latents == resident.encode_sparse(x[:T], screen=False)
        assert latents == mapped.encode_sparse(x[:T], screen=False)
        assert same_bytes(mapped.decode(latents), resident.decode(latents))
    assert same_bytes(mapped(x), resident(x))
    assert same_bytes(mapped.W_enc, resident.W_enc)


def test_the_screen_is_the_one_that_is_built_in_memory(folder, monkeypatch):
    small_panels(monkeypatch)
    resident = gsf.SAE.from_pretrained(folder)
    mapped = gsf.SAE.from_pretrained(folder / "sae.safetensors", rows="mmap")
    built = Screen.build(resident.W_enc, resident.b_enc, resident.threshold, centre=resident.b_dec)
    assert mapped.screen_cache.screen.tensors().keys() == built.tensors().keys()
    for name, tensor in built.tensors().items():
        assert torch.equal(mapped.screen_cache.screen.tensors()[name], tensor), name


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
    assert sae.rows.holds(sae.W_dec)
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
    with pytest.raises(gsf.CheckpointError, match=r"W_dec is in .*sae\.safetensors, which is missing or was changed"):
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
