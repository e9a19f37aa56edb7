"""`make gpu`: what it requires to start, and how it runs its steps, with scripts in place of a device's tools."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(python, folder, **environment):
    command = [str(ROOT / "scripts" / "gpu.sh"), str(python), str(folder)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: make gpu would run")
def test_what_is_missing_is_said(tmp_path):
    """Here: a device, and the CUDA extension, which this environment's torch cannot have."""
    done = run(sys.executable, tmp_path)
    assert done.returncode == 2
    assert "expected a CUDA device" in done.stderr
    assert "gemmascope_fast._C_cuda is missing" in done.stderr
    assert "gemmascope_fast._C is missing" not in done.stderr
    assert "gemmascope_fast " in done.stdout  # where the package lies
    assert not list(tmp_path.iterdir())


LOGS = """#!/bin/sh
echo "$(pwd) ${PYTORCH_NO_CUDA_MEMORY_CACHING:-cached} $0 $*" >>LOG
case "$0 $*" in *FAILS*) exit 1;; esac
"""


@pytest.fixture
def tools(tmp_path):
    """An interpreter and a sanitizer that write down how they were called."""
    log = tmp_path / "log"
    for name in ("python", "compute-sanitizer"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(LOGS.replace("LOG", str(log)))
        path.chmod(0o755)
    return tmp_path / "bin", log


def test_steps_run_outside_the_source_tree(tools, tmp_path):
    folder, log = tools
    done = run(folder / "python", tmp_path, PATH=f"{folder}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    tests = [line for line in lines if "pytest tests/device" in line]
    assert len(tests) == 4
    for line in lines:
        assert not Path(line.split()[0]).is_relative_to(ROOT), line
        assert (" 1 " in line) == ("compute-sanitizer" in line), line
    with tarfile.open(tmp_path / "gemmascope-fast-gpu.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"commit.txt", "package.txt", "failed.txt", "tests.txt", "sanitizer-racecheck.txt"} <= names


def test_a_step_that_fails_is_named(tools, tmp_path):
    folder, log = tools
    (folder / "python").write_text(LOGS.replace("LOG", str(log)).replace("FAILS", "benchmarks/gpu.py"))
    done = run(folder / "python", tmp_path, PATH=f"{folder}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "failed steps: benchmark" in done.stdout
