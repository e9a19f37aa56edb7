"""The highest rates of this machine, measured: read bandwidth, fp32 multiply-adds, int8 products.

The loops are native (csrc/cpu/roof.h) and run on the instruction set in use.  A kernel's share of the roof says more
than its time: on a shared machine the roof moves with the neighbours, so it is measured in the run that it judges.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemmascope_fast import backends
from gemmascope_fast.errors import BackendError

# Two rounds of passes are some tenths of a second apart: a neighbour's burst hits one of them.
ROUNDS, READ_PASSES, ARITHMETIC_PASSES = 2, 6, 8
MIN_READ_BYTES = 256 << 20
DEFAULT_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Roof:
    """The best pass of each loop: GB read per second, fp32 and int8 operations (a multiply-add is two), in 1e9/s.

    int8 is u8·s8 products where the instruction set has VNNI, int16 pairs on AVX2 and plain C++: what exact integer
    dots are made of there.  `spread` is best over median pass minus one, the largest of the three: how much the
    machine was disturbed.
    """

    threads: int
    isa: str
    read_gb_s: float
    fma_gflop_s: float
    int8_gop_s: float
    spread: float

    def seconds(self, bytes_: float, flops: float = 0.0, int_ops: float = 0.0) -> float:
        """The least time for this much traffic and arithmetic, each at its roof, perfectly overlapped."""
        return max(bytes_ / self.read_gb_s, flops / self.fma_gflop_s, int_ops / self.int8_gop_s) / 1e9

    def share(self, seconds: float, bytes_: float, flops: float = 0.0, int_ops: float = 0.0) -> float:
        """Least time over `seconds`: 1 is the roof."""
        return self.seconds(bytes_, flops, int_ops) / seconds


def measure(threads: int | None = None) -> Roof:
    """The roof on `threads` threads (default: torch's number) and the instruction set in use; about a second.

    Reads a buffer of at least 256 MiB and eight times the last-level cache.  Raises BackendError without the
    compiled extension, ValueError for fewer than one thread.
    """
    module = backends._C
    if module is None:
        raise BackendError(f"the roof is measured by native loops: {backends.NATIVE_MISSING}")
    before = torch.get_num_threads()
    threads = before if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    loops: dict[str, Callable[[], Sequence[float]]] = {
        "read": lambda: module.roof_read(max(MIN_READ_BYTES, 8 * last_level_cache()), READ_PASSES),
        "fma": lambda: module.roof_fma(ARITHMETIC_PASSES),
        "int8": lambda: module.roof_int8(ARITHMETIC_PASSES),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    torch.set_num_threads(threads)
    try:
        for _ in range(ROUNDS):
            for name, loop in loops.items():
                rates[name] += loop()
    finally:
        torch.set_num_threads(before)
    best = {name: max(found) / 1e9 for name, found in rates.items()}
    spread = max(max(found) / statistics.median(found) - 1 for found in rates.values())
    return Roof(threads, module.isa(), best["read"], best["fma"], best["int8"], spread)


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache of core 0, as Linux reports it; otherwise 32 MiB."""
    sizes = []
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=DEFAULT_CACHE_BYTES)
