"""Malicious files: devices and FIFOs, absurd sizes, zip bombs; and limits of what loading reads."""

import io
import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from checkpoint_files import weights, write_gemma_scope_2, write_saelens
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.mapped import verify
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_sae
from gemmascope_fast.files import arrays, regular
from gemmascope_fast.files.arrays import open_npz, open_safetensors

JUMPRELU = {"architecture": "jumprelu", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}

# ---- what kind of file it is -----------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path is at most 108 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def link_to_fifo(path):
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


SPECIAL = {"a FIFO": fifo, "a character device": device, "a socket": unix_socket, "link": link_to_fifo}


FILES = ["params.npz", "params.safetensors", "sae.safetensors", "x.safetensors", "cfg.json", "config.json", "packed"]
FILES += ["params_layer_0.safetensors", "latents", "hparams.npz"]


@pytest.mark.parametrize("made", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_are_opened(tmp_path, name, made):
    load = from_pretrained
    place = tmp_path / name
    if name == "cfg.json":
        write_saelens(tmp_path, JUMPRELU, weights())
        place.unlink()
    elif name == "config.json":
        write_gemma_scope_2(tmp_path)
    elif name == "packed":
        save(make_sae(1, 64, 70, 3), tmp_path / "sae.safetensors")
        place = tmp_path / "sae.safetensors.packed"
        load = lambda folder: from_pretrained(folder, rows="mmap")  # noqa: E731
    SPECIAL[made](place)
    said = "a FIFO" if made == "link" else made
    calls = [lambda: load(tmp_path), lambda: load(place)] if name != "packed" else [lambda: load(tmp_path)]
    if name == "packed":
        calls += [lambda: verify(place)]
    if name == "latents":
        calls = [lambda: gsf.SparseLatents.load(place)]
    start = time.monotonic()
    for call in calls:
        with pytest.raises(gsf.CheckpointError, match=str(tmp_path)) as caught:
            call()
    assert time.monotonic() - start < 20
    if name not in ("x.safetensors", "hparams.npz"):
        assert said in str(caught.value) or "outside of" in str(caught.value)


def test_links_to_regular_files_are_followed(tmp_path):
    write_saelens(tmp_path / "real", JUMPRELU, weights())
    (tmp_path / "there").mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "real" / name).rename(tmp_path / "there" / f"blob-{name}")
        (tmp_path / "there" / name).symlink_to(f"blob-{name}")
    assert from_pretrained(tmp_path / "there").d_sae == 10


def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(regular, "check_regular", lambda path: 0)  # it was a file when it was looked at
    with pytest.raises(gsf.CheckpointError, match="regular file"):
        regular.open_regular(tmp_path / "x")


def test_interrupted_packing_over_special_files(tmp_path):
    save(make_sae(1, 64, 70, 3), tmp_path / "sae.safetensors")
    os.mkfifo(tmp_path / ".sae.safetensors.packed.partial")
    with pytest.raises(gsf.CheckpointError, match=r"partial: expected a regular file, got a FIFO"):
        from_pretrained(tmp_path, rows="mmap")
    (tmp_path / ".sae.safetensors.packed.partial").unlink()
    os.mkfifo(tmp_path / ".sae.safetensors.packed.partial.json")
    assert from_pretrained(tmp_path, rows="mmap").d_sae == 70


# ---- sizes -----------------------------------------------------------------------------------------------------


def header_file(path, header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    return path


def item(shape, begin=0, end=4):
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


ABSURD = {
    "300,000 sizes": item([2**62] * 100_000),
    "nine sizes": item([1] * 9),
    "a huge size": item([2**63]),
    "a negative size": item([-1, -1]),
    "a size that is true": item([True]),
    "a size that is 1.0": item([1.0]),
    "a text": item("1"),
    "an object": item({"1": 1}),
    "offsets of three": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}},
    "offsets that are texts": item([1], "0", "4"),
    "a negative offset": item([1], -4, 0),
    "an item that is a list": {"a": [1, 2]},
    "a dtype that is a list": {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
    "lists": b"[" * 1000,
    "many lists": b'{"a":[' + b"[]," * 300_000 + b"[]]}",
    "many names": json.dumps({str(i): 0 for i in range(50_000)}).encode(),
    "long numbers": b'{"a":[' + b",".join([b"9" * 4000] * 200) + b"]}",
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_headers_cost_nothing(tmp_path, name):
    path = header_file(tmp_path / "x.safetensors", ABSURD[name])
    start = time.process_time()
    with pytest.raises(gsf.CheckpointError, match=r"x\.safetensors") as caught:
        open_safetensors(path)
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 1000


def test_two_megabytes_of_shapes(tmp_path):
    """What cost half a minute: shapes of many huge sizes, whose product was computed."""
    shapes = {f"a{i}": item([2**62] * 6500)["a"] for i in range(15)}
    path = header_file(tmp_path / "x.safetensors", shapes)
    assert path.stat().st_size > 1_900_000
    start = time.process_time()
    with pytest.raises(gsf.CheckpointError, match="header of at most"):
        open_safetensors(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["cfg.json", "config.json"])
def test_a_config_is_bounded_before_it_is_parsed(tmp_path, name):
    if name == "cfg.json":
        write_saelens(tmp_path, JUMPRELU, weights())
    else:
        write_gemma_scope_2(tmp_path)
    with open(tmp_path / name, "w") as file:
        file.truncate(100 << 30)  # sparse: nothing is on the disk
    with pytest.raises(gsf.CheckpointError, match=rf"{name}: expected at most"):
        from_pretrained(tmp_path)


def test_a_zip_directory_is_bounded_before_it_is_parsed(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}{'x' * 60}", b"")
    start = time.process_time()
    with pytest.raises(gsf.CheckpointError, match=r"params\.npz: .*a directory of more than"):
        open_npz(tmp_path / "params.npz")
    assert time.process_time() - start < 1


def npy(shape="(4,)", version=b"\x01\x00", length=None):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(64)
    size = len(text) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version == b"\x01\x00" else 4, "little") + text


