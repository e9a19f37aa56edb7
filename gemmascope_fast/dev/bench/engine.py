"""From candidates to rows: what one measurement is made of, and how it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gemmascope_fast.dev.bench.rows import BASELINE, Results, Row
from gemmascope_fast.dev.bench.timing import interleave, paired, percentiles_ms
from gemmascope_fast.dev.roof import Roof


class Work(NamedTuple):
    """What a call must at least do: bytes that move, operations (a multiply-add is two), and which roof bounds them:
    "fp32", "int8", or None where this machine's peak for that arithmetic was not measured."""

    bytes: int
    flops: int
    arithmetic: str | None = "fp32"


class Verdict(NamedTuple):
    """What was found before anything was timed; None where it does not apply."""

    max_error: float | None = None
    support_equal: bool | None = None
    support_flips_vs_eager: int | None = None


class WrongAnswer(Exception):
    """A candidate's answer is not within what its arithmetic allows: it is listed, not timed."""


class Unavailable(Exception):
    """A peer that is installed does not run here: it is listed with the reason, not timed."""


@dataclass
class Candidate:
    """One implementation.  `call` goes round copies of the weights where tokens are few, `warm` stays on one."""

    impl: str
    dtype: str
    call: Callable[[], Any]
    work: Work | None
    verdict: Verdict = field(default_factory=Verdict)
    warm: Callable[[], Any] | None = None


class Plan(NamedTuple):
    """A bench that is not built yet: weights are made only for what is asked for."""

    suite: str
    op: str
    T: int
    d_in: int
    d_sae: int
    build: Callable[[], Bench]

    @property
    def name(self) -> str:
        return bench_name(self.suite, self.op, self.T, self.d_in, self.d_sae)


def bench_name(suite: str, op: str, T: int, d_in: int, d_sae: int) -> str:
    return f"{suite}/{op}/T={T}/{d_in}x{d_sae}"


@dataclass
class Bench:
    """One op on one shape with its candidates, and why others are not among them."""

    suite: str
    op: str
    T: int
    d_in: int
    d_sae: int
    l0: float | None
    threads: int | None = None  # None: the run's
    candidates: list[Candidate] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] | None = None  # bytes by what holds them, where that is measured

    @property
    def name(self) -> str:
        return bench_name(self.suite, self.op, self.T, self.d_in, self.d_sae)

    def add(self, impl: str, build: Callable[[], Candidate]) -> None:
        """Verify and append under this name; a peer that is not installed, or answers wrongly, goes to `missing`."""
        try:
            self.candidates.append(replace(build(), impl=impl))
        except ModuleNotFoundError as error:
            self.missing[impl] = f"not installed: {error.name}"
        except (WrongAnswer, Unavailable, NotImplementedError) as error:
            self.missing[impl] = str(error)


def time_bench(bench: Bench, roof: Roof | None, threads: int, seconds: float) -> Results:
    """Rows, ratios and memory of one bench; `seconds` for each of the cold and the warm figures."""
    results = Results(machine={}, missing={f"{bench.name}/{impl}": why for impl, why in bench.missing.items()})
    results.memory = [] if bench.memory is None else [bench.memory]
    calls = {c.impl: c.call for c in bench.candidates}
    warm = {c.impl: c.warm for c in bench.candidates if c.warm is not None}
    for op, group in ((bench.op, calls), (f"{bench.op} (warm)", warm)):
        if not group:
            continue
        times = interleave(group, seconds)
        for candidate in bench.candidates:
            if candidate.impl not in times:
                continue
            own = times[candidate.impl]
            row = _row(bench, op, candidate, roof, threads, percentiles_ms(own))
            results.rows.append(row)
            if BASELINE in times and candidate.impl != BASELINE:
                results.ratios[row.key] = paired(times[BASELINE], own)
    return results


def _row(
    bench: Bench, op: str, candidate: Candidate, roof: Roof | None, threads: int, ms: tuple[float, float, float]
) -> Row:
    what = (bench.suite, op, candidate.impl, bench.T, bench.d_in, bench.d_sae, bench.l0, candidate.dtype, threads)
    work = candidate.work
    moved, flops = (work.bytes, work.flops) if work else (None, None)
    return Row(*what, *ms, moved, flops, roof_share(work, ms[0], roof), *candidate.verdict)


def roof_share(work: Work | None, median_ms: float, roof: Roof | None) -> float | None:
    """The least time for this work over the median; None without a roof for its arithmetic.

    A warm figure may exceed 1: the read roof is memory's, and it read the cache.
    """
    if roof is None or work is None or work.arithmetic is None:
        return None
    flops = work.flops if work.arithmetic == "fp32" else 0
    int_ops = work.flops if work.arithmetic == "int8" else 0
    return roof.share(median_ms / 1e3, work.bytes, flops, int_ops)
