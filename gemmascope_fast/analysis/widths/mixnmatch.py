"""Mix'n'Match: a width for every layer of one nested model, to trade accuracy against bytes.

Fixed patterns distribute a budget over depth. `search` spends it where it reduces the loss most: greedily, starting at
the widest model, by the loss that each layer alone adds at each width (it assumes that these losses add up).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gemmascope_fast.errors import require
from gemmascope_fast.files.results import save_figure, write_json
from gemmascope_fast.ops.codes import check_bits
from gemmascope_fast.quant.model import layers, set_bits

PATTERNS = ("pyramid", "reverse-pyramid", "increasing", "decreasing")
WIDTHS = (8, 6, 4, 3, 2)  # bits: compared, tabulated and mixed


class Unit(NamedTuple):
    """A unit with one width: a block's layers, as patterns for `set_bits`, and their bytes at each width."""

    name: str
    layers: tuple[str, ...]
    nbytes: dict[int, int]


class Point(NamedTuple):
    """One model of a frontier."""

    label: str
    widths: dict[str, int]  # by unit
    nbytes: int
    loss: float


def units(model: nn.Module, widths: Iterable[int] = WIDTHS, mode: str | None = None) -> list[Unit]:
    """The quantised layers of a model, grouped by decoder block, found from the number in their path."""
    found: dict[str, list[str]] = {}
    for name in layers(model):
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 1)
        found.setdefault(".".join(parts[: last + 1]), []).append(name)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no quantised layer; call quantize_ first")
    held = layers(model)
    return [
        Unit(
            unit, tuple(names), {b: sum(held[n].packed.nbytes(b, mode or held[n].mode) for n in names) for b in widths}
        )
        for unit, names in found.items()
    ]


def pattern(kind: str, count: int, narrow: int, wide: int, share: float) -> list[int]:
    """Widths of `count` blocks, where `share` are wide: "pyramid" the middle ones, "reverse-pyramid" those at both
    ends, "increasing" the last, "decreasing" the first.  ValueError for another kind or a share outside [0, 1].
    """
    check_bits(narrow, "narrow")
    check_bits(wide, "wide")
    if kind not in PATTERNS:
        raise ValueError(f"kind: expected one of {', '.join(PATTERNS)}, got {kind!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a share from 0 to 1, got {share}")
    many = round(share * count)
    centre = (count - 1) / 2
    rank: Callable[[int], float] = {
        "pyramid": lambda i: abs(i - centre),
        "reverse-pyramid": lambda i: -abs(i - centre),
        "increasing": lambda i: -i,
        "decreasing": lambda i: i,
    }[kind]
    chosen = set(sorted(range(count), key=lambda i: (rank(i), i))[:many])
    return [wide if i in chosen else narrow for i in range(count)]


def total(choice: Mapping[str, int], parts: list[Unit]) -> int:
    """Bytes of a choice of widths by unit."""
    return sum(unit.nbytes[choice[unit.name]] for unit in parts)


def apply(model: nn.Module, choice: Mapping[str, int], parts: list[Unit], mode: str | None = None) -> None:
    """Set the chosen widths."""
    set_bits(model, {name: choice[unit.name] for unit in parts for name in unit.layers}, mode)


def sensitivities(
    model: nn.Module,
    loss: Callable[[], float],
    parts: list[Unit],
    known: Callable[[str, Callable[[], float]], float] = lambda _key, measure: measure(),
    mode: str | None = None,
) -> dict[str, dict[int, float]]:
    """Loss that each unit alone adds at each of its widths, with the others at the widest.

    known(key, measure) may store figures, so that an interrupted sweep continues.
    """
    widest = {unit.name: max(unit.nbytes) for unit in parts}

    def at(choice: Mapping[str, int], key: str) -> float:
        def measure() -> float:
            apply(model, choice, parts, mode)
            return loss()

        return known(key, measure)

    base = at(widest, "widest")
    added = {}
    for unit in parts:
        top = widest[unit.name]
        added[unit.name] = {
            bits: 0.0 if bits == top else at(widest | {unit.name: bits}, f"{unit.name}={bits}") - base
            for bits in sorted(unit.nbytes, reverse=True)
        }
    apply(model, widest, parts, mode)
    return added


