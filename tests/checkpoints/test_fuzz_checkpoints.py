"""Damaged files: a sample of `make fuzz`, and what is accepted is what the formats' own libraries read."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile

import fuzz_checkpoints as fuzz
import fuzz_files as files
import fuzz_forged as files_forged
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import load

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import native, repository
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.cli import main as cli
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.files.arrays import open_npz, open_safetensors

quick = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_a_sample_of_mutated_files():
    cases = os.environ.get("GSF_MUTATIONS", "100")
    command = [sys.executable, "-X", "faulthandler", fuzz.__file__, "--together", "--cases", cases, "--forged", cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(fuzz.FORMATS)
    # mutations that all break, or none, would test little
    assert all(" 0 loaded" not in line and " 0 refused" not in line for line in lines)


def test_the_fuzzer_sees_what_it_looks_for(tmp_path, monkeypatch):
    variants = fuzz.FORMATS["native"]()
    monkeypatch.setattr(fuzz, "load", lambda folder, kind: {}["x"])
    assert "KeyError" in fuzz.run_case("native", 0, variants, tmp_path / "case")

    def nameless(folder, kind):
        raise gsf.CheckpointError("something is wrong")

    monkeypatch.setattr(fuzz, "load", nameless)
    assert "names no file" in fuzz.run_case("native", 0, variants, tmp_path / "case")


GREEDY = """
import sys, tempfile, torch
import fuzz_checkpoints as fuzz
def greedy(folder, kind):
    torch.ones(80 << 20, dtype=torch.uint8)
fuzz.load = greedy
with tempfile.TemporaryDirectory() as folder:
    print(fuzz.run_case("native", 0, fuzz.FORMATS["native"](), fuzz.Path(folder) / "case"))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory to read here")
def test_the_fuzzer_sees_what_takes_memory():
    # in a process of its own: what other tests free meanwhile would hide what this one takes
    env = os.environ | {"PYTHONPATH": os.path.dirname(fuzz.__file__)}
    done = subprocess.run([sys.executable, "-c", GREEDY], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("took 8"), done.stdout


def test_forged_files_are_functions_of_their_number(monkeypatch):
    files_forged.small_packed_files(monkeypatch.setattr)
    for kind in ("screened", "packed", "latents", "gemma-scope-1", "saelens", "native"):
        variants, changed = fuzz.FORMATS[kind](), 0
        for number in range(20):
            made = files_forged.forged(kind, variants[0], random.Random(number))
            changed += made != variants[0]
            assert made == files_forged.forged(kind, variants[0], random.Random(number))
        assert changed > 10


# ---- what is accepted, others accept, and read alike -----------------------------------------------------------


def read_all(entries):
    return {name: entry.read(torch.device("cpu"), entry.dtype) for name, entry in entries.items()}


@quick
@given(st.integers(0, 2**32), st.booleans())
def test_safetensors_that_are_accepted(tmp_path, seed, deep):
    draw, path = random.Random(seed), tmp_path / "x.safetensors"
    healthy = save({"a": np.ones((2, 3), "f4"), "b": np.arange(5, dtype="i8"), "c": np.zeros(1, "f2")}, {"k": "v"})
    path.write_bytes(files.mutate_header(healthy, draw) if deep else files.mutate_bytes(healthy, draw))
    try:
        got = read_all(open_safetensors(path)[0])
    except gsf.CheckpointError:
        return
    want = load(path.read_bytes())
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert same_bytes(got[name], tensor)


@quick
@given(st.integers(0, 2**32), st.booleans(), st.booleans())
def test_npz_that_are_accepted(tmp_path, seed, deep, compressed):
    draw, path = random.Random(seed), tmp_path / "x.npz"
    healthy = files.npz(compressed)
    path.write_bytes(files.mutate_zip(healthy, draw) if deep else files.mutate_bytes(healthy, draw))
    try:
        got = read_all(open_npz(path))
    except gsf.CheckpointError:
        return
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as want:
        assert set(got) == set(want.files)
        for name in want.files:
            assert got[name].numpy().tobytes() == want[name].tobytes()
            assert got[name].shape == want[name].shape


@quick
@given(st.binary(max_size=300), st.sampled_from(["params.npz", "params.safetensors", "sae_weights.safetensors", "x"]))
def test_arbitrary_bytes(tmp_path, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(gsf.CheckpointError, match=str(tmp_path)):
        from_pretrained(path)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 40)),
    st.sampled_from(["sae", "transcoder", "skip_transcoder"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["native", "saelens", "gemma-scope-2", "gemma-scope-1"]),
)
def test_what_is_written_is_read_again(tmp_path_factory, sizes, kind, dtype, to):
    """Of any shape and dtype, through every format that can hold it."""
    (d_in, d_sae, d_out), where = sizes, tmp_path_factory.mktemp("round")
    if kind == "sae":
        d_out = d_in
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    shapes |= {"threshold": (d_sae,)} | ({"W_skip": (d_in, d_out)} if kind == "skip_transcoder" else {})
    g = torch.Generator().manual_seed(d_sae)
    held = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    site = gsf.Site("resid", 3) if kind == "sae" else gsf.Site("mlp_in", 3)
    out = None if kind == "sae" else gsf.Site("mlp", 3)
    made = {c.kind: c for c in (gsf.JumpReLUSAE, gsf.JumpReLUTranscoder, gsf.JumpReLUSkipTranscoder)}[kind]
    sae = made.from_weights(**held, cfg=gsf.SAEConfig(d_in, d_sae, d_out, site, out))
    native.save(sae, where / "first.safetensors")
    if to == "gemma-scope-1" and kind == "skip_transcoder":
        with pytest.raises(gsf.CheckpointError, match="skip"):
            convert(where / "first.safetensors", where / "out", to)
        return
    convert(where / "first.safetensors", where / "out", to)
    told = {"kind": kind} if to == "gemma-scope-1" else {}
    again = from_pretrained(where / "out", dtype=dtype, **told)
    for name, value in held.items():
        assert torch.equal(getattr(again, name), value), name
    if to != "gemma-scope-1":
        assert (again.kind, again.cfg.site, again.cfg.site_out) == (kind, site, out)


