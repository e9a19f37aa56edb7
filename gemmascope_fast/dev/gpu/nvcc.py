"""The CUDA C++ sources through nvcc, for every NVIDIA architecture, gated as the Triton kernels are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmascope_fast.dev.gpu import sass
from gemmascope_fast.dev.gpu.aot import Binary
from gemmascope_fast.dev.gpu.devices import ARCHS, model_times, occupancy
from gemmascope_fast.dev.gpu.sass import Sass
from gemmascope_fast.dev.gpu.specs import L0, OUT, WORDS, D, F
from gemmascope_fast.errors import BackendError

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
# No contraction: the order and the rounding of every sum is part of the contract.
WARPS = 8  # of a block: kThreads in csrc/cuda/launcher.h is 256
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
        machine = sass.read(Path(folder, "out.cubin").read_bytes())
    return [_row(path, arch, machine[name], name, *rest) for name, *rest in _kernels(done.stderr)]


def _kernels(text: str) -> list[tuple[str, int, int, int, int]]:
    """(mangled name, registers, spilled, static shared and stack bytes) of each entry in ptxas's report."""
    found = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.split("'", 1)[0]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        stack = max((int(n) for n in re.findall(r"(\d+) bytes stack frame", part)), default=0)
        found.append((name, registers, spills, int(shared[1]) if shared else 0, stack))
    return found


def _row(
    path: Path, arch: str, machine: Sass, name: str, registers: int, spilled: int, shared: int, stack: int
) -> dict[str, Any]:
    share = occupancy(ARCHS[arch], WARPS, registers, shared)
    plain = _plain(name)
    binary = Binary(f"{path.stem}: {plain}", arch, registers, spilled, shared, share, stack, machine)
    moved, operations, kind = cost(plain)
    return {
        "source": "cuda",
        **asdict(binary),
        "bytes": moved,
        "operations": operations,
        "operations_kind": kind,
        "model_microseconds": model_times(arch, moved, operations, kind),
        "faults": binary.faults(),
    }


# Shifts and merges that make 32 codes of one row from planes of so many bits (csrc/cuda/matryoshka.cu): two a plane and
# quad, planes 1 and 2 as one after four that pair them, one less where the bits lie in their place.
UNPACK = {2: 14, 3: 31, 4: 32, 6: 46, 8: 60}


def cost(kernel: str) -> tuple[int, int, str]:
    """Model: (bytes, operations, their kind) of one launch of a kernel, named as `encode_few<4, true, float>`, at the
    shape of specs.py; kernels for many tokens at 1,024."""
    name, _, inside = kernel.rstrip(">").partition("<")
    arguments = [re.sub(r"^\(\w+\)", "", a.strip()).split("::")[-1] for a in inside.split(",")]
    if name == "round_token":
        return 5 * D + 8, 16 * D, "fp32"
    if name == "matryoshka_few":
        bits, T, weights = int(arguments[0]), int(arguments[1]), OUT * D
        scales = 5 * OUT if arguments[2] in ("true", "1") else 3 * weights // 32
        return weights * bits // 8 + scales + T * (D + 4 * OUT), weights // 32 * (UNPACK[bits] + 8 * T), "int32"
    moved, operations = _float_cost(name, arguments)
    return moved, operations, "fp32"


def _float_cost(name: str, arguments: list[str]) -> tuple[int, int]:
    if arguments[-1] not in ("float", "BF16", "F16", "signed char"):
        raise ValueError(f"kernel: no cost is declared for {name!r}")
    size = {"float": 4, "BF16": 2, "F16": 2, "signed char": 1}[arguments[-1]]
    T = {"encode_tile": 1024, "decode_many": 1024}.get(name, 1)
    if name == "encode_few":
        T = int(arguments[0])
    left = T * (WORDS * 8 + L0 * 4)
    if name.startswith("encode"):
        return size * D * F + T * D * 4 + 8 * F + left, 2 * T * D * F
    if name == "gather":
        return T * (WORDS * 8 + L0 * 12), 0
    rows = min(T * L0, F) * D * size
    if name.startswith("decode"):
        return rows + T * (L0 * 8 + 8 + D * 4), 2 * T * L0 * D
    if name == "splice_few":
        return rows + left + L0 * 8 + 2 * D * 4, 2 * L0 * D
    raise ValueError(f"kernel: no cost is declared for {name!r}")


def _plain(mangled: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    done = subprocess.run([tool, mangled], capture_output=True, text=True, check=True)
    return done.stdout.strip().replace("gsf::cuda::", "").split("(")[0].removeprefix("void ")
