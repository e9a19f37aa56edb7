"""Builds the PTX interpreter of emulator/ and runs kernels in it, on CPU tensors."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent / "emulator"
# Built for this machine: the tests of one session use it and nobody else.  No contraction: sums are what is tested.
FLAGS = ("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


class PtxFault(AssertionError):
    """A kernel did what a device would punish, or holds an instruction that the interpreter does not know."""


class Allocation(NamedTuple):
    """Memory that a kernel may touch."""

    address: int
    bytes: int
    name: str


class Counts(NamedTuple):
    """What one instruction did.  Requests are of a warp; sectors are of 32 bytes of global memory; wavefronts are
    passes over the banks of shared memory, ideal the fewest that its bytes need."""

    text: str
    warps: int
    lanes: int
    requests: int
    bytes: int
    sectors: int
    wavefronts: int
    ideal: int


class _Allocation(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("size", ctypes.c_uint64), ("name", ctypes.c_char_p))


class _Launch(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_char_p) for n in ("text", "entry", "parameters")),
        ("values", ctypes.POINTER(ctypes.c_uint64)),
        ("count", ctypes.c_int64),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_int32),
        *((n, ctypes.c_uint64) for n in ("shared", "seed")),
        *((n, ctypes.c_int32) for n in ("last_block_alone", "races", "counts")),
        ("allocations", ctypes.POINTER(_Allocation)),
        ("allocation_count", ctypes.c_int32),
    )


class Options:
    """What holds for all launches: set by tests."""

    seed = 1
    last_block_alone = False
    counts = False
    rewrite: Callable[[str], str] | None = None  # of the PTX before it runs, to break it on purpose


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled once for each state of the sources, in the folder for temporary files."""
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = hashlib.sha256("\0".join((*FLAGS, *(p.read_text() for p in sorted(SOURCES.iterdir())))).encode())
    folder = Path(tempfile.gettempdir()) / f"gemmascope-fast-ptx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    out = folder / f"{digest.hexdigest()[:16]}.so"
    if not out.exists():
        made = out.with_suffix(f".{os.getpid()}")
        command = ["g++", *FLAGS, "-o", str(made), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the PTX interpreter was not built: {done.stderr[-4000:]}")
        made.rename(out)
    built = ctypes.CDLL(str(out))
    built.ptx_error.restype = ctypes.c_char_p
    built.ptx_counts.restype = ctypes.c_char_p
    built.ptx_instructions.restype = ctypes.c_int64
    return built


def run(
    text: str,
    entry: str,
    blocks: int,
    threads: int,
    allocations: list[Allocation],
    *,
    parameters: bytes | None = None,
    values: list[int] = (),
    shared: int = 0,
    label: str = "",
) -> list[Counts]:
    """One launch.  parameters: as they lie on the device, or values: one of up to 8 bytes each, in order.

    Raises PtxFault with the kernel's label, block, thread and instruction.  Counts are empty unless Options.counts.
    """
    text = text if Options.rewrite is None else Options.rewrite(text)
    held = (_Allocation * max(1, len(allocations)))(*[(a, n, name.encode()) for a, n, name in allocations])
    numbers = (ctypes.c_uint64 * max(1, len(values)))(*[v & (2**64 - 1) for v in values])
    launch = _Launch(
        text.encode(), entry.encode(), parameters, numbers, len(values) if parameters is None else len(parameters),
        blocks, threads, shared, Options.seed, Options.last_block_alone, not Options.last_block_alone, Options.counts,
        held, len(allocations),
    )  # fmt: skip
    if library().ptx_run(ctypes.byref(launch)) != 0:
        raise PtxFault(f"{label or entry}: {library().ptx_error().decode()}")
    found = read_counts() if Options.counts else []
    for listener in LISTENERS:
        listener(label or entry, text, found)
    return found


LISTENERS: list = []  # called after each launch with its label, its PTX and its counts


def read_counts() -> list[Counts]:
    built, numbers = library(), (ctypes.c_uint64 * 7)()
    found = []
    for i in range(built.ptx_instructions()):
        text = built.ptx_counts(ctypes.c_int64(i), numbers).decode()
        found.append(Counts(text, *numbers))
    return found


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Within it the options have these values."""
    before = {name: getattr(Options, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(Options, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(Options, name, value)


def opcode(text: str) -> str:
    """The mnemonic of an instruction without its guard: `ld.global.v4.b32`."""
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def totals(found: list[Counts]) -> dict[str, collections.Counter]:
    """Counts by mnemonic."""
    out: dict[str, collections.Counter] = {}
    for c in found:
        row = out.setdefault(opcode(c.text), collections.Counter())
        row.update(dict(zip(Counts._fields[1:], c[1:], strict=True)))
    return out