def path(parts: list[Unit], added: Mapping[str, Mapping[int, float]]) -> list[dict[str, int]]:
    """Choices from the widest to the narrowest: each step narrows the unit that adds least loss per byte saved.

    Steps follow the lower convex hull of each unit's (bytes, loss), so a width that is worse than a mixture of its
    neighbours is skipped.
    """
    moves = []
    for unit in parts:
        hull = _hull([(unit.nbytes[b], added[unit.name][b], b) for b in sorted(unit.nbytes, reverse=True)])
        for (size, loss, _), (smaller, more, bits) in pairwise(hull):
            moves.append(((more - loss) / (size - smaller), unit.name, bits))
    choice = {unit.name: max(unit.nbytes) for unit in parts}
    choices = [dict(choice)]
    # slopes rise along a hull, so sorting keeps a unit's moves in order
    for _, name, bits in sorted(moves, key=lambda m: m[0]):
        choice[name] = bits
        choices.append(dict(choice))
    return choices


def _hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Lower convex hull of (bytes falling, loss, bits)."""
    kept: list[tuple[int, float, int]] = []
    for point in points:
        if kept and point[0] == kept[-1][0]:
            continue  # saves no bytes
        while len(kept) >= 2 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def _slope(wide: tuple[int, float, int], narrow: tuple[int, float, int]) -> float:
    return (narrow[1] - wide[1]) / (wide[0] - narrow[0])


def search(parts: list[Unit], added: Mapping[str, Mapping[int, float]], budget: int) -> dict[str, int]:
    """Widths by unit within `budget` bytes.  ValueError if even the narrowest model is larger."""
    for choice in path(parts, added):
        if total(choice, parts) <= budget:
            return choice
    least = min(total(choice, parts) for choice in path(parts, added))
    raise ValueError(f"budget: expected at least {least} bytes, the narrowest model, got {budget}")


def candidates(
    parts: list[Unit], added: Mapping[str, Mapping[int, float]] | None, points: int
) -> dict[str, dict[str, int]]:
    """Choices of widths to measure, by label: every uniform width, the patterns between neighbours, the search."""
    names = [unit.name for unit in parts]
    widths = sorted(parts[0].nbytes, reverse=True)
    found = {f"uniform int{bits}": dict.fromkeys(names, bits) for bits in widths}
    for wide, narrow in ((8, 4), (4, 2), (8, 2)):
        if wide in widths and narrow in widths:
            for kind in PATTERNS:
                chosen = pattern(kind, len(names), narrow, wide, 0.5)
                found[f"{kind} {wide}/{narrow}"] = dict(zip(names, chosen, strict=True))
    if added is not None:
        choices = path(parts, added)
        least, most = total(choices[-1], parts), total(choices[0], parts)
        for i in range(1, points + 1):
            budget = math.floor(least + (most - least) * i / (points + 1))
            found[f"search {budget}"] = search(parts, added, budget)
    return found


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points for which no other point has both fewer bytes and less loss, from small to large."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def save_json(points: list[Point], file: Path, about: Mapping[str, Any]) -> None:
    """All points, with those on the frontier marked."""
    best = {point.label for point in frontier(points)}
    rows = [{**p._asdict(), "frontier": p.label in best} for p in sorted(points, key=lambda p: p.nbytes)]
    write_json(file, {**about, "points": rows})


def plot(points: list[Point], file: Path, title: str) -> None:
    """Plot loss against bytes.  ValueError with what to install if matplotlib is missing."""
    require("matplotlib", "plot", "--plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    marks = {"uniform": "s", "search": "o"}
    for kind in sorted({p.label.split()[0] for p in points}):
        own = sorted((p for p in points if p.label.startswith(kind + " ")), key=lambda p: p.nbytes)
        axes.plot([p.nbytes / 1e6 for p in own], [p.loss for p in own], marks.get(kind, "x"), label=kind)
    best = frontier(points)
    axes.plot([p.nbytes / 1e6 for p in best], [p.loss for p in best], "-", color="grey", linewidth=0.8, zorder=0)
    axes.set(xlabel="MB of quantised weights", ylabel="loss, nats a token", title=title)
    axes.legend()
    save_figure(figure, file)
