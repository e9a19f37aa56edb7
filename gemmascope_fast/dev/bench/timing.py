"""Interleaved repetitions: every round times every implementation once, so that a neighbour's burst hits them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gemmascope_fast.dev.bench.rows import Ratio

LEAST_ROUNDS, MOST_ROUNDS = 7, 300


class Seconds(float):
    """What a call returns that measured a part of itself: counted in place of the time of the whole call."""


def interleave(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """Seconds of each call in each round, fp64 [rounds]; about `seconds` in all, at least seven rounds.

    The order turns by one each round: no call always follows the same one.  Each is called once before.  A call that
    returns `Seconds` counts with those.
    """
    for call in calls.values():
        call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            found = calls[name]()
            taken = time.perf_counter() - start
            times[name].append(float(found) if isinstance(found, Seconds) else taken)
        rounds += 1
    return {name: np.array(own) for name, own in times.items()}


def percentiles_ms(times: np.ndarray) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile) in milliseconds."""
    median, p20, p80 = np.percentile(times, (50, 20, 80)) * 1e3
    return float(median), float(p20), float(p80)


def paired(baseline: np.ndarray, times: np.ndarray) -> Ratio:
    """The baseline's time over this one's, paired round by round."""
    median, p20, p80 = np.percentile(baseline / times, (50, 20, 80))
    return Ratio(float(median), float(p20), float(p80))
