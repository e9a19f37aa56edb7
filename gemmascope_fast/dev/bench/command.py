"""`gemmascope-fast dev bench`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import check_outputs
from gemmascope_fast.dev.bench.cases import CASES
from gemmascope_fast.dev.bench.compare import Stored, bench_names, compare, lost, store, stored_ratios
from gemmascope_fast.dev.bench.machine import kind
from gemmascope_fast.dev.bench.rows import Results, Row, shown
from gemmascope_fast.dev.bench.run import QUICK, SUITES, Options, run_suites

GUARD_THREADS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", nargs="+", choices=SUITES, metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help="numbers of tokens (default: each case's)")
    parser.add_argument("--op", nargs="+", metavar="OP", help="only these: encode, decode, SAE, linear, …")
    parser.add_argument("--quick", action="store_true", help="one small shape, short timings: under three minutes")
    parser.add_argument("--seconds", type=float, help="time of each measurement (default: 3, quick 0.5)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="say what changed beyond noise since that JSON")
    parser.add_argument("--guard", type=Path, metavar="RATIOS", help="fail where a stored ratio fell by over a third")
    parser.add_argument("--write-guard", type=Path, metavar="RATIOS", help="store this run's ratios for --guard")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        raise ValueError("--device cuda: `make gpu` times the GPU kernels; these suites are for the CPU")
    check_outputs(args, ("json", "write_guard"))
    options = _options(args)
    old = Results.load(args.compare) if args.compare else None
    stored = stored_ratios(args.guard) if args.guard else None
    results = run_suites(options, save=args.json)
    _show(results)
    if args.write_guard:
        store(args.write_guard, kind(results.machine), results)
    status = 0
    if old is not None:
        status |= _compared(old, results)
    if stored is not None:
        status |= _guarded(stored, results, options)
    return status


def _options(args: argparse.Namespace) -> Options:
    options = QUICK if args.quick else Options()
    if args.guard or args.write_guard:
        options = replace(options, threads=GUARD_THREADS)
    given: dict[str, Any] = {
        "suites": tuple(args.suite or ()),
        "cases": tuple(args.case or ()),
        "tokens": tuple(args.tokens or ()),
        "ops": tuple(args.op or ()),
        "threads": args.threads or None,
        "seconds": args.seconds,
    }
    return replace(options, **{key: value for key, value in given.items() if value not in (None, ())})


def _compared(old: Results, new: Results) -> int:
    """Print the changes; 1 where something of ours got slower beyond the noise."""
    changes = compare(old, new)
    before, now = kind(old.machine), kind(new.machine)
    if before != now:
        print(f"WARNING: the runs are of different machines, {before} and {now}: what changed may be theirs")
    print(f"\n{len(changes)} measurements in both runs; speed-up over eager fp32, before and now:")
    for change in changes:
        if change.beyond_noise:
            word = "SLOWER" if change.factor < 1 else "faster"
            print(f"  {word}  {change.before:7.2f} → {change.now:7.2f}  {change.key}")
    worse = [c for c in changes if c.beyond_noise and c.factor < 1]
    print(f"{len(worse)} slower beyond the noise")
    return int(bool(worse))


def _guarded(every: Stored, results: Results, options: Options) -> int:
    """What fell by more than a third is measured once more before it counts."""
    here = kind(results.machine)
    if here not in every:
        print(f"guard: ratios are stored for {'; '.join(every)}, none for {here}: nothing was held")
        return 0
    stored = every[here]
    fallen = lost(stored, results)
    if fallen:
        names = bench_names(fallen, results)
        print(f"measuring again: {', '.join(sorted(names))}")
        again = run_suites(options, only=names)
        fallen = lost({key: stored[key] for key in fallen}, again)
    for key, (before, now) in fallen.items():
        print(f"REGRESSION: {key}: {before:.2f} times eager fp32 stored, {now:.2f} now, twice")
    print(f"guard: {len(stored)} ratios, {len(fallen)} fell by more than a third")
    return int(bool(fallen))


def _show(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    # a table that is piped is not cut at a terminal's width
    console = Console() if Console().is_terminal else Console(width=160)
    machine, roof = results.machine, results.machine.get("roof")
    console.print(f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads")
    if roof:
        console.print(
            f"roof: {roof['read_gb_s']:.1f} GB/s read, {roof['fma_gflop_s']:.0f} fp32 Gflop/s,"
            f" {roof['int8_gop_s']:.0f} int8 Gop/s"
        )
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.suite, row.op, row.T, row.d_in, row.d_sae, row.threads), []).append(row)
    for (suite, op, T, d_in, d_sae, threads), rows in groups.items():
        titles = ("implementation", "ms", "20–80 %", "× eager", "20–80 %", "roof", "max error", "support", "flips")
        table = Table(*titles, title=f"{suite}: {op}, T = {T}, {d_in} × {d_sae}, {threads} threads")
        for row in sorted(rows, key=lambda r: r.median_ms):
            table.add_row(*(cell or "-" for cell in shown(row, results).values()))
        console.print(table)
    _show_lists(results)


def _show_lists(results: Results) -> None:
    for entry in results.exponents:
        print(f"time against {entry['op']}, {entry['impl']}, {entry['at']}: exponent {entry['exponent']:.2f}")
        for bend in entry["bends"]:
            print(f"    {bend}")
    for name, why in results.missing.items():
        print(f"missing: {name}: {why}")
    for warning in results.warnings:
        print(f"WARNING: {warning}")