# ---- single damages that deserve their own message --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"W_dec": None}, "W_dec"),
        ({"more": np.zeros(3, "f4")}, "more"),
        ({"W_enc": np.zeros((6, 10), "i4")}, "int32|<i4"),
        ({"W_enc": np.zeros((10, 6), "f4")}, "(W_dec|b_enc): expected"),
        ({"W_enc": np.zeros((6, 0), "f4")}, "empty|W_enc"),
        ({"b_dec": np.full(6, np.inf, "f4")}, "b_dec.*finite"),
        ({"W_dec": np.full((10, 6), 1e30, "f8")}, "[Ww]_dec.*finite"),
        ({"threshold": np.full(10, np.nan, "f4")}, "threshold.*finite"),
    ],
)
@pytest.mark.parametrize("name", ["params.npz", "params.safetensors"])
def test_arrays_that_are_wrong(tmp_path, change, said, name):
    arrays = {n: a for n, a in (files.weights() | change).items() if a is not None}
    if name.endswith("npz"):
        np.savez(tmp_path / name, **arrays)
    else:
        (tmp_path / name).write_bytes(save({n.replace("W", "w"): a for n, a in arrays.items()}))
    with pytest.raises(gsf.CheckpointError, match=rf"(?s){name}.*({said})"):
        from_pretrained(tmp_path, dtype="float16")


