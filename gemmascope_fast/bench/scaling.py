"""Suite `scaling`: time against width, tokens and threads, the exponent of each curve, and why it bends."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gemmascope_fast.bench import peers
from gemmascope_fast.bench.cases import Case
from gemmascope_fast.bench.engine import Bench, Candidate, Plan, Work
from gemmascope_fast.bench.machine import available_memory
from gemmascope_fast.bench.rows import Row
from gemmascope_fast.bench.suite_ops import full_work, screened_work, uses_screen
from gemmascope_fast.roof import last_level_cache
from gemmascope_fast.screen import most_bytes
from gemmascope_fast.testing import compare_support

WIDTHS = tuple(2**p for p in range(14, 21))  # 16k … 1m
TOKENS = (1, 4, 16, 64, 256, 1024)
D_IN, L0 = 640, 80.0  # Gemma 3 270M's width: a million features of it are 2.7 GB in fp32
# making a synthetic SAE holds its matrices, their random parts and a sample of its activations at once
COPIES_AT_ONCE = 7


def scaling_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    """Widths as far as memory allows at T = 1 and 64, tokens and threads at the last case's shape."""
    del tokens  # the curve is the point
    for width in WIDTHS:
        case = Case(f"{D_IN}x{width}", D_IN, width, L0)
        for T in (1, 64):
            yield _plan("width", case, T)
    shape = cases[-1]
    for T in TOKENS:
        yield _plan("tokens", shape, T)
    for threads in range(1, torch.get_num_threads() + 1):
        for T in (1, 256):
            yield _plan("threads", shape, T, threads)


def _plan(op: str, case: Case, T: int, threads: int | None = None) -> Plan:
    build = functools.partial(_bench, op, case, T, threads)
    return Plan("scaling", op, T, case.d_in, case.d_sae, build)


def _bench(op: str, case: Case, T: int, threads: int | None = None) -> Bench:
    """Whole SAE, ours against eager fp32, on one copy of the weights; support checked on up to 16 tokens."""
    need = COPIES_AT_ONCE * 4 * case.d_in * case.d_sae
    if need > available_memory():
        missing = f"{need / 1e9:.1f} GB to make it, {available_memory() / 1e9:.1f} GB are free"
        lacking = dict.fromkeys(("ours", "eager fp32"), missing)
        return Bench("scaling", op, T, case.d_in, case.d_sae, None, threads, missing=lacking)
    sae, x = case.sae.prepare(), case.x(T)
    few = x[:16]
    check = compare_support(sae.encode_sparse(few), few, sae)
    if not check.equal:
        raise AssertionError(f"{case.name}: {check}")
    bench = Bench("scaling", op, T, case.d_in, case.d_sae, case.l0, threads)
    encode = screened_work(sae, x) if uses_screen(sae, x) else full_work(sae, x)
    weights, wide = 2 * sae.W_enc.numel(), peers.Dense.of(sae)
    dense = Work(4 * (weights + 2 * T * (case.d_in + case.d_sae)), 2 * T * weights)
    bench.candidates = [
        Candidate("ours", "fp32", lambda: sae(x), encode),
        Candidate("eager fp32", "fp32", lambda: peers.eager_sae(wide, x), dense),
    ]
    return bench


def exponents(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per curve: op, impl, at (T or width), the points, the least-squares exponent of time, and `bends`:
    a sentence for each step whose own exponent is more than a third away from the curve's."""
    axes: dict[str, tuple[Callable[[Row], int], Callable[[Row], str]]] = {
        "width": (lambda r: r.d_sae, lambda r: f"T = {r.T}"),
        "tokens": (lambda r: r.T, lambda r: f"{r.d_in} × {r.d_sae}"),
        "threads": (lambda r: r.threads, lambda r: f"T = {r.T}"),
    }
    found = []
    for op, (axis, where) in axes.items():
        curves: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.suite == "scaling" and row.op == op:
                curves.setdefault((row.impl, where(row)), []).append(row)
        for (impl, at), curve in curves.items():
            points = sorted((axis(r), r.median_ms) for r in curve)
            if len(points) < 2:
                continue
            slope = exponent(points)
            bends = [
                f"{a} → {b}: {step:.2f}, {_why(op, impl, curve[0], b)}"
                for (a, b, step) in steps(points)
                if abs(step - slope) > 1 / 3
            ]
            found.append({"op": op, "impl": impl, "at": at, "points": points, "exponent": slope, "bends": bends})
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of log time over log size."""
    xs, ys = ([math.log(p[i]) for p in points] for i in (0, 1))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def steps(points: Sequence[tuple[int, float]]) -> list[tuple[int, int, float]]:
    """(from, to, exponent) of each step of the curve."""
    pairs = itertools.pairwise(points)
    return [(a, b, math.log(tb / ta) / math.log(b / a)) for (a, ta), (b, tb) in pairs]


def _why(op: str, impl: str, row: Row, to: int) -> str:
    """The physical reason that fits the place of the bend."""
    cache = last_level_cache()
    if op == "width":
        size = row.d_in * to * (1 if impl == "ours" and row.T == 1 else 4)
        if size / 2 < cache:
            return f"the encoder's rows ({size / 1e6:.0f} MB) leave the last-level cache ({cache / 1e6:.0f} MB)"
        return "not explained: the traffic is proportional to the width here"
    if op == "tokens":
        if to <= 64:
            return "few tokens share one reading of the weights: memory bounds, and more tokens cost little"
        return "every token costs its arithmetic: the weights' reading no longer shows"
    return "expected: threads share one memory, and its bandwidth does not grow with them"


def memory(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Bytes that stay resident per width: full-precision matrices, and the screen's two digits and bounds."""
    shapes = dict.fromkeys((r.d_in, r.d_sae) for r in rows if r.suite == "scaling" and r.op == "width")
    return [
        {"d_in": d, "d_sae": F, "fp32_bytes": 8 * d * F, "bf16_bytes": 4 * d * F, "screen_bytes": most_bytes(d, F)}
        for d, F in shapes
    ]
