"""What was measured on what: processor, instruction sets, versions, threads, and the roof of the same run."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast import backends, roof
from gemmascope_fast.info import versions

PACKAGES = ("torch", "numpy", "scipy", "transformers", "triton", "sae-lens", "torchao", "eai-sparsify")


def describe(threads: int) -> dict[str, Any]:
    """Keys: processor, isa, supported_isas, last_level_cache, memory_bytes, threads, versions."""
    return {
        "processor": _processor(),
        "isa": backends.isa(),
        "supported_isas": backends.supported_isas(),
        "last_level_cache": roof.last_level_cache(),
        "memory_bytes": _memory("MemTotal"),
        "threads": threads,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "versions": versions(PACKAGES),
    }


def measured_roof(threads: int) -> dict[str, Any] | None:
    """The roof as a dict, None without the compiled extension."""
    return None if backends._C is None else asdict(roof.measure(threads))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that this process could still take, as Linux estimates it."""
    return _memory("MemAvailable")


def _memory(entry: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/meminfo has no {entry}")
