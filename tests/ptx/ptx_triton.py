"""Replaces Triton's launcher by the PTX interpreter: kernels are compiled as the JIT specialises them for the
arguments of each call, and their PTX runs on CPU tensors.

`install` must run before triton is imported by anything else.
"""

from __future__ import annotations

import importlib
import os
import struct
from pathlib import Path

import torch
from ptx_library import Allocation, PtxFault, run

ARCH = int(os.environ.get("GSF_PTX_ARCH", "80"))
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class Driver:
    """What triton asks of a device's driver in order to compile."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


def install(arch: int = ARCH) -> None:
    """Compiled kernels in the place of Triton's interpreter, for this process."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(Driver(arch))
    for path in sorted(KERNELS.glob("*.py")):
        importlib.import_module(f"gemmascope_fast.kernels.{path.stem}")
    # What the launchers ask for on CPU tensors.  Triton looks at it where a kernel is decorated, which is done.
    os.environ["TRITON_INTERPRET"] = "1"
    compile_only = JITFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        if "UPCAST" in kwargs:  # Triton's interpreter needs it, compiled products do not
            kwargs["UPCAST"] = False
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            execute(self, kernel, grid, args, kwargs)
        return kernel

    JITFunction.run = launch


def execute(function, kernel, grid, args, kwargs) -> None:
    bound = bind(function, args, kwargs)
    signature = kernel.src.signature
    values, allocations, label = [], [], [function.fn.__name__]
    for name, value in bound.items():
        kind = signature[name]
        if kind == "constexpr":
            label.append(f"{name}={value}")
            continue
        if kind.startswith("*"):
            if not value.is_contiguous():
                raise PtxFault(f"{label[0]}: the argument {name} is not contiguous")  # kernels read memory, not strides
            values.append(value.data_ptr())
            allocations += extent(value, name)
        else:
            values.append(as_bits(value, kind))
    blocks = grid(bound) if callable(grid) else grid
    assert all(n == 1 for n in blocks[1:]), "grids here have one dimension"
    metadata = kernel.metadata
    run(
        kernel.asm["ptx"], metadata.name, blocks[0], metadata.num_warps * 32, allocations, values=values,
        shared=int(metadata.shared), label=" ".join(label),
    )  # fmt: skip


def bind(function, args, kwargs) -> dict:
    """The kernel's arguments by name, without the launch's options."""
    names = [p.name for p in function.params]
    return dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}


def extent(tensor: torch.Tensor, name: str) -> list[Allocation]:
    """The bytes of a contiguous tensor."""
    return [Allocation(tensor.data_ptr(), tensor.nbytes, name)] if tensor.numel() else []


def as_bits(value, kind: str) -> int:
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    if kind.startswith(("i", "u")):
        return int(value)
    raise TypeError(f"an argument of the type {kind} is not known")
