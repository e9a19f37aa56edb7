"""Ahead-of-time compilation of the Triton kernels with no GPU, and what the binaries say about themselves."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemmascope_fast.backends.gpu.launch import interpreted
from gemmascope_fast.dev.gpu import sass
from gemmascope_fast.dev.gpu.devices import ARCHS, occupancy
from gemmascope_fast.dev.gpu.sass import Sass
from gemmascope_fast.dev.gpu.specs import KernelSpec
from gemmascope_fast.errors import BackendError

LEAST_OCCUPANCY = 0.25  # unless a kernel's spec says why not: fewer warps do not keep enough loads in flight


@dataclass(frozen=True)
class Binary:
    """What one compilation uses.  spilled: bytes of stack a thread (NVIDIA), spilled registers (AMD)."""

    kernel: str
    arch: str
    registers: int
    spilled: int
    shared: int
    occupancy: float
    stack: int = 0  # bytes of a stack frame a thread that are no spills: arrays that the compiler could not unroll
    machine: Sass | None = None  # of NVIDIA's binaries

    def faults(self, few_warps: str = "") -> list[str]:
        """What the gate objects to; empty where it passes.  few_warps: why a low occupancy is right, if it is."""
        found = []
        if self.spilled:
            found.append(f"spills ({self.spilled})")
        if self.stack > self.spilled:
            found.append(f"stack frame ({self.stack} bytes)")
        if self.machine is not None:
            found += self.machine.faults()
        if self.shared > ARCHS[self.arch].shared_block:
            found.append(f"takes {self.shared} bytes of shared memory, the device has {ARCHS[self.arch].shared_block}")
        if not few_warps and self.occupancy < LEAST_OCCUPANCY:
            found.append(f"occupancy {self.occupancy:.0%}, expected at least {LEAST_OCCUPANCY:.0%} or a reason")
        return found


def compile_spec(spec: KernelSpec, arch: str) -> Binary:
    """Compile one kernel for one architecture ("sm_90", "gfx942", …)."""
    if interpreted():
        raise BackendError("TRITON_INTERPRET=1 is set: kernels cannot be compiled in this process")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(f"gemmascope_fast.kernels.{spec.module}"), spec.function)
    signature = {a: "constexpr" if a in spec.constants else spec.args[a] for a in fn.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(fn.arg_names)
        if signature[a].startswith("*") or a in spec.aligned
    }
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": False}
    made = triton.compile(ASTSource(fn, signature, dict(spec.constants), attributes), target=target, options=options)
    registers, spilled = _read_cubin(made.asm["cubin"]) if nvidia else _read_amdgcn(made.asm["amdgcn"])
    shared = int(made.metadata.shared)
    share = occupancy(ARCHS[arch], spec.warps, registers, shared)
    return Binary(spec.label, arch, registers, spilled, shared, share, machine=_machine(made.asm) if nvidia else None)


def _machine(asm: Mapping[str, Any]) -> Sass:
    """The machine code with what the PTX before it approximates."""
    (found,) = sass.read(asm["cubin"]).values()
    return replace(found, rounding=(*found.rounding, *sass.ptx_faults(asm["ptx"])))


def cuobjdump() -> str:
    """Triton's own copy of cuobjdump."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise BackendError(f"cuobjdump gave no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def _read_amdgcn(text: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise BackendError(f"the AMD assembly states no {name}")
        return int(found[1])

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count")
