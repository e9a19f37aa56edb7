"""The report's pictures: speed-up against T, roofline, scaling with width and threads, memory, quality against bits."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemmascope_fast.dev.bench.rows import BASELINE, Results
from gemmascope_fast.errors import GemmaScopeFastError

OURS = "#d1495b"
VARIANTS = ("#8b1e2d", "#eb9aa5", "#f0c5a0")  # of ours: with and without the screen, at fewer bits
PEERS = ("#30638e", "#00798c", "#edae49", "#66666e", "#9671bd", "#8c564b", "#17becf", "#7a9e3f")
MARKERS = "os^DvP*X"


@dataclass(frozen=True)
class Picture:
    """A plot with its file name, its title and what it says."""

    name: str
    title: str
    text: str
    png: bytes


def draw(results: Results, quality: list[dict[str, Any]] | None = None) -> list[Picture]:
    """Every picture that the rows allow.  Raises GemmaScopeFastError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise GemmaScopeFastError("the report draws with matplotlib: pip install 'gemmascope-fast[plot]'") from error
    matplotlib.use("Agg")
    pictures = [*_speedups(results), *_roofline(results), *_curves(results), *_memory(results)]
    pictures += _quality(quality) if quality else []
    source = digest(results)
    return [replace(picture, png=_stamped(picture.png, source)) for picture in pictures]


def digest(results: Results) -> str:
    """What names the figures that a picture shows: a hash of rows and ratios, kept in each picture."""
    figures = [asdict(r) for r in results.rows], {key: asdict(q) for key, q in results.ratios.items()}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()


def _stamped(png: bytes, source: str) -> bytes:
    """The PNG with a text chunk "Source" before its end.  A chunk: length, kind, data, CRC; IEND has 12 bytes."""
    chunk = b"tEXt" + b"Source\0" + source.encode("ascii")
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:-12] + whole + png[-12:]


