"""The report's pictures: speed-up against T, roofline, scaling with width and threads, memory, quality against bits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmascope_fast.bench.rows import BASELINE, Results
from gemmascope_fast.errors import GemmaScopeFastError

OURS = "#d1495b"
PEERS = ("#30638e", "#00798c", "#edae49", "#66666e", "#9671bd", "#8c564b", "#7f7f7f", "#17becf")


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
    return pictures + (_quality(quality) if quality else [])


def load_quality(path: Path) -> list[dict[str, Any]]:
    """The figures of `gemmascope-fast quantize --table`: rows of method, bits a weight and loss."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for key, figure in found.items() if isinstance(found, dict) else ():
        parts = key.split("/")
        if len(parts) == 6 and isinstance(figure, dict):
            name = ", ".join((*parts[1:4], parts[5]))
            rows.append({"method": name, "bits": figure["bits_per_weight"], "loss": figure["loss"]})
    if not rows:
        raise GemmaScopeFastError(f"{path}: expected the JSON of gemmascope-fast quantize --table")
    return rows


def _figure(width: float = 7.2, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="both", alpha=0.25)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _color(impl: str, peers: Sequence[str]) -> str:
    return OURS if impl == "ours" else PEERS[list(peers).index(impl) % len(PEERS)]


# ---- speed-up ---------------------------------------------------------------------------------------


def _speedups(results: Results) -> list[Picture]:
    found = []
    shapes = dict.fromkeys((r.op, r.d_in, r.d_sae) for r in results.rows if r.op in ("encode", "decode", "SAE"))
    for op, d_in, d_sae in shapes:
        rows = [r for r in results.rows if (r.op, r.d_in, r.d_sae) == (op, d_in, d_sae)]
        if len({r.T for r in rows}) < 2:
            continue
        figure, axes = _figure()
        impls = [i for i in dict.fromkeys(r.impl for r in rows) if i != BASELINE]
        peers = [i for i in impls if i != "ours"]
        for impl in impls:
            points = sorted((r.T, results.ratios[r.key]) for r in rows if r.impl == impl and r.key in results.ratios)
            xs, ratios = [p[0] for p in points], [p[1] for p in points]
            style = {"color": _color(impl, peers), "marker": "o", "lw": 2.4 if impl == "ours" else 1.3}
            axes.plot(xs, [q.median for q in ratios], label=impl, **style)
            axes.fill_between(xs, [q.p20 for q in ratios], [q.p80 for q in ratios], color=style["color"], alpha=0.15)
        axes.axhline(1, color="black", lw=1, ls="--")
        axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel=f"times faster than {BASELINE}")
        axes.set_xticks(ticks := sorted({r.T for r in rows}), [str(t) for t in ticks])
        axes.set_yticks([t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.legend(fontsize=8)
        title = f"{op}, {d_in} × {d_sae}: speed-up against the number of tokens"
        text = "Medians of ratios paired round by round; the band is the 20th to the 80th percentile."
        found.append(Picture(f"speedup-{op.replace(' ', '-')}-{d_in}x{d_sae}", title, text, _png(figure)))
    return found


# ---- roofline ---------------------------------------------------------------------------------------


def _roofline(results: Results) -> list[Picture]:
    roof = results.machine.get("roof")
    rows = [r for r in results.rows if r.roof_share is not None and r.bytes and r.flops and "(warm)" not in r.op]
    if not roof or not rows:
        return []
    figure, axes = _figure()
    xs = [2.0**k for k in range(-2, 14)]
    for key, label, style in (("fma_gflop_s", "fp32", "-"), ("int8_gop_s", "int8", "--")):
        axes.plot(xs, [min(roof[key], roof["read_gb_s"] * x) for x in xs], "k" + style, lw=1, label=f"roof, {label}")
    impls = list(dict.fromkeys(r.impl for r in rows))
    peers = [i for i in impls if i != "ours"]
    for impl in impls:
        own = [r for r in rows if r.impl == impl]
        x = [(r.flops or 0) / (r.bytes or 1) for r in own]
        y = [(r.flops or 0) / r.median_ms / 1e6 for r in own]
        axes.scatter(x, y, s=26, color=_color(impl, peers), label=impl, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="1e9 operations per second")
    axes.legend(fontsize=7, ncols=2)
    title = f"Roofline: {roof['read_gb_s']:.1f} GB/s, {roof['fma_gflop_s']:.0f} fp32 Gflop/s measured in the run"
    text = "Bytes and operations are the least that each call can do; a dense peer counts all its products."
    return [Picture("roofline", title, text, _png(figure))]


# ---- scaling and memory -----------------------------------------------------------------------------


def _curves(results: Results) -> list[Picture]:
    found = []
    for op in ("width", "tokens", "threads"):
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
        axes.set(xscale="log", yscale="log", xlabel=op, ylabel="ms, whole SAE")
        axes.legend(fontsize=8)
        bends = [f"{c['impl']}, {c['at']}: {bend}" for c in curves for bend in c["bends"]]
        text = "Where a curve bends: " + "; ".join(bends) + "." if bends else "No step leaves the fitted exponent."
        found.append(Picture(f"scaling-{op}", f"Time against {op}", text, _png(figure)))
    return found


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
    axes.legend(fontsize=8)
    text = "Counted from the shapes: two matrices; two bytes a weight, and a few dozen a feature, for the screen."
    return [Picture("memory", f"Memory against width, d_in = {results.memory[0]['d_in']}", text, _png(figure))]


# ---- quality ----------------------------------------------------------------------------------------


def _quality(rows: list[dict[str, Any]]) -> list[Picture]:
    figure, axes = _figure()
    named: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        named.setdefault(str(row.get("method", "")), []).append((row["bits"], row["loss"]))
    for i, (method, points) in enumerate(named.items()):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", color=PEERS[i % len(PEERS)], label=method)
    axes.set(xlabel="bits a weight", ylabel="mean loss, nats a token", yscale="log")
    axes.legend(fontsize=8)
    return [Picture("quality", "Quality against bits", "One model at every width of one nested code.", _png(figure))]
