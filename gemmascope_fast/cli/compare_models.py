"""`gemmascope-fast compare models`: features gained, lost and moved between two models on the same text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.errors import require
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import save_figure, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads the same texts with two models.  With one SAE: which features are kept, moved, lost, gained.  With one"
        " SAE for each model: which features fire alike.  Tokens are aligned by the characters that they cover."
    )
    common.add_pair(parser)
    parser.add_argument("--model-b", required=True, metavar="MODEL", help="the second model")
    parser.add_argument("--sae-b", metavar="SAE", help="the second model's SAE (default: the same for both)")
    parser.add_argument("--sae-b-id", metavar="ID", help="that SAE within its repository")
    note = "the layer whose output that SAE reads (default: that SAE's own, or --layer)"
    parser.add_argument("--layer-b", type=int, metavar="N", help=note)
    common.add_documents(parser, "paragraph")
    parser.add_argument("--most", type=int, default=500, metavar="N", help="read at most this many texts")
    common.add_window(parser)
    parser.add_argument("--top", type=int, default=15, metavar="N", help="rows of the table")
    common.add_json(parser)
    common.add_plot(parser)


def run(args: argparse.Namespace) -> int:
    from itertools import islice

    from gemmascope_fast.analysis.compare.models import changes, gather, matches
    from gemmascope_fast.analysis.extraction.sources import documents, resolve
    from gemmascope_fast.analysis.pair import load_model, load_sae
    from gemmascope_fast.cli.extract import sites_of

    require("scipy", "analysis", "compare-models")
    common.check_least(args, "most")
    stream = ("".join(d.parts) for d in documents(resolve(args.text), args.column, args.split))
    texts = list(islice((t for t in stream if t.strip()), args.most))
    if not texts:
        raise ValueError(f"--text: expected at least one text, got none in {', '.join(args.text)}")
    sae = load_sae(args.sae, args.sae_id, args.device)
    sae_b = load_sae(args.sae_b, args.sae_b_id, args.device) if args.sae_b else sae
    if sae_b is sae and args.anywhere:
        sae_b = load_sae(args.sae, args.sae_id, args.device)  # one SAE has one site: each side gets its own
    layer_b = args.layer if args.layer_b is None and args.sae_b is None else args.layer_b
    sides: list[Any] = []
    for name, own, layer in ((args.model, sae, args.layer), (args.model_b, sae_b, layer_b)):
        sites_of(own, layer, args.anywhere)
        sides.append((*load_model(name, args.device, args.dtype), {own.cfg.site if layer is None else layer: own}))
    with bar(total=2 * len(texts), desc="reading", unit="text") as reading:
        a, b = gather(sides[0], sides[1], texts, window=args.window, progress=reading.update)
    out: dict[str, Any] = {"texts": len(texts), "spans": a.shape[0]}
    if args.sae_b is None:
        out["features"] = changes(a, b)
        out["counts"] = {w: sum(r["what"] == w for r in out["features"]) for w in WHAT}
    else:
        out["features"] = matches(a, b)
    _show(out, args.top)
    common.write_figures(args, out)
    if args.plot is not None:
        _plot(out, args.plot)
    return 0


WHAT = ("kept", "moved", "lost", "gained", "changed")


def _show(out: dict[str, Any], top: int) -> None:
    if not out["features"]:
        print("No feature fires often enough to be compared.")
        return
    rows = [
        [str(v) if n in ("feature", "match") else shown(v) for n, v in record.items()]
        for record in out["features"][:top]
    ]
    common.print_table(list(out["features"][0]), rows, f"{out['texts']} texts, {out['spans']} spans of characters")
    if "counts" in out:
        print(", ".join(f"{n} {what}" for what, n in out["counts"].items()))


def _plot(out: dict[str, Any], path: Path) -> None:
    """With one SAE firing in one model against the other; with two the histogram of the best correlations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    if "counts" in out:
        for i, what in enumerate(WHAT):
            own = [r for r in out["features"] if r["what"] == what]
            axes.scatter(
                [r["fired_a"] + 0.5 for r in own], [r["fired_b"] + 0.5 for r in own], s=7, c=f"C{i}", label=what
            )
        axes.set(xscale="log", yscale="log", xlabel="spans, first model", ylabel="spans, second model")
        axes.legend()
    else:
        axes.hist([r["match_correlation"] for r in out["features"]], bins=40, color="#3b6ea5")
        axes.set(xlabel="correlation of firing with the best match", ylabel="features of the first SAE")
    save_figure(figure, path)
