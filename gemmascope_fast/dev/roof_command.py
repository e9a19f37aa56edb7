"""`gemmascope-fast dev roof`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemmascope_fast.cli import arguments as common

if TYPE_CHECKING:
    from gemmascope_fast.dev.roof import Roof

ISAS = ("plain", "avx2", "avxvnni", "avx512", "amx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    note = "numbers of threads, one row each (default: torch's)"
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help=note)
    parser.add_argument("--isa", choices=("all", *ISAS), help="instruction set (default: the one in use)")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from gemmascope_fast import backends

    isas = backends.supported_isas() if args.isa == "all" else [args.isa or backends.isa()]
    threads = args.threads or [torch.get_num_threads()]
    rows = [asdict(_forced(isa, count)) for isa in isas for count in threads]
    _show(rows)
    common.write_figures(args, rows)
    return 0


def _forced(isa: str | None, threads: int) -> Roof:
    from gemmascope_fast import backends
    from gemmascope_fast.dev.roof import measure

    if isa is None:
        return measure(threads)
    with backends.forced_isa(isa):
        return measure(threads)


def _show(rows: list[dict[str, Any]]) -> None:
    titles = ("threads", "instructions", "read GB/s", "fp32 Gflop/s", "int8 Gop/s", "spread")
    cells = [
        (str(row["threads"]), row["isa"], *(f"{row[k]:.1f}" for k in ("read_gb_s", "fma_gflop_s", "int8_gop_s")),
         f"{row['spread']:.0%}")
        for row in rows
    ]  # fmt: skip
    common.print_table(titles, cells, "the roof, measured")
    print("spread: best pass over median pass")
