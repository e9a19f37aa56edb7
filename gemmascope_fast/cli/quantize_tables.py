"""`gemmascope-fast quantize tables`: tables of widths and methods, for a model's layers and an SAE; resumable."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import add_anywhere_argument, check_outputs
from gemmascope_fast.cli.quantize import METHODS
from gemmascope_fast.files import identity
from gemmascope_fast.files.results import write_text

PARTS = ("sae", "grid", "mix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="figures, codes and tables; goes on")
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    parser.add_argument("--sae", default="demo", help="the SAE of the second table; 'demo' is the bundled one")
    parser.add_argument("--sae-id", help="the SAE within its repository")
    parser.add_argument("--layer", type=int, help="the layer whose output the SAE reads (default: the SAE's own)")
    add_anywhere_argument(parser)
    parser.add_argument("--text-file", type=Path, metavar="FILE", help="text to train on (first) and measure on (last)")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 255 tokens (default: %(default)s)")
    parser.add_argument("--train-windows", type=int, default=80, help="training windows (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them for each block (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=40, help="end-to-end steps of qat after them (default: %(default)s)"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="methods of the grid (default: %(default)s)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, of %(default)s")
    parser.add_argument(
        "--skip-experts", action="store_true", help="leave a mixture's experts as they are where they are fused weights"
    )
    parser.add_argument("--quick", action="store_true", help="fewer windows and passes, and the smaller grid")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="Mix'n'Match's frontier as .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markdown import Markdown
    from tqdm import tqdm

    from gemmascope_fast.analysis.pair import load_pair
    from gemmascope_fast.analysis.widths import grid, mixnmatch
    from gemmascope_fast.quant.model import check_experts
    from gemmascope_fast.training import arithmetic
    from gemmascope_fast.training.nested import calibration

    wanted = args.only.split(",")
    if set(wanted) - set(PARTS):
        raise ValueError(f"--only: expected some of {', '.join(PARTS)}, got {args.only!r}")
    methods = args.methods.split(",")
    if set(methods) - set(METHODS):
        raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {args.methods!r}")
    check_outputs(args, ("plot",), ("work",))
    if args.quick:
        args.windows, args.train_windows = min(args.windows, 12), min(args.train_windows, 20)
        args.epochs, args.steps = min(args.epochs, 2), min(args.steps, 5)
    model, tokenizer, sae, layer = load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere)
    check_experts(model, "ffn", args.skip_experts)
    text = args.text_file.read_text("utf-8") if args.text_file else None
    ids = calibration.python_topics(tokenizer) if text is None else calibration.windows(tokenizer, text)
    if ids.shape[0] < args.windows + args.train_windows:
        raise ValueError(f"--text-file: expected {args.windows + args.train_windows} windows, got {ids.shape[0]}")
    held_out, training = ids[-args.windows :], ids[: args.train_windows]
    comparison = grid.Comparison(
        model, training, held_out, args.work, {"epochs": args.epochs}, args.steps, tqdm,
        {"sae": identity.of_module(sae), "layer": layer},
    )  # fmt: skip
    if "sae" in wanted:
        sae_table(model, sae, layer, held_out, training, comparison.results, tqdm)
    model.to(arithmetic.products())  # from here on: the SAE's table is in float32
    if "grid" in wanted:
        for run in grid.runs(args.quick):
            if run.method in methods:
                comparison.do(run)
    if "mix" in wanted:
        points = comparison.mix(grid.Run("ffn", None, "omniquant"))
        if args.plot is not None:
            mixnmatch.plot(points, args.plot, f"Mix'n'Match, FFN of {args.model}")
    tables = grid.markdown(comparison.results.figures)
    write_text(args.work / "tables.md", tables)
    Console().print(Markdown(tables))
    return 0


def sae_table(model: Any, sae: Any, layer: int, held_out: Any, training: Any, results: Any, progress: Any) -> None:
    """The SAE's rows: reconstruction on all held-out windows, losses on a quarter of them (two to ten)."""
    import torch

    from gemmascope_fast.analysis.widths import measure_sae
    from gemmascope_fast.training.activations import activations

    cases = measure_sae.cases()
    if all(case.key() in results for case in cases):
        return
    x = torch.cat(list(activations(model, layer, held_out.split(4))))
    mean = torch.cat(list(activations(model, layer, training[:8].split(4)))).mean(0)
    measure_sae.compare_sae(
        model,
        sae,
        layer,
        x,
        held_out[: max(2, min(10, held_out.shape[0] // 4))],
        results,
        cases,
        mean,
        lambda rows: progress(rows, desc="SAE"),
    )
