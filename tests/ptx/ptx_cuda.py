"""Runs the CUDA C++ kernels from the PTX that nvcc makes of them, in place of the host build (tests/cuda_host.py)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import cuda_host
import torch
from ptx_library import Allocation, options, run

ARCH = int(os.environ.get("GSF_PTX_ARCH", "80"))
SOURCES = cuda_host.ROOT / "csrc"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-ptx")  # as in setup.py and gemmascope_fast/dev/gpu/nvcc.py
WEIGHTS = {torch.float32: "float", torch.bfloat16: "gsf::BF16", torch.float16: "gsf::F16", torch.int8: "signed char"}
THREADS = 256
SEEDS = {"ascending": 1, "descending": 2, "random": 3}


@functools.cache
def compiled(arch: int = ARCH, sources: Path = SOURCES) -> dict[str, tuple[str, str]]:
    """From a kernel's name, `encode_few<4, true, float>`, to its PTX and its mangled name there."""
    found = {}
    for path in sorted(sources.glob("cuda/*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.ptx"
            command = ["nvcc", *FLAGS, f"-arch=compute_{arch}", "-I", str(sources), "-o", str(out), str(path)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            text = out.read_text()
        head, *parts = re.split(r"^\.visible (?=\.entry)", text, flags=re.MULTILINE)
        names = [re.match(r"\.entry\s+(\w+)", part)[1] for part in parts]
        plain = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
        for mangled, name, part in zip(names, plain, parts, strict=True):
            found[without_arguments(name)] = (head + part, mangled)
    return found


def without_arguments(name: str) -> str:
    """`void gsf::cuda::gather<float>(gsf::cuda::GatherArgs)` → `gather<float>`."""
    return re.sub(r"\([\w:]+\)$", "", name).removeprefix("void ").replace("gsf::cuda::", "")


EXTENTS: dict[int, Allocation] = {}  # of the tensors whose address was taken last, by that address


def pointer(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    address = tensor.data_ptr()
    if tensor.numel():
        EXTENTS[address] = Allocation(address, tensor.nbytes, str(tuple(tensor.shape)))
    return address


def pointers(args: ctypes.Structure) -> list[tuple[str, int]]:
    """Every pointer in a structure and in the structures within, by name."""
    found = []
    for name, kind in args._fields_:
        value = getattr(args, name)
        if kind is ctypes.c_void_p and value is not None:
            found.append((name, value))
        elif isinstance(value, ctypes.Structure):
            found += pointers(value)
        elif isinstance(value, ctypes.Array):
            found += [(name, v) for v in value if v is not None]
    return found


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def kernel_of(name: str, a: ctypes.Structure, dtype: torch.dtype) -> tuple[str, int]:
    """What the launchers of csrc/cuda/*.cu choose for these arguments: the kernel and its number of blocks."""
    weights = WEIGHTS[dtype]
    if name == "encode" and a.T > 8:
        return f"encode_tile<{weights}>", cdiv(a.T, 32) * a.words
    if name == "encode":
        size = dtype.itemsize
        aligned = a.d % 4 == 0 and a.x % 16 == 0 and a.w % (4 * size) == 0
        tokens = 1 if a.T == 1 else 4 if a.T <= 4 else 8
        return f"encode_few<{tokens}, {str(aligned).lower()}, {weights}>", cdiv(a.F, 64)
    if name == "gather":
        return f"gather<{weights}>", cdiv(a.e.words, THREADS) * a.e.T
    if name == "decode":
        few = a.N <= 32
        return f"decode_{'few' if few else 'many'}<{weights}>", cdiv(a.d, 32 if few else THREADS) * a.N
    if name == "splice":
        return f"splice_few<{weights}>", cdiv(a.d_out, 32) * a.g.e.T
    if name == "round_tokens":
        return "round_token", a.T
    tokens = 1 if a.T == 1 else 4
    whole = str(a.groups == 1).lower()
    return f"matryoshka_few<{a.stored}, {tokens}, {whole}>", cdiv(a.out, 16) * cdiv(a.T, tokens)


class PtxLibrary(cuda_host.HostLibrary):
    """The ops as the device would run them: the same arguments as the host build's, on compiled kernels."""

    kernels = None  # of compiled(); others in the check by mutations

    def __init__(self, folder: Path | None = None) -> None:
        pass

    @contextlib.contextmanager
    def last_block_alone(self):
        with options(last_block_alone=True):
            yield

    def call(self, name: str, args: ctypes.Structure, dtype: torch.dtype, order: str) -> None:
        kernel, blocks = kernel_of(name, args, torch.float32 if name in ("round_tokens", "matryoshka") else dtype)
        if blocks == 0:
            return
        text, mangled = (self.kernels or compiled())[kernel]
        named = [(n, EXTENTS[p]) for n, p in pointers(args) if p in EXTENTS]
        allocations = [extent._replace(name=n) for n, extent in named]
        with options(seed=SEEDS[order]):
            run(text, mangled, blocks, THREADS, allocations, parameters=bytes(args), label=kernel)


def install() -> None:
    """Tests that import cuda_host after this run on compiled kernels."""
    cuda_host.pointer = pointer
    cuda_host.HostLibrary = PtxLibrary
