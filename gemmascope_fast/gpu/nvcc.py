"""The CUDA C++ sources through nvcc, for every NVIDIA architecture, gated as the Triton kernels are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import BackendError
from gemmascope_fast.gpu.aot import Binary
from gemmascope_fast.gpu.devices import ARCHS, occupancy

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
# No contraction: the order and the rounding of every sum is part of the contract.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "--cubin")


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not list(SOURCES.glob("cuda/*.cu")):
        return "the CUDA sources are not beside the package (they are in the repository and the sdist)"
    return None if shutil.which("nvcc") else "nvcc is not installed"


def rows(archs: list[str]) -> list[dict[str, Any]]:
    """One row a kernel and architecture; none where nvcc is missing (the report says so)."""
    if missing() is not None:
        return []
    return [row for path in sorted(SOURCES.glob("cuda/*.cu")) for arch in archs for row in compile_source(path, arch)]


def compile_source(path: Path, arch: str) -> list[dict[str, Any]]:
    """Every kernel of one source for one architecture.  Raises BackendError with nvcc's words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-I", str(SOURCES), "-o", f"{folder}/out.cubin", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"{path.name} for {arch}: {done.stderr[-2000:]}")
    return [_row(path, arch, *found) for found in _kernels(done.stderr)]


def _kernels(text: str) -> list[tuple[str, int, int, int]]:
    """(mangled name, registers, spilled bytes, static shared bytes) of each entry in ptxas's report."""
    found = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.split("'", 1)[0]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        found.append((name, registers, spills, int(shared[1]) if shared else 0))
    return found


def _row(path: Path, arch: str, name: str, registers: int, spilled: int, shared: int) -> dict[str, Any]:
    warps = 8  # every kernel here is launched with 256 threads: kThreads in csrc/cuda
    share = occupancy(ARCHS[arch], warps, registers, shared)
    binary = Binary(f"{path.stem}: {_plain(name)}", arch, registers, spilled, shared, share)
    return {"source": "cuda", **vars(binary), "faults": binary.faults(bandwidth_bound=True)}


def _plain(mangled: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    done = subprocess.run([tool, mangled], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace("gsf::cuda::", "").split("(")[0].removeprefix("void ")