def load_quality(path: Path) -> list[dict[str, Any]]:
    """The figures of `gemmascope-fast quantize --table` or `compare`: rows of method, activations, bits a weight and
    loss, and one of method "full", without bits, where the unquantised model was measured."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for key, figure in found.items() if isinstance(found, dict) else ():
        parts = key.split("/")
        if not isinstance(figure, dict) or "loss" not in figure:
            continue
        if key == "full":
            rows.append({"method": "full", "activations": "exact", "bits": None, "loss": figure["loss"]})
        elif len(parts) == 6 and "bits_per_weight" in figure:
            scope, grouping, method, slicing, _bits, activations = parts
            # each width trained alone is a model of its own: together they are one curve
            method = re.sub(r"-\d+-alone$", "", method)
            name = f"{scope}, {grouping}, {method}, {slicing}"
            bits, loss = figure["bits_per_weight"], figure["loss"]
            rows.append({"method": name, "activations": activations, "bits": bits, "loss": loss})
    if not any(row["bits"] is not None for row in rows):
        raise GemmaScopeFastError(f"{path}: expected the JSON of gemmascope-fast quantize --table or compare")
    return rows


def _figure(width: float = 9.0, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="both", alpha=0.25)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _plain_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Numbers as one writes them on a logarithmic axis, not powers of ten, and no minor ones."""
    from matplotlib import ticker

    low, high = limits
    steps = [s * 10.0**e for e in range(-6, 9) for s in (1, 2, 5)]
    axis.set_major_locator(ticker.FixedLocator([s for s in steps if low <= s <= high]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _colors(results: Results) -> dict[str, str]:
    """One colour for each implementation, the same in every picture."""
    impls = list(dict.fromkeys(r.impl for r in results.rows))
    variants = [i for i in impls if i.startswith("ours") and i != "ours"]
    peers = [i for i in impls if not i.startswith("ours")]
    found = {impl: VARIANTS[k % len(VARIANTS)] for k, impl in enumerate(variants)}
    return {"ours": OURS, **found, **{impl: PEERS[k % len(PEERS)] for k, impl in enumerate(peers)}}


def _legend(figure: Any) -> None:
    """Beside the axes, where it hides no curve."""
    figure.legend(loc="outside right upper", fontsize=8)


# ---- speed-up ---------------------------------------------------------------------------------------


def _speedups(results: Results) -> list[Picture]:
    found, colors = [], _colors(results)
    shapes = dict.fromkeys((r.op, r.d_in, r.d_sae) for r in results.rows if r.op in ("encode", "decode", "SAE"))
    for op, d_in, d_sae in shapes:
        rows = [r for r in results.rows if (r.op, r.d_in, r.d_sae) == (op, d_in, d_sae)]
        if len({r.T for r in rows}) < 2:
            continue
        figure, axes = _figure()
        impls = [i for i in dict.fromkeys(r.impl for r in rows) if i != BASELINE]
        for impl in impls:
            points = sorted((r.T, results.ratios[r.key]) for r in rows if r.impl == impl and r.key in results.ratios)
            xs, ratios = [p[0] for p in points], [p[1] for p in points]
            style = {"color": colors[impl], "marker": "o", "lw": 2.4 if impl == "ours" else 1.3}
            axes.plot(xs, [q.median for q in ratios], label=impl, **style)
            axes.fill_between(xs, [q.p20 for q in ratios], [q.p80 for q in ratios], color=style["color"], alpha=0.15)
        axes.axhline(1, color="black", lw=1, ls="--")
        axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel=f"times faster than {BASELINE}")
        axes.set_xticks(ticks := sorted({r.T for r in rows}), [str(t) for t in ticks])
        _plain_ticks(axes.yaxis, axes.get_ylim())
        _legend(figure)
        title = f"{op}, {d_in} × {d_sae}: speed-up against the number of tokens"
        text = "Medians of ratios paired round by round; the band is the 20th to the 80th percentile."
        found.append(Picture(f"speedup-{op.replace(' ', '-')}-{d_in}x{d_sae}", title, text, _png(figure)))
    return found


# ---- roofline ---------------------------------------------------------------------------------------


def _roofline(results: Results) -> list[Picture]:
    roof = results.machine.get("roof")
    counted = (r for r in results.rows if r.roof_share is not None and r.bytes and r.flops)
    rows = [r for r in counted if r.suite != "scaling" and "(warm)" not in r.op]
    if not roof or not rows:
        return []
    figure, axes = _figure()
    ridges = [roof[key] / roof["read_gb_s"] for key in ("fma_gflop_s", "int8_gop_s")]
    xs = sorted([0.25, 2.0**13, *ridges])
    for key, label, style in (("fma_gflop_s", "fp32", "-"), ("int8_gop_s", "int8", "--")):
        axes.plot(xs, [min(roof[key], roof["read_gb_s"] * x) for x in xs], "k" + style, lw=1, label=f"roof, {label}")
    colors, ops = _colors(results), list(dict.fromkeys(r.op for r in rows))
    impls = dict.fromkeys(r.impl for r in rows)
    for row in rows:
        x, y = (row.flops or 0) / (row.bytes or 1), (row.flops or 0) / row.median_ms / 1e6
        marker = MARKERS[ops.index(row.op) % len(MARKERS)]
        axes.scatter(x, y, s=26, color=colors[row.impl], marker=marker, zorder=3)
    for impl in impls:
        axes.plot([], [], color=colors[impl], marker="o", ls="", label=impl)
    for op, marker in zip(ops, itertools.cycle(MARKERS), strict=False):
        axes.plot([], [], color="white", markeredgecolor="black", marker=marker, ls="", label=op)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="1e9 operations per second")
    _legend(figure)
    title = f"Roofline: {roof['read_gb_s']:.1f} GB/s, {roof['fma_gflop_s']:.0f} fp32 Gflop/s measured in the run"
    text = "Bytes and operations are the least that each call can do; a dense peer counts all its products."
    return [Picture("roofline", title, text, _png(figure))]


# ---- scaling and memory -----------------------------------------------------------------------------


