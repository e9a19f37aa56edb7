"""What setup.py builds: if one extension fails the others are kept, and nvcc is asked which architectures it knows."""

import os
import runpy
import shutil
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = 'extern "C" void* PyInit_{name}() {{ return nullptr; }}\n'


@pytest.fixture
def made(monkeypatch):
    """setup.py's functions and what it hands to setuptools."""
    passed = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
    monkeypatch.delenv("GSF_REQUIRE_EXT", raising=False)
    monkeypatch.setenv("CUDA_HOME", os.environ.get("CUDA_HOME", ""))
    monkeypatch.setattr(torch.version, "cuda", None)
    return runpy.run_path(str(ROOT / "setup.py")), passed


def build(made, folder, monkeypatch, names):
    """The extensions of these names, of which one called `broken` has no valid source; those that came out."""
    for name in names:
        source = folder / f"{name.rpartition('.')[2]}.cpp"
        source.write_text("this is no C++" if "broken" in name else EXTENSION.format(name=source.stem))
    monkeypatch.chdir(folder)
    extensions = [Extension(name, [f"{name.rpartition('.')[2]}.cpp"], language="c++") for name in names]
    distribution = Distribution({"name": "x", "version": "0", "ext_modules": extensions})
    command = made[1]["cmdclass"]["build_ext"](distribution)
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.finalize_options()
    command.run()
    return sorted(p.name.split(".")[0] for p in (folder / "lib").rglob("*.so")), command


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["_C", "broken_cuda"], ["_C"]),
        (["broken", "_C_cuda"], ["_C_cuda"]),
        (["broken", "broken_cuda"], []),
        (["_C", "_C_cuda"], ["_C", "_C_cuda"]),
    ],
)
def test_an_extension_that_fails_leaves_the_other(made, tmp_path, monkeypatch, capfd, names, left):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    found, command = build(made, tmp_path, monkeypatch, names)
    assert found == left
    assert [e.name for e in command.extensions] == left
    said = capfd.readouterr().out
    assert ("the CUDA kernels were not built: " in said) == ("broken_cuda" in names)
    assert ("the native kernels were not built: " in said) == ("broken" in names)


@pytest.mark.parametrize(("required", "broken"), [("GSF_REQUIRE_EXT", "broken"), ("GSF_REQUIRE_CUDA", "broken_cuda")])
def test_what_is_required_is_an_error(made, tmp_path, monkeypatch, required, broken):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(required, "1")
    with pytest.raises(Exception, match="Error compiling"):
        build(made, tmp_path, monkeypatch, ["_C", broken])


@pytest.mark.parametrize(
    ("known", "want"),
    [
        (["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"], "8.0;8.6;9.0;10.0;12.0+PTX"),
        (["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"], "8.0;8.6;9.0+PTX"),  # CUDA 12.4
        (["sm_50"], None),
    ],
)
def test_nvcc_is_asked_which_architectures_it_knows(made, tmp_path, known, want):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n" + "".join(f"echo {name}\n" for name in known))
    nvcc.chmod(0o755)
    if want is None:
        with pytest.raises(RuntimeError, match="nvcc: expected one that compiles for one of"):
            made[0]["architectures"](str(tmp_path))
    else:
        assert made[0]["architectures"](str(tmp_path)) == want
