"""`gemmascope-fast compare variants`: how stable features and the model's label are over variants of one text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.errors import require
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import save_figure, shown

VOTERS = {"plain": "the plain text alone", "equal": "equal weights", "weighted": "fitted weights, held-out groups"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Groups of texts that mean the same: how similar the features that fire, how often the model's labels agree,"
        " and how well that agreement predicts a correct label."
    )
    common.add_pair(parser)
    note = "JSON lines: group, text, kind, label; a group's first text is the plain one; 'demo' is bundled"
    parser.add_argument("--data", default="demo", metavar="FILE", help=note)
    note = "the answers that the model chooses from (default: the model is not asked)"
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help=note)
    note = "the question; {text} becomes the text (default: '{text}\\nAnswer:')"
    parser.add_argument("--template", default="{text}\nAnswer:", metavar="TEXT", help=note)
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="MODEL", help="more models or classifiers that vote on the label"
    )
    common.add_seed(parser)
    common.add_json(parser)
    common.add_plot(parser, "the labels' reliability")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from gemmascope_fast.analysis.compare.variants import calibrate, groups_of, items, load_variants, stability
    from gemmascope_fast.analysis.pair import load_model
    from gemmascope_fast.checkpoints.bundled import example

    require("scipy", "analysis", "variants")
    if args.plot is not None and not args.labels:
        raise ValueError("--plot: expected --labels: the plot shows their reliability")
    variants = load_variants(example(args.data, "variants.jsonl"))
    groups = groups_of(variants)
    _check_labels(args, variants)
    model, tokenizer, sae, layer = common.load_pair(args)
    out: dict[str, Any] = {"groups": len(groups), "texts": len(variants)}
    out["features"] = stability(_fired(model, tokenizer, {(layer, "resid"): sae}, variants), groups)
    if args.labels:
        pairs = [(model, tokenizer), *(load_model(name, args.device, args.dtype) for name in args.also)]
        votes = _votes(pairs, variants, groups, args)
        out["items"] = items(votes, args.labels, [args.model, *args.also])
        out["agreement"] = votes.shares(np.ones(votes.size)).max(1).mean().item()
        if (votes.gold >= 0).any():
            out["calibration"] = calibrate(votes, args.seed)
    _show(out)
    common.write_figures(args, out)
    if args.plot is not None:
        _plot(out["calibration"], args.plot)
    return 0


def _check_labels(args: argparse.Namespace, variants: Any) -> None:
    """ValueError for labels that cannot be asked for, or too few of them for the plot: before anything is loaded."""
    known = {v.group: v.label for v in variants if v.label is not None}
    for group, label in known.items() if args.labels else ():
        if label not in args.labels:
            raise ValueError(f"--data: group {group!r} has label {label!r}, expected one of {', '.join(args.labels)}")
    if args.plot is not None and len(known) < 4:
        raise ValueError(f"--plot: expected at least four groups with a label in {args.data}, got {len(known)}")


def _fired(model: Any, tokenizer: Any, sites: Any, variants: Any) -> list[set[int]]:
    """Features that fired anywhere in each text."""
    from gemmascope_fast.analysis.extraction.texts import read_texts

    (key,) = sites
    with bar(total=len(variants), desc="reading", unit="text") as reading:
        texts = [v.text for v in variants]
        return [
            set(rows[key].col_indices.tolist()) if rows else set()
            for _, rows in read_texts(model, tokenizer, sites, texts, progress=reading.update)
        ]


def _votes(pairs: Any, variants: Any, groups: dict[str, list[int]], args: Any) -> Any:
    import numpy as np

    from gemmascope_fast.analysis.compare.variants import Votes, classify

    known = {v.group: v.label for v in variants if v.label is not None}
    with bar(total=len(pairs) * len(variants), desc="asking", unit="text") as asking:
        texts = [v.text for v in variants]
        predicted = [classify(m, t, texts, args.labels, args.template, asking.update) for m, t in pairs]
    kinds = sorted({v.kind for v in variants})
    names = list(groups)
    return Votes(
        np.array(predicted),
        np.array([kinds.index(v.kind) for v in variants]),
        np.array([names.index(v.group) for v in variants]),
        np.array([args.labels.index(known[n]) if n in known else -1 for n in names]),
        len(args.labels),
        kinds,
        names,
    )


def _show(out: dict[str, Any]) -> None:
    rows = [
        ("features shared by two variants (Jaccard)", shown(out["features"]["jaccard"])),
        ("features shared by two groups", shown(out["features"]["across"])),
    ]
    if "agreement" in out:
        rows.append(("votes for a group's most frequent label", shown(out["agreement"])))
    calibration = out.get("calibration", {})
    for name, figures in VOTERS.items():
        for key in ("accuracy", "brier", "ece") if name in calibration else ():
            rows.append((f"{key}, {figures}", shown(calibration[name][key])))
    common.print_table(("figure", "value"), rows, f"{out['texts']} texts in {out['groups']} groups")
    if "not_fitted" in calibration:
        print(calibration["not_fitted"])


def _plot(found: dict[str, Any], path: Path) -> None:
    """Reliability: share of groups whose label is right, by confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#888", linewidth=0.8)
    for i, name in enumerate(name for name in VOTERS if name in found):
        bins = found[name]["bins"]
        sizes = [20 + 8 * b["count"] for b in bins]
        axes.scatter([b["confidence"] for b in bins], [b["accuracy"] for b in bins], s=sizes, alpha=0.7, c=f"C{i}",
                     label=f"{name}: Brier {found[name]['brier']:.3f}, ECE {found[name]['ece']:.3f}")  # fmt: skip
    axes.set(
        xlabel="confidence: weighted share of votes", ylabel="share that is right", xlim=(0, 1.03), ylim=(-0.03, 1.03)
    )
    # above: the points lie along the diagonal, and often at its ends
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    save_figure(figure, path)