def _curves(results: Results) -> list[Picture]:
    found = []
    names = {
        "width": "d_sae",
        "tokens": "tokens T",
        "l0": "features that fire (L0)",
        "layers": "SAEs",
        "threads": "threads",
    }
    for op, name in names.items():
        curves = [c for c in results.exponents if c["op"] == op]
        if not curves:
            continue
        figure, axes = _figure()
        for curve in curves:
            xs, ys = zip(*curve["points"], strict=True)
            style = "-" if curve["impl"] == "ours" else "--"
            label = f"{curve['impl']}, {curve['at']}: exponent {curve['exponent']:.2f}"
            color = OURS if curve["impl"] == "ours" else PEERS[0]
            marker = "o" if curve["at"] == curves[0]["at"] else "s"
            axes.plot(xs, ys, style, marker=marker, color=color, label=label)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="ms, whole SAE")
        ticks: list[float] = []
        for x in sorted({x for curve in curves for x, _ in curve["points"]}):
            if not ticks or x > 1.2 * ticks[-1]:  # curves whose tokens fire differently share their labels
                ticks.append(x)
        axes.set_xticks(ticks, [_short(x) for x in ticks])
        axes.set_xticks([], minor=True)
        _plain_ticks(axes.yaxis, axes.get_ylim())
        _legend(figure)
        bends = [f"{c['impl']}, {c['at']}: {bend}" for c in curves for bend in c["bends"]]
        text = "\n".join(("Where a curve bends:", *bends)) if bends else "No step leaves the fitted exponent."
        found.append(Picture(f"scaling-{op}", f"Time against {op}", text, _png(figure)))
    return found


def _short(size: float) -> str:
    """65536 as 64k, 1048576 as 1m; small numbers as they are."""
    for unit, name in ((1 << 20, "m"), (1 << 10, "k")):
        if size >= 4 * (1 << 10) and size % unit == 0:
            return f"{size // unit:.0f}{name}"
    return f"{size:g}"


def _memory(results: Results) -> list[Picture]:
    if not results.memory:
        return []
    figure, axes = _figure()
    widths = [m["d_sae"] for m in results.memory]
    series: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...] = (
        ("fp32 weights", PEERS[0], lambda m: m["fp32_bytes"]),
        ("bf16 weights", PEERS[1], lambda m: m["bf16_bytes"]),
        ("fp32 weights and the screen", OURS, lambda m: m["fp32_bytes"] + m["screen_bytes"]),
        ("the screen alone, fp32 rows on disk", PEERS[2], lambda m: m["screen_bytes"]),
    )
    for label, color, of in series:
        axes.plot(widths, [of(m) / 1e9 for m in results.memory], marker="o", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="d_sae", ylabel="GB")
    axes.set_xticks(widths, [_short(w) for w in widths])
    axes.set_xticks([], minor=True)
    _plain_ticks(axes.yaxis, axes.get_ylim())
    _legend(figure)
    text = (
        "What the tensors of an SAE held that was built at each width: two matrices in fp32 (in bf16 half of it), and"
        " the screen's two bytes a weight and few dozen a feature.  So many SAEs take so many times as much."
    )
    return [Picture("memory", f"Memory against width, d_in = {results.memory[0]['d_in']}", text, _png(figure))]


# ---- quality ----------------------------------------------------------------------------------------


def _quality(rows: list[dict[str, Any]]) -> list[Picture]:
    figure, axes = _figure(10.0, 4.8)
    full = [row["loss"] for row in rows if row["bits"] is None]
    measured = [row for row in rows if row["bits"] is not None]
    methods = list(dict.fromkeys(str(row["method"]) for row in measured))
    for method, activations in dict.fromkeys((str(r["method"]), str(r["activations"])) for r in measured):
        own = [r for r in measured if (r["method"], r["activations"]) == (method, activations)]
        xs, ys = zip(*sorted((r["bits"], r["loss"]) for r in own), strict=True)
        exact = activations == "exact"
        color = PEERS[methods.index(method) % len(PEERS)]
        label = method if exact else None
        axes.plot(xs, ys, marker="o" if exact else "x", ls="-" if exact else ":", color=color, label=label)
    if full:
        axes.axhline(full[0], color="black", lw=1, ls="--", label=f"unquantised: {full[0]:.3f}")
    axes.set(xlabel="bits a weight", ylabel="mean loss, nats a token", yscale="log")
    _plain_ticks(axes.yaxis, axes.get_ylim())
    _legend(figure)
    text = (
        "Layers, scales and method of each curve stand in the legend.  Solid: exact activations; dotted, with crosses:"
        " the int8 activations of the fast kernel."
    )
    return [Picture("quality", "Quality against bits", text, _png(figure))]
