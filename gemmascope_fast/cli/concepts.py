"""`gemmascope-fast concepts`: detection and steering by SAE, DiffMean, linear probe and ReFT-r1."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.errors import require
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "AxBench's methods offline.  Half of each concept's texts train, the other half test: ROC AUC of the maximum"
        " over tokens, also against hard negatives only (label 0); then steering with several factors."
    )
    common.add_pair(parser)
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSON lines: text, concept, label (default: bundled)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="of SAE DiffMean probe ReFT-r1 (default: all)")
    note = "steering factors; without a number nothing is steered"
    parser.add_argument("--factors", nargs="*", type=float, default=[0.2, 0.4, 1.0, 2.0], metavar="X", help=note)
    parser.add_argument("--reft-steps", type=int, default=12, metavar="N", help="training steps of ReFT-r1")
    common.add_seed(parser)
    common.add_prompt(parser, "show the model's continuation of it, steered with the factor of largest gain")
    common.add_json(parser)
    common.add_plot(parser)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.concepts.data import BUNDLED, load_examples, split
    from gemmascope_fast.analysis.concepts.run import METHODS, Concepts

    require("sklearn", "analysis", "concepts")
    methods = args.methods or list(METHODS)
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {method!r}")
    common.check_least(args, "reft_steps")
    examples = load_examples(args.data or BUNDLED)
    splits = split(examples, args.seed)
    model, tokenizer, sae, layer = common.load_pair(args)
    with bar(total=len(examples), desc="reading", unit="text") as reading:
        made = Concepts(model, tokenizer, sae, layer, examples, reading.update)
    rows: list[dict[str, Any]] = []
    written = []
    with bar(total=len(splits) * len(methods) * (1 + len(args.factors)), desc="concepts", unit="step") as steps:
        for part in splits:
            for detector in made.fit(part, methods, {"steps": args.reft_steps}, steps.update):
                row = {"concept": part.concept, "method": detector.method, **made.detect(detector, part)}
                if args.factors:
                    row["steering"] = made.steer(detector, part, args.factors, steps.update)
                    best = max(row["steering"], key=lambda s: s["gain"])
                    row |= {"best_factor": best["factor"], "gain": best["gain"], "cost": best["cost"]}
                    if args.prompt is not None:
                        text = made.write_on(detector, args.prompt, best["factor"])
                        written.append({"concept": part.concept, "method": detector.method, "text": text})
                rows.append(row)
    show(rows, methods, written)
    settings = {name: getattr(args, name) for name in ("model", "sae", "seed", "reft_steps", "factors")}
    settings |= {"layer": layer, "texts": len(examples)}
    common.write_figures(args, {"settings": settings, "means": means(rows, methods), "rows": rows, "written": written})
    if args.plot is not None:
        plot(rows, methods, args.plot)
    return 0


FIGURES = ("auc", "auc_hard", "separation", "gain", "cost")


def means(rows: list[dict[str, Any]], methods: list[str]) -> dict[str, dict[str, float]]:
    """Mean over concepts of each figure that every row of a method has."""
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        found[method] = {f: sum(row[f] for row in own) / len(own) for f in FIGURES if all(f in row for row in own)}
    return found


def show(rows: list[dict[str, Any]], methods: list[str], written: list[dict[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = [f for f in FIGURES if f in rows[0]]
    steered = ["factor"] if "best_factor" in rows[0] else []
    title = "Concepts: detection and steering" if steered else "Concepts: detection"
    # no lines between columns, heads in two words: it fits a terminal of 80
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("concept", "method", *columns, *steered, "feature"):
        table.add_column({"auc_hard": "hard\nauc", "separation": "sepa-\nration"}.get(name, name), overflow="fold")
    for row in rows:
        feature = "" if row["feature"] is None else str(row["feature"])
        factor = [f"{row['best_factor']:g}"] if steered else []
        table.add_row(row["concept"], row["method"], *(_short(row[c]) for c in columns), *factor, feature)
    table.add_section()
    for method, figures in means(rows, methods).items():
        table.add_row("mean", method, *(_short(figures.get(c, math.nan)) for c in columns))
    Console().print(table)
    for each in written:
        Console().print(Text(f"{each['concept']}, {each['method']}: {each['text']!r}"))


def _short(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{figure:.3f}"


def plot(rows: list[dict[str, Any]], methods: list[str], path: Path) -> None:
    """AUC by concept and method; and gain against cost over the factors, averaged over concepts."""
    from matplotlib.figure import Figure

    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    steering = "steering" in rows[0]
    figure = Figure(figsize=(11 if steering else 7, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if steering else 1, squeeze=False)[0]
    for i, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        # a line of its own for each method, the first on top: many are 1
        at = [c + 0.16 * ((len(methods) - 1) / 2 - i) for c in range(len(concepts))]
        axes[0].plot([row["auc"] for row in own], at, "o", markersize=5, label=method, color=f"C{i}")
        axes[0].plot([row["auc_hard"] for row in own], at, "x", markersize=5, color=f"C{i}")
        if steering:
            each = [row["steering"] for row in own]
            mean = [[sum(s[j][k] for s in each) / len(each) for j in range(len(each[0]))] for k in ("cost", "gain")]
            axes[1].plot(*mean, "o-", color=f"C{i}", label=method)
    axes[0].set(yticks=range(len(concepts)), yticklabels=concepts, xlabel="ROC AUC (x: against hard negatives)")
    axes[0].axvline(0.5, color="#888", linewidth=0.8)
    axes[0].legend(loc="lower left")
    if steering:
        axes[1].set(xlabel="cost: nats a token that other texts lose", ylabel="gain of the concept's texts over them")
        axes[1].axhline(0, color="#888", linewidth=0.8)
    save_figure(figure, path)
