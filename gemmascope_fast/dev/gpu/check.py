"""`gemmascope-fast dev gpu-check`: checks of the GPU kernels that need no GPU, as one JSON report.

Each Triton kernel is compiled for each architecture, each CUDA source by nvcc where it is installed; registers,
spills, shared memory and occupancy are read from the binaries and compared with limits; bytes and operations give the
time that the roof of a named device allows.  Those times are a model: nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmascope_fast._version import __version__
from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.results import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compile the GPU kernels without a GPU and check their resources.  Nothing runs: no --device."
    common.add_out(parser, "the report, as JSON", default=Path("gpu-check.json"))
    note = "only this architecture, such as sm_90 or gfx942; may be repeated (default: all)"
    parser.add_argument("--arch", action="append", metavar="NAME", help=note)


def run(args: argparse.Namespace) -> int:
    """Status 1 where a kernel exceeds its limits."""
    report = collect(args.arch)
    write_json(args.out, report)
    failed = [row for row in report["kernels"] if row["faults"]]
    for row in failed:
        print(f"{row['kernel']} on {row['arch']}: {'; '.join(row['faults'])}", file=sys.stderr)
    for row in report["kernels"]:
        if row.get("few_warps"):
            print(f"{row['kernel']} on {row['arch']}: occupancy {row['occupancy']:.1%}: {row['few_warps']}")
    if report["nvcc"] != "found":
        print(f"CUDA C++ was not compiled: {report['nvcc']}", file=sys.stderr)
    print(f"{len(report['kernels'])} binaries, {len(failed)} outside the limits; {args.out} written")
    return 1 if failed else 0


def collect(archs: list[str] | None = None) -> dict[str, Any]:
    """Keys: version, what, kernels (a row a kernel and architecture), loops (modelled time of whole calls)."""
    from gemmascope_fast.dev.gpu import aot, nvcc
    from gemmascope_fast.dev.gpu.devices import ARCHS, DEVICES, model_times
    from gemmascope_fast.dev.gpu.model import loops
    from gemmascope_fast.dev.gpu.specs import all_specs

    wanted = list(ARCHS) if archs is None else archs
    for name in wanted:
        if name not in ARCHS:
            raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {name!r}")
    rows = []
    for spec in all_specs():
        for arch in wanted:
            binary = aot.compile_spec(spec, arch)
            rows.append(
                {
                    "source": "triton",
                    **asdict(binary),
                    "bytes": spec.bytes,
                    "operations": spec.ops,
                    "operations_kind": spec.kind,
                    "model_microseconds": model_times(arch, spec.bytes, spec.ops, spec.kind),
                    "bandwidth_bound": spec.bandwidth_bound,
                    "faults": binary.faults(spec.few_warps),
                    "few_warps": spec.few_warps if binary.occupancy < aot.LEAST_OCCUPANCY else "",
                }
            )
    rows += [row for row in nvcc.rows([a for a in wanted if a.startswith("sm_")])]
    return {
        "version": __version__,
        "what": "compiled, not run: model_microseconds is the roof of the named device (model), no measurement",
        "devices": [asdict(d) for d in DEVICES],
        "kernels": rows,
        "nvcc": nvcc.missing() or "found",
        "loops": loops(),
    }