@pytest.mark.parametrize("name", ["params.npz", "params.safetensors", "own.npz", "own.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_says_so(tmp_path, name, share):
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, **files.weights())
    elif name.startswith("own"):
        native.save(gsf.JumpReLUSAE.from_weights(**{n: torch.from_numpy(a) for n, a in files.weights().items()}), path)
    else:
        path.write_bytes(save({n.replace("W", "w"): a for n, a in files.weights().items()}))
    assert from_pretrained(path).d_sae == 10
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    said = "not a readable npz file" if name.endswith("npz") else "truncated|not a readable safetensors file"
    with pytest.raises(gsf.CheckpointError, match=rf"{name}: ({said})"):
        from_pretrained(path)


@pytest.mark.parametrize("name", ["sae.pt", "sae.safetensors", "params.npz"])
@pytest.mark.parametrize("old", [False, True], ids=["archive", "bare"])
def test_a_pickle_is_never_loaded(tmp_path, name, old):
    path = tmp_path / name
    torch.save({"W_enc": Trap()}, path, _use_new_zipfile_serialization=not old)
    said = {
        "sae.pt": "which is never loaded" if old else "it is not loaded, since that could run code",
        "sae.safetensors": "expected a safetensors file, got an archive or a pickle",
        "params.npz": r"data\.pkl: |not a readable npz",
    }[name]
    with pytest.raises(gsf.CheckpointError, match=said):
        from_pretrained(path)


class Trap:
    """Unpickling this fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_members_that_numpy_does_not_write(tmp_path):
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "params.npz", "w", kind) as archive:
            archive.writestr("W_enc.npy", b"0" * 100)
        with pytest.raises(gsf.CheckpointError, match="stored or deflated"):
            from_pretrained(tmp_path)
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        for i in range(5_000):
            archive.writestr(f"{i}.npy", b"")
    with pytest.raises(gsf.CheckpointError, match="5000 members"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ({"b": [16, 40]}, "begin at byte 24"),  # shares bytes with a
        ({"b": [32, 56]}, "begin at byte 24"),  # leaves some unread
        ({"b": [24, 40]}, "does not fit"),
    ],
)
def test_arrays_that_overlap_or_leave_holes(tmp_path, offsets, said):
    header = {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    header["b"] = {"dtype": "F32", "shape": [6], "data_offsets": offsets["b"]}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(gsf.CheckpointError, match=said):
        open_safetensors(tmp_path / "x.safetensors")


def test_latents_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "latents.safetensors"
    dense = torch.tensor([[0.0, float("nan"), 2.0], [0.0, 0.0, 0.0]])
    latents = gsf.SparseLatents.from_dense(dense)
    latents.save(path)
    assert gsf.SparseLatents.load(path) == latents
    other = gsf.SparseLatents.from_dense(dense + 1)
    with monkeypatch.context() as patched:
        patched.setattr("gemmascope_fast.files.write._bytes", lambda block: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.save(path)
    assert gsf.SparseLatents.load(path) == latents
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- places ----------------------------------------------------------------------------------------------------


def hub_errors():
    """What the hub's client raises: made as it makes them, whichever HTTP library is beneath."""
    from huggingface_hub import errors

    base = next(
        c for c in errors.HfHubHTTPError.__mro__ if c.__module__.split(".")[0] in ("httpx", "httpx2", "requests")
    )
    library = sys.modules[base.__module__.split(".")[0]]
    no_network = getattr(library, "ConnectError", getattr(library, "ConnectionError", None))
    yield no_network("name or service not known")
    yield errors.OfflineModeIsEnabled("offline")
    yield errors.LocalEntryNotFoundError("not in the cache")
    yield PermissionError("the cache cannot be written")
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    missing.args = ("404: no such repository",)
    yield missing


def test_a_repository_that_is_not_in_reach(tmp_path, monkeypatch, capsys):
    def asks(error):
        def fail(*_args, **_kwargs):
            raise error

        return fail

    errors = list(hub_errors())
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_args, **_options: None)  # it answers at first
    for error in errors:
        monkeypatch.setattr("huggingface_hub.snapshot_download", asks(error))
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", asks(error))
        for call in (
            lambda: from_pretrained("google/nothing", "layer_1"),
            lambda: from_pretrained("google/nothing"),
            lambda: repository.repository_files("google/nothing"),
            lambda: gsf.Bank("google/nothing"),
        ):
            with pytest.raises(gsf.CheckpointError, match="google/nothing"):
                call()
        assert cli.main(["ls", "google/nothing"]) == 1
        assert "reach" in capsys.readouterr().err
        assert cli.main(["convert", "google/nothing", str(tmp_path / "out"), "--to", "native"]) == 1
    assert not list(tmp_path.iterdir())


def test_names_that_no_repository_can_have():
    for name in ("a/b/c", "..", "/no/such/place", "a b", ""):
        with pytest.raises(gsf.CheckpointError):
            from_pretrained(name or "\0", "x")


def test_special_files_and_folders_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "params.npz")  # opening it would wait for a writer
    with pytest.raises(gsf.CheckpointError):
        from_pretrained(tmp_path)
    with pytest.raises(gsf.CheckpointError):
        from_pretrained(tmp_path / "params.npz")
    (tmp_path / "folder" / "params.safetensors").mkdir(parents=True)
    with pytest.raises(gsf.CheckpointError):
        from_pretrained(tmp_path / "folder")
