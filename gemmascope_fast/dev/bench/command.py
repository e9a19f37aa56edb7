"""`gemmascope-fast dev bench`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.atomic import make_folder
from gemmascope_fast.files.progress import say

if TYPE_CHECKING:
    from gemmascope_fast.dev.bench.compare import Stored
    from gemmascope_fast.dev.bench.rows import Results, Row
    from gemmascope_fast.dev.bench.run import Options

GUARD_THREADS = 2
SUITES = ("ops", "topk", "modules", "loop", "scaling")
CASES = ("640x4096", "2304x16384", "3584x16384", "2304x65536", "real")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Time every op and compare with other libraries.  Each case has its own types: no --dtype."
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, metavar="SUITE", help=f"of {', '.join(SUITES)} (default: ops modules)")
    note = f"of {', '.join(CASES)} (default: the first two)"
    add("--case", nargs="+", choices=CASES, metavar="CASE", help=note)
    add("--tokens", type=int, nargs="+", metavar="T", help="numbers of tokens (default: each case's)")
    add("--op", nargs="+", metavar="OP", help="only these: encode, decode, SAE, linear, … (default: all)")
    add("--quick", action="store_true", help="one small shape, short timings: under three minutes")
    add("--seconds", type=float, metavar="X", help="time of each measurement (default: 3, with --quick 0.5)")
    add("--threads", type=int, metavar="N", help="number of threads (default: torch's)")
    common.add_device(parser)
    common.add_json(parser)
    add("--compare", type=Path, metavar="FILE", help="print what changed beyond noise since that JSON of another run")
    add("--guard", type=Path, metavar="FILE", help="fail where a ratio stored in that file fell by over a third")
    note = "store this run's ratios for --guard, beside those that are there"
    common.add_output(parser, "--write-guard", note, "kept file")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.dev.bench import compare, run
    from gemmascope_fast.dev.bench.machine import kind
    from gemmascope_fast.dev.bench.rows import Results

    if args.device != "cpu":
        raise ValueError(f"--device {args.device}: `make gpu` times the GPU kernels; these suites are for the CPU")
    options = _options(args)
    old = Results.load(args.compare) if args.compare else None
    stored = compare.stored_ratios(args.guard) if args.guard else None
    save = None if args.json == common.STDOUT else args.json
    if save is not None:
        make_folder(save.parent)
    results = run.run_suites(options, say, save=save)
    if args.json == common.STDOUT:
        common.write_figures(args, results.plain())
    _show(results)
    if args.write_guard:
        make_folder(args.write_guard.parent)
        compare.store(args.write_guard, kind(results.machine), results)
    status = 0
    if old is not None:
        status |= _compared(old, results)
    if stored is not None:
        status |= _guarded(stored, results, options)
    return status


def _options(args: argparse.Namespace) -> Options:
    from gemmascope_fast.dev.bench.run import QUICK, Options

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
    """Print the changes; 1 if an op of this package got slower beyond the noise."""
    from gemmascope_fast.dev.bench.compare import compare
    from gemmascope_fast.dev.bench.machine import kind

    changes = compare(old, new)
    before, now = kind(old.machine), kind(new.machine)
    if before != now:
        print(f"WARNING: the runs are of different machines, {before} and {now}: the machines may be the reason")
    print(f"\n{len(changes)} measurements in both runs; speed-up over eager fp32, before and now:")
    for change in changes:
        if change.beyond_noise:
            word = "SLOWER" if change.factor < 1 else "faster"
            print(f"  {word}  {change.before:7.2f} → {change.now:7.2f}  {change.key}")
    worse = [c for c in changes if c.beyond_noise and c.factor < 1]
    print(f"{len(worse)} slower beyond the noise")
    return int(bool(worse))


def _guarded(every: Stored, results: Results, options: Options) -> int:
    """1 if a ratio fell by more than a third.  It counts only if it does so again in a second run."""
    from gemmascope_fast.dev.bench.compare import bench_names, lost
    from gemmascope_fast.dev.bench.machine import kind
    from gemmascope_fast.dev.bench.run import run_suites

    here = kind(results.machine)
    if here not in every:
        print(f"guard: ratios are stored for {'; '.join(every)}, none for {here}: nothing was compared")
        return 0
    stored = every[here]
    fallen = lost(stored, results)
    if fallen:
        names = bench_names(fallen, results)
        say(f"measuring again: {', '.join(sorted(names))}")
        again = run_suites(options, say, only=names)
        fallen = lost({key: stored[key] for key in fallen}, again)
    for key, (before, now) in fallen.items():
        print(f"REGRESSION: {key}: {before:.2f} times eager fp32 stored, {now:.2f} now, twice")
    print(f"guard: {len(stored)} ratios, {len(fallen)} fell by more than a third")
    return int(bool(fallen))


def _show(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    from gemmascope_fast.dev.bench.rows import shown

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
