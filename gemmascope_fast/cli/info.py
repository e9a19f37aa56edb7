"""`gemmascope-fast info`: versions, instruction sets, and which implementation serves which op, and why."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from typing import Any

from gemmascope_fast.cli import arguments as common

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "huggingface_hub", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_json(parser)


def collect() -> dict[str, Any]:
    """Keys: versions, cpu, compiler, cuda, ops (rows of backends.choices)."""
    import torch

    from gemmascope_fast import backends
    from gemmascope_fast.backends.versions import versions
    from gemmascope_fast.training.arithmetic import products

    compiled = backends._C
    return {
        "versions": versions(PACKAGES),
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "isa": backends.isa(),
            "supported_isas": backends.supported_isas(),
            "training": str(products()).removeprefix("torch."),
        },
        "compiler": None if compiled is None else compiled.compiler,
        "extension_missing": backends.NATIVE_MISSING,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "triton_interpreter": backends.interpreted(),
        "ops": [asdict(row) for row in backends.choices()],
    }


def run(args: argparse.Namespace) -> int:
    found = collect()
    common.write_figures(args, found)
    cpu = found["cpu"]
    facts = [(name, version or "not installed") for name, version in found["versions"].items()]
    lacking = " (this CPU has no bf16 products)" if cpu["training"] == "float32" else ""
    facts += [
        ("machine, threads", f"{cpu['machine']}, {cpu['threads']}"),
        ("instruction set in use", cpu["isa"] or "none: " + str(found["extension_missing"])),
        ("instruction sets here", ", ".join(cpu["supported_isas"]) or "-"),
        ("models are trained in", cpu["training"] + lacking),
        ("compiler of the extension", found["compiler"] or "-"),
        ("CUDA", found["cuda"] or "no device"),
        ("Triton interpreter", "on" if found["triton_interpreter"] else "off"),
    ]
    common.print_table(("what", "value"), facts, "gemmascope-fast")
    ops = [[row[key] for key in ("op", "device", "backend", "reason")] for row in found["ops"]]
    common.print_table(("op", "device", "served by", "why"), ops, "ops")
    return 0
