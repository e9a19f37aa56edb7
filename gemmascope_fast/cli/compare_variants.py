"""`gemmascope-fast compare variants`: how stable features and the model's label are over variants of one text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gemmascope_fast.checkpoints.bundled import example
from gemmascope_fast.cli.arguments import add_output_arguments, add_pair_arguments, check_outputs
from gemmascope_fast.errors import require
from gemmascope_fast.files.results import save_figure, shown, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Groups of texts that mean the same: how alike the features that fire, how often the model's label agrees, and"
        " how well that share of agreement predicts that it is right."
    )
    add_pair_arguments(parser)
    parser.add_argument(
        "--data", default="demo", metavar="FILE", help="JSON lines: group, text, kind, label (default: bundled)"
    )
    parser.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="what the model may answer (default: nothing is asked)"
    )
    parser.add_argument("--prompt", default="{text}\nAnswer:", help="of the question, with {text}")
    parser.add_argument("--also", nargs="*", default=[], metavar="MODEL", help="more models that vote on the label")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.compare.variants import calibrate, groups_of, load_variants, stability
    from gemmascope_fast.analysis.pair import load_model, load_pair

    require("scipy", "analysis", "variants")
    check_outputs(args)
    if args.plot is not None and not args.labels:
        raise ValueError("--plot: expected --labels, for the plot is of their reliability")
    variants = load_variants(example(args.data, "variants.jsonl"))
    groups = groups_of(variants)
    _check_labels(args, variants)
    model, tokenizer, sae, layer = load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere)
    out: dict[str, Any] = {"groups": len(groups), "texts": len(variants)}
    out["features"] = stability(_fired(model, tokenizer, {(layer, "resid"): sae}, variants), groups)
    if args.labels:
        pairs = [(model, tokenizer), *(load_model(name) for name in args.also)]
        votes = _votes(pairs, variants, groups, args)
        out["agreement"] = votes.shares(np.ones(votes.size)).max(1).mean().item()
        if (votes.gold >= 0).sum() >= 4:
            out["calibration"] = calibrate(votes, args.seed)
    _show(out)
    if args.json is not None:
        write_json(args.json, out)
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
    from tqdm import tqdm

    from gemmascope_fast.analysis.extraction.texts import read_texts

    (key,) = sites
    with tqdm(total=len(variants), desc="reading", unit="text") as bar:
        texts = [v.text for v in variants]
        return [
            set(rows[key].col_indices.tolist()) if rows else set()
            for _, rows in read_texts(model, tokenizer, sites, texts, progress=bar.update)
        ]


def _votes(pairs: Any, variants: Any, groups: dict[str, list[int]], args: Any) -> Any:
    from tqdm import tqdm

    from gemmascope_fast.analysis.compare.variants import Votes, classify

    known = {v.group: v.label for v in variants if v.label is not None}
    with tqdm(total=len(pairs) * len(variants), desc="asking", unit="text") as bar:
        texts = [v.text for v in variants]
        predicted = [classify(m, t, texts, args.labels, args.prompt, bar.update) for m, t in pairs]
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
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=f"{out['texts']} texts in {out['groups']} groups")
    table.add_row("features shared by two variants (Jaccard)", shown(out["features"]["jaccard"]))
    table.add_row("features shared by two groups", shown(out["features"]["across"]))
    if "agreement" in out:
        table.add_row("votes for a group's most frequent label", shown(out["agreement"]))
    for name, figures in (("equal", "equal weights"), ("weighted", "fitted weights")):
        for key in ("accuracy", "brier", "ece") if "calibration" in out else ():
            table.add_row(f"{key}, {figures}, held-out groups", shown(out["calibration"][name][key]))
    Console().print(table)


def _plot(found: dict[str, Any], path: Path) -> None:
    """Reliability: share of groups whose label is right, by confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#888", linewidth=0.8)
    for i, name in enumerate(("equal", "weighted")):
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
