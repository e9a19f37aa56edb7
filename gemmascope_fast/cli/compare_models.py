"""`gemmascope-fast compare models`: features gained, lost and moved between two models on the same text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import add_output_arguments, add_pair_arguments, check_outputs
from gemmascope_fast.errors import require
from gemmascope_fast.files.results import save_figure, shown, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads the same texts with two models.  With one SAE: which features are kept, moved, lost, gained.  With one"
        " each: which features fire alike.  Tokens are aligned by the characters they cover."
    )
    add_pair_arguments(parser)
    parser.add_argument("--model-b", required=True, help="the second model")
    parser.add_argument("--sae-b", help="its SAE (default: the same for both)")
    parser.add_argument("--sae-b-id", help="the SAE within its repository")
    parser.add_argument("--layer-b", type=int, help="default: that SAE's own, or --layer")
    parser.add_argument("--text", nargs="+", default=["pydoc"], metavar="TEXT", help="as `extract --text` takes them")
    parser.add_argument("--column", default="text", help="the text's key in JSON lines and Parquet (default: text)")
    parser.add_argument("--split", default="paragraph", help="documents of a .txt: file, paragraph or line")
    parser.add_argument("--most", type=int, default=500, help="texts read (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1023, help="tokens after each BOS (default: %(default)s)")
    parser.add_argument("--top", type=int, default=15, help="rows of the table (default: %(default)s)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from itertools import islice

    from gemmascope_fast.analysis.compare.models import changes, gather, matches
    from gemmascope_fast.analysis.extraction.sources import documents, resolve
    from gemmascope_fast.analysis.pair import load_model, load_sae
    from gemmascope_fast.cli.extract import sites_of

    require("scipy", "analysis", "compare-models")
    check_outputs(args)
    if args.most < 1:
        raise ValueError(f"--most: expected at least 1, got {args.most}")
    stream = ("".join(d.parts) for d in documents(resolve(args.text), args.column, args.split))
    texts = list(islice((t for t in stream if t.strip()), args.most))
    if not texts:
        raise ValueError(f"--text: expected at least one text, got none in {', '.join(args.text)}")
    sae = load_sae(args.sae, args.sae_id)
    sae_b = load_sae(args.sae_b, args.sae_b_id) if args.sae_b else sae
    if sae_b is sae and args.anywhere:
        sae_b = load_sae(args.sae, args.sae_id)  # one SAE has one site: each side gets its own
    layer_b = args.layer if args.layer_b is None and args.sae_b is None else args.layer_b
    sides: list[Any] = []
    for name, own, layer in ((args.model, sae, args.layer), (args.model_b, sae_b, layer_b)):
        sites_of(own, layer, args.anywhere)
        sides.append((*load_model(name), {own.cfg.site if layer is None else layer: own}))
    with _bar(2 * len(texts)) as bar:
        a, b = gather(sides[0], sides[1], texts, window=args.window, progress=bar.update)
    out: dict[str, Any] = {"texts": len(texts), "spans": a.shape[0]}
    if args.sae_b is None:
        out["features"] = changes(a, b)
        out["counts"] = {w: sum(r["what"] == w for r in out["features"]) for w in WHAT}
    else:
        out["features"] = matches(a, b)
    _show(out, args.top)
    if args.json is not None:
        write_json(args.json, out)
    if args.plot is not None:
        _plot(out, args.plot)
    return 0


WHAT = ("kept", "moved", "lost", "gained", "changed")


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="reading", unit="text")


def _show(out: dict[str, Any], top: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not out["features"]:
        console.print("No feature fires often enough to be compared.")
        return
    names = list(out["features"][0])
    table = Table(*names, title=f"{out['texts']} texts, {out['spans']} spans of characters")
    for record in out["features"][:top]:
        table.add_row(*(str(v) if n in ("feature", "match") else shown(v) for n, v in record.items()))
    console.print(table)
    if "counts" in out:
        console.print(", ".join(f"{n} {what}" for what, n in out["counts"].items()))


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
