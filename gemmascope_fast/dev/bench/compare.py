"""Two runs, or a run and stored ratios: what got slower beyond the noise.

Absolute times of two runs on a shared machine say little.  Each run has the baseline (eager fp32) in every round, so
the ratios paired round by round are compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gemmascope_fast.dev.bench.engine import bench_name
from gemmascope_fast.dev.bench.rows import Results
from gemmascope_fast.errors import GemmaScopeFastError
from gemmascope_fast.files.results import write_json

# A third: what a busy neighbour alone did not reach in ratios of this suite, and a lost optimisation does.
LOST = 2 / 3


@dataclass(frozen=True)
class Change:
    """One measurement in both runs: speed-up over the baseline before and now."""

    key: str
    before: float
    now: float
    beyond_noise: bool

    @property
    def factor(self) -> float:
        return self.now / self.before


def compare(old: Results, new: Results) -> list[Change]:
    """The common measurements of this package, the worst change first.

    Beyond noise: the two runs' ranges from the 20th to the 80th percentile do not touch.
    """
    changes = []
    for key, now in new.ratios.items():
        before = old.ratios.get(key)
        if before is None or not is_ours(key):
            continue
        apart = now.p80 < before.p20 or now.p20 > before.p80
        changes.append(Change(key, before.median, now.median, apart))
    return sorted(changes, key=lambda c: c.factor)


def is_ours(key: str) -> bool:
    """Whether the row's implementation is this package's."""
    return key.split("/")[2].startswith("ours")


Stored = dict[str, dict[str, float]]


def stored_ratios(path: Path) -> Stored:
    """The guard's file: speed-up over eager fp32 by kind of machine (machine.kind) and row key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {isa: {str(k): float(v) for k, v in ratios.items()} for isa, ratios in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise GemmaScopeFastError(
            f"{path}: expected JSON of ratios by kind of machine and row key, got {error}"
        ) from error


def store(path: Path, kind: str, results: Results) -> None:
    """Put this run's ratios into the file, beside those of other machines.

    Of a ratio that is there already the lower is kept: a few runs leave what the machine reaches on a bad day.  Delete
    the file to begin anew.
    Figures from the cache are left out.
    """
    stored = stored_ratios(path) if path.exists() else {}
    kept = {k: r for k, r in results.ratios.items() if is_ours(k) and "(warm)" not in k}
    before = stored.get(kind, {})
    stored[kind] = {key: min(round(r.median, 2), before.get(key, r.median)) for key, r in sorted(kept.items())}
    write_json(path, stored)


def lost(stored: dict[str, float], results: Results) -> dict[str, tuple[float, float]]:
    """key: (stored, now) where a ratio fell by more than a third.  A stored key that was not measured is an error."""
    missing = sorted(key for key in stored if key not in results.ratios)
    if missing:
        raise GemmaScopeFastError(f"the guard's ratios were not measured: {', '.join(missing)}")
    now = {key: results.ratios[key].median for key in stored}
    return {key: (before, now[key]) for key, before in stored.items() if now[key] < LOST * before}


def bench_names(keys: dict[str, tuple[float, float]], results: Results) -> frozenset[str]:
    """The benches that those rows came from."""
    names = set()
    for row in results.rows:
        if row.key in keys:
            op = row.op.removesuffix(" (warm)")
            names.add(bench_name(row.suite, op, row.T, row.d_in, row.d_sae))
    return frozenset(names)
