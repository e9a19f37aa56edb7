"""Starts tests of the GPU kernels in processes where compiled kernels run in the PTX interpreter (tests/ptx).

Here sm_80, without the tests that LEFT_OUT names; `make gpu-check` runs all of tests/interpreter, also for sm_90, and
removes every barrier in turn.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHOLE = os.environ.get("GSF_GPU_CHECK") == "1"
# Nearly all the time goes into compiling.  Attach, backends and layouts run kernels that other tests compile too; of
# the planes' and slices' widths and of the 16-bit dtypes some are enough here.
LEFT_OUT = [
    "test_attach.py",
    "test_backend.py",
    "test_layouts.py",
    "test_planes.py::test_every_code",
    *(f"test_planes.py::test_odd_shapes[{stored}-" for stored in (1, 2, 7, 8)),
    *(f"test_matryoshka.py::test_prefix_slices[33-200-2-96-{bits}]" for bits in range(1, 9)),
    *(f"test_matryoshka.py::test_prefix_slices[50-70-3-32-{bits}]" for bits in (3, 5, 6, 7)),
    *(f"test_encode.py::test_equals_the_native_kernel[dtype2-shape{i}]" for i in range(6)),
    *(f"test_encode_tensor.py::test_within_the_tolerance[dtype2-shape{i}]" for i in range(2)),
    *(f"test_decode.py::test_decode_equals_the_native_kernel[dtype2-shape{i}]" for i in range(5)),
    *(f"test_decode.py::test_sampled_dot_equals_the_native_kernel[dtype2-shape{i}]" for i in range(3)),
]


def run(plugin, arguments, arch=80, **environment):
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "GSF_PTX": "1", "GSF_PTX_ARCH": str(arch),
        "PYTHONPATH": f"{ROOT / 'tests' / 'ptx'}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT}", **environment,
    }  # fmt: skip
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


def need_nvcc():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 90] if WHOLE else [80])
def test_triton_kernels(arch):
    chosen = [] if WHOLE else [f"--deselect=tests/interpreter/{name}" for name in LEFT_OUT]
    run("ptx_triton_plugin", ["tests/interpreter", "tests/ptx/compiled", *chosen], arch)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 90] if WHOLE else [80])
def test_cuda_kernels(arch):
    need_nvcc()
    run("ptx_cuda_plugin", ["tests/backends/test_cuda_host.py", "tests/backends/test_cuda_host_matryoshka.py"], arch)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_removed_barrier_fence_and_wait_is_noticed(arch):
    if not WHOLE:
        pytest.skip("in make gpu-check")
    command = [sys.executable, str(ROOT / "tests" / "ptx" / "mutations.py"), str(arch)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