@pytest.mark.parametrize(
    "shape", ["(" + "1," * 4000 + ")", "(-1, -4)", "(True,)", "(9" + "9" * 300 + ",)", "4", "(4.0,)"]
)
def test_npz_shapes(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy(shape) + bytes(16))
    start = time.process_time()
    with pytest.raises(gsf.CheckpointError, match=r"params\.npz"):
        open_npz(tmp_path / "params.npz")
    assert time.process_time() - start < 1


def test_an_npy_header_of_gigabytes_is_not_read(tmp_path):
    """numpy would read as much as the header's own length says before it looks at it."""
    with (
        zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w") as member,
    ):
        member.write(npy(version=b"\x02\x00", length=60 << 20))
        for _ in range(60):
            member.write(b" " * (1 << 20))
    (peak,) = peaks_of([f"open_npz(Path({str(tmp_path / 'params.npz')!r}))"])
    assert peak < 20 << 20


def test_many_small_bombs_are_one(tmp_path):
    """Each array below the limit of one, together above it."""
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abcdefghij":
            body = io.BytesIO()
            np.save(body, np.zeros(2 << 20, "f4"))
            archive.writestr(f"{name}.npy", body.getvalue())
    with pytest.raises(gsf.CheckpointError, match="zip bomb"):
        open_npz(tmp_path / "params.npz")


def peaks_of(statements):
    """Bytes that each statement, which may raise CheckpointError, adds for a while to what an interpreter has."""
    code = """
import ctypes, os, sys, torch
from pathlib import Path
import gemmascope_fast as gsf
from gemmascope_fast.files.arrays import open_npz
from gemmascope_fast.checkpoints.loading import from_pretrained
torch.set_num_threads(1)
def of(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) << 10
from_pretrained("demo")  # what is imported and allocated once
ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed hides what is taken
for statement in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is
    before = of("VmRSS")
    try:
        eval(statement)
    except gsf.CheckpointError:
        pass
    print(of("VmHWM") - before, flush=True)
    os._exit(0)
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not reset a process's peak")
    done = subprocess.run([sys.executable, "-c", code, *statements], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def test_loading_takes_twice_the_file_at_most(tmp_path):
    """Matrices of few long rows too, of which one is more than a block."""
    folders = []
    for dtype in ("f4", "f2"):
        for shape in ((4, 2 << 20), (640, 8192), (5000, 1000)):
            held = {n: a.astype(dtype) for n, a in weights(*shape, shape[0]).items()}
            folders.append(tmp_path / f"{dtype} {shape}")
            folders[-1].mkdir()
            save_file({n.replace("W", "w"): a for n, a in held.items()}, folders[-1] / "params.safetensors")
    peaks = peaks_of([f"from_pretrained({str(folder)!r})" for folder in folders])
    for folder, peak in zip(folders, peaks, strict=True):
        size = (folder / "params.safetensors").stat().st_size
        assert size < peak < 2 * size + size // 4 + (32 << 20), folder  # buffers, and what the allocator keeps


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 1000), (1, 777), (7, 129), (2, 256)])
def test_long_rows_are_read_in_parts(tmp_path, monkeypatch, shape, transposed):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 512)
    want = np.arange(math.prod(shape), dtype="f4").reshape(shape)
    save_file({"a": want}, tmp_path / "x.safetensors")
    entry = open_safetensors(tmp_path / "x.safetensors")[0]["a"]
    seen = []
    monkeypatch.setattr(arrays.Entry, "_read_wide", spied(arrays.Entry._read_wide, seen))
    got = entry.read(torch.device("cpu"), torch.float32, transposed=transposed)
    assert np.array_equal(got.numpy(), want)
    assert np.array_equal(entry.transposed().read(torch.device("cpu"), torch.float32).numpy(), want.T)
    assert len(seen) == (2 if 4 * shape[1] > 512 else 0)


def spied(function, seen):
    def call(*args):
        seen.append(args)
        return function(*args)

    return call
