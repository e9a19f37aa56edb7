"""What was measured on what: processor, instruction sets, versions, threads, and the roof of the same run."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast import backends
from gemmascope_fast.backends.versions import versions
from gemmascope_fast.dev import roof

PACKAGES = ("torch", "numpy", "scipy", "transformers", "triton", "sae-lens", "torchao", "eai-sparsify")


def describe(threads: int) -> dict[str, Any]:
    """Keys: processor, core (vendor, family and model, where a name says little), isa, supported_isas,
    last_level_cache, memory_bytes, threads, cuda, versions."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "core": " ".join(filter(None, map(_cpuinfo, ("vendor_id", "cpu family", "model")))),
        "isa": backends.isa(),
        "supported_isas": backends.supported_isas(),
        "last_level_cache": roof.last_level_cache(),
        "memory_bytes": total_memory(),
        "threads": threads,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": versions(PACKAGES),
    }


def measured_roof(threads: int) -> dict[str, Any] | None:
    """The roof as a dict, None without the compiled extension."""
    return None if backends._C is None else asdict(roof.measure(threads))


def kind(machine: dict[str, Any]) -> str:
    """What ratios can be held against: the instruction set and, where it is known, the core that runs it."""
    return ", ".join(filter(None, (str(machine["isa"]), machine.get("core"))))


def _cpuinfo(entry: str) -> str:
    """The entry's value for the first core, empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == entry), ""
    )


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return memory("MemTotal")


def available_memory() -> int:
    """Bytes that this process could still take, as Linux estimates it."""
    return memory("MemAvailable")


def process_memory(entry: str) -> int:
    """Bytes of an entry of /proc/self/status: VmRSS is what this process holds, VmHWM the most that it ever held."""
    return memory(entry, "/proc/self/status")


def forget_peak() -> None:
    """VmHWM begins again at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(entry: str, file: str = "/proc/meminfo") -> int:
    """Bytes that Linux gives for an entry of such a file.  Raises OSError where it has none."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"{file} has no {entry}")
