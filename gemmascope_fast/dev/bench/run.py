"""Runs suites: roof, benches, roof again, and what must be said about the machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.dev import testing
from gemmascope_fast.dev.bench.cases import CASES, FEW_TOKENS, GEMMA_SCOPE, SMALL, cache_exceeded, forget_copies
from gemmascope_fast.dev.bench.engine import Plan, Work, roof_share, time_bench
from gemmascope_fast.dev.bench.machine import describe, measured_roof
from gemmascope_fast.dev.bench.rows import BASELINE, Results
from gemmascope_fast.dev.roof import Roof

# each is a function NAME_suite of (cases, tokens) in the module suite_NAME, imported when it is asked for
SUITES = ("ops", "topk", "modules", "loop", "scaling")
# Beyond these the medians of one run differ from another's by as much as an optimisation would gain.
NOISY_SPREAD, NOISY_ROOF = 0.5, 0.25


@dataclass(frozen=True)
class Options:
    """suites and cases by name; tokens: None for each case's own; seconds: time of each cold and each warm figure."""

    suites: tuple[str, ...] = ("ops", "modules")
    cases: tuple[str, ...] = (SMALL.name, GEMMA_SCOPE.name)
    tokens: tuple[int, ...] | None = None
    ops: tuple[str, ...] = ()  # empty: every op
    threads: int = 0
    seconds: float = 3.0


QUICK = Options(suites=("ops", "modules"), cases=(SMALL.name,), tokens=(1, 64), seconds=0.5)


def plans(options: Options) -> list[Plan]:
    """The benches, not yet built, of the chosen suites.  Raises ValueError for an unknown suite, case or op, and for
    no tokens or no time."""
    if min(options.tokens or (1,)) < 1:
        raise ValueError(f"tokens: expected at least 1, got {min(options.tokens or ())}")
    if not options.seconds > 0:
        raise ValueError(f"seconds: expected more than 0, got {options.seconds}")
    for name in options.suites:
        if name not in SUITES:
            raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")
    for name in options.cases:
        if name not in CASES:
            raise ValueError(f"cases: expected one of {', '.join(CASES)}, got {name!r}")
    cases = [CASES[name] for name in options.cases]
    package = "gemmascope_fast.dev.bench"
    made = {s: getattr(import_module(f"{package}.suite_{s}"), f"{s}_suite") for s in options.suites}
    every = [plan for name in options.suites for plan in made[name](cases, options.tokens)]
    known = dict.fromkeys(plan.op for plan in every)
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        raise ValueError(f"op: expected among {', '.join(known)}, got {', '.join(unknown)}")
    return [plan for plan in every if not options.ops or plan.op in options.ops]


def run_suites(
    options: Options, say: Callable[[str], Any] = print, only: frozenset[str] | None = None, save: Path | None = None
) -> Results:
    """Every bench verified, then timed; `only`: names of benches to keep; `save`: written after each bench."""
    chosen = plans(options)
    threads = options.threads or torch.get_num_threads()
    results = Results(machine=describe(threads))
    before = measured_roof(threads)
    roofs = {threads: _roof(before)}
    results.machine["roof"] = before
    work: dict[str, tuple[int, Work | None]] = {}
    shape = None
    with testing.threads(threads), torch.inference_mode():
        for plan in chosen:
            if only is not None and plan.name not in only:
                continue
            say(plan.name)
            if shape != (plan.d_in, plan.d_sae):
                forget_copies()  # half of the memory may be theirs
                shape = plan.d_in, plan.d_sae
            bench = plan.build()
            own = bench.threads or threads
            if own not in roofs:
                roofs[own] = _roof(measured_roof(own))
            with testing.threads(own):
                part = time_bench(bench, roofs[own], own, options.seconds)
            results.rows += part.rows
            by_impl = {c.impl: c.work for c in bench.candidates}
            work.update((row.key, (own, by_impl[row.impl])) for row in part.rows)
            results.ratios.update(part.ratios)
            results.missing.update(part.missing)
            results.memory += [m for m in part.memory if m not in results.memory]
            if save is not None:
                results.save(save)
            del bench
            gc.collect()
    after = measured_roof(threads)
    if before and after:
        # a roof is what is possible: the better of the two, each entry by itself
        results.machine.update(roof=better(before, after), roof_before=before, roof_after=after)
        roofs[threads] = _roof(results.machine["roof"])
    for row in results.rows:
        if row.key in work:
            own, what = work[row.key]
            row.roof_share = roof_share(what, row.median_ms, roofs[own])
    if "scaling" in options.suites:
        from gemmascope_fast.dev.bench.exponents import exponents

        results.exponents = exponents(results.rows, results.machine["roof"])
    results.warnings = noise(results) + few_copies(results)
    if save is not None:
        results.save(save)
    return results


def better(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The higher rate of each loop, and the lower spread."""
    rates = {key: max(a[key], b[key]) for key in ("read_gb_s", "fma_gflop_s", "int8_gop_s")}
    return {**a, **rates, "spread": min(a["spread"], b["spread"])}


def _roof(found: dict[str, Any] | None) -> Roof | None:
    return None if found is None else Roof(**found)


def few_copies(results: Results) -> list[str]:
    """Shapes whose weights, at few tokens, go round less than four times the last-level cache: memory holds no more."""
    rows = (r for r in results.rows if r.suite in ("ops", "modules") and r.op != "linear" and r.T <= FEW_TOKENS)
    exceeded = {shape: cache_exceeded(shape[0] * shape[1]) for shape in dict.fromkeys((r.d_in, r.d_sae) for r in rows)}
    return [
        f"{d_in} × {d_sae}: half of the memory holds copies of {times:.1f} times the last-level cache, not of 4"
        for (d_in, d_sae), times in exceeded.items()
        if times < 4
    ]


def noise(results: Results) -> list[str]:
    """Why this run may not conclude anything; empty where the machine was quiet."""
    said = []
    wide = [r for r in results.rows if r.impl == BASELINE and r.p80_ms > (1 + NOISY_SPREAD) * r.p20_ms]
    total = sum(r.impl == BASELINE for r in results.rows)
    if total and len(wide) > total / 4:
        said.append(f"{BASELINE}: in {len(wide)} of {total} measurements the 80th percentile exceeds 1.5 × the 20th")
    before, after = results.machine.get("roof_before"), results.machine.get("roof_after")
    if before and after:
        for key in ("read_gb_s", "fma_gflop_s", "int8_gop_s"):
            low, high = sorted((before[key], after[key]))
            if high > (1 + NOISY_ROOF) * low:
                said.append(f"the roof moved during the run: {key} {before[key]:.1f} before, {after[key]:.1f} after")
    if said:
        said.append("the machine was too noisy to conclude from small differences; ratios are paired, times are not")
    return said
