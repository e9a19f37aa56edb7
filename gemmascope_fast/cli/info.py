"""`gemmascope-fast info`: versions, instruction sets, and which implementation serves which op, and why."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

from gemmascope_fast import backends
from gemmascope_fast.backends.versions import versions
from gemmascope_fast.training.arithmetic import products

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "huggingface_hub", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def collect() -> dict[str, Any]:
    """Keys: versions, cpu, compiler, cuda, ops (rows of backends.choices)."""
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
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table("what", "value", title="gemmascope-fast")
    for name, version in found["versions"].items():
        facts.add_row(name, version or "not installed")
    cpu = found["cpu"]
    facts.add_row("machine, threads", f"{cpu['machine']}, {cpu['threads']}")
    facts.add_row("instruction set in use", cpu["isa"] or "none: " + str(found["extension_missing"]))
    facts.add_row("instruction sets here", ", ".join(cpu["supported_isas"]) or "-")
    lacking = " (this CPU has no bf16 products)" if cpu["training"] == "float32" else ""
    facts.add_row("models are trained in", cpu["training"] + lacking)
    facts.add_row("compiler of the extension", found["compiler"] or "-")
    facts.add_row("CUDA", found["cuda"] or "no device")
    facts.add_row("Triton interpreter", "on" if found["triton_interpreter"] else "off")
    console.print(facts)
    ops = Table("op", "device", "served by", "why", title="ops")
    for row in found["ops"]:
        ops.add_row(row["op"], row["device"], row["backend"], row["reason"])
    console.print(ops)
    return 0
