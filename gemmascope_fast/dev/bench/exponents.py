"""How times grow: the exponent of each curve of suite `scaling`, and why a curve bends where it does.

A reason is read off the rows themselves: at which rate the two ends of a step moved their bytes, held against the roof
of the run, and which of the two roofs binds them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemmascope_fast.dev.bench.rows import Row
from gemmascope_fast.dev.roof import last_level_cache

AXES: dict[str, Callable[[Row], float]] = {
    "width": lambda r: r.d_sae,
    "tokens": lambda r: r.T,
    "l0": lambda r: round(r.l0 or 0, 1),  # as measured: what an SAE's thresholds were set for is its op's name
    "layers": lambda r: int(r.op.split()[1]),
    "threads": lambda r: r.threads,
}
BEND = 1 / 3  # a step whose own exponent is further than this from the curve's bends it
OWN_CACHE_MB = 2.0  # what a core's own cache holds today
CHANGED = 1.15  # rates and shares that differ by less are one


def exponents(rows: Sequence[Row], roof: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One entry per curve: op, impl, at (T or width), the points, the least-squares exponent of time, and `bends`:
    a sentence for each step whose own exponent is more than a third away from the curve's."""
    found = []
    for op, axis in AXES.items():
        curves: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.suite == "scaling" and row.op.split()[0] == op:
                curves.setdefault((row.impl, _where(op, row)), []).append(row)
        for (impl, at), curve in curves.items():
            curve.sort(key=axis)
            points = [(axis(r), r.median_ms) for r in curve]
            if len(points) < 2:
                continue
            slope = exponent(points)
            pairs = zip(steps(points), itertools.pairwise(curve), strict=True)
            bends = [
                f"{a} → {b}: {step:.2f}, {noise(before, after, b / a, slope) or reason(before, after, roof)}"
                for (a, b, step), (before, after) in pairs
                if abs(step - slope) > BEND
            ]
            found.append({"op": op, "impl": impl, "at": at, "points": points, "exponent": slope, "bends": bends})
    return found


def _where(op: str, row: Row) -> str:
    return f"{row.d_in} × {row.d_sae}" if op in ("tokens", "layers") else f"T = {row.T}"


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of log time over log size."""
    sizes, times = np.log(points).T
    return float(np.polyfit(sizes, times, 1)[0])


def steps(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """(from, to, exponent) of each step of the curve."""
    pairs = itertools.pairwise(points)
    return [(a, b, math.log(tb / ta) / math.log(b / a)) for (a, ta), (b, tb) in pairs]


def noise(before: Row, after: Row, growth: float, slope: float) -> str | None:
    """A sentence where the spread of the two ends leaves room for the curve's exponent, else None."""
    low, high = (
        math.log(b / a) / math.log(growth) for a, b in ((before.p80_ms, after.p20_ms), (before.p20_ms, after.p80_ms))
    )
    if not low <= slope <= high:
        return None
    return f"within the noise: the 20th to the 80th percentiles of its ends allow {low:.2f} to {high:.2f}"


def reason(before: Row, after: Row, roof: dict[str, Any] | None) -> str:
    """Why time grows otherwise between these two rows than over their curve."""
    if roof is None or before.bytes is None or after.bytes is None or not before.roof_share or not after.roof_share:
        return "no roof was measured to judge it by"
    if before.threads != after.threads:
        return "threads share one memory, whose bandwidth does not grow with them"
    read, cache = roof["read_gb_s"], last_level_cache() / 1e6
    first, second = (r.bytes / r.median_ms / 1e6 for r in (before, after) if r.bytes is not None)
    rates = f"{first:.0f} and {second:.0f} GB/s, memory's roof {read:.0f}"
    if max(first, second) > CHANGED * read and first / second > CHANGED:
        size = after.bytes / 1e6
        return f"{size:.0f} MB leave the caches (the last level has {cache:.0f} MB): {rates}"
    bounds = [_bound(r, read) for r in (before, after)]
    shares = f"{before.roof_share:.0%} and {after.roof_share:.0%} of the roof"
    if bounds[0] != bounds[1]:
        return f"{bounds[0]} bounds the first, {bounds[1]} the second: {shares}"
    if after.roof_share > CHANGED * before.roof_share:
        return f"what every call costs weighs less: {shares}"
    if before.roof_share > CHANGED * after.roof_share:
        return f"further from the roof: {shares}; {_latents(after, cache)}"
    if bounds[0] == "memory":
        return f"the bytes grow like this, at {rates}"
    return f"the operations grow like this: {shares}"


def _bound(row: Row, read_gb_s: float) -> str:
    """Which roof is the row's: its share is memory's, or that of the arithmetic."""
    assert row.bytes is not None
    assert row.roof_share is not None
    of_memory = row.bytes / read_gb_s / 1e6 / row.median_ms
    return "memory" if of_memory > 0.99 * row.roof_share else "arithmetic"


def _latents(row: Row, cache_mb: float) -> str:
    """What an implementation does that the least work does not count."""
    dense = 4 * row.T * row.d_sae / 1e6
    if not row.impl.startswith("ours") and dense > OWN_CACHE_MB:
        where = "memory" if dense > cache_mb else "a cache that cores share"
        return f"its dense latents take {dense:.0f} MB, which each of its passes reads from and writes to {where}"
    if row.impl.startswith("ours") and row.T > 1:
        return "candidates that do not fire are refined too, and the least work counts only what fires"
    return "the rows do not show why"
