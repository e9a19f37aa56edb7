"""`make gpu` on a machine without a device says so and writes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: make gpu would run")
def test_no_device_is_said():
    archive = ROOT / "gemmascope-fast-gpu.tar.gz"
    before = archive.exists()  # of an earlier run
    done = subprocess.run([ROOT / "scripts" / "gpu.sh", sys.executable], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected a CUDA device" in done.stderr
    assert archive.exists() == before
