"""`gemmascope-fast quantize tables`: widths and training methods compared, for a model's layers and an SAE."""

from __future__ import annotations

import argparse
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.cli.quantize import METHODS, add_skip_experts, windows
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import write_text

PARTS = ("sae", "grid", "mix")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compares widths, slicings, group sizes and training methods for a model, and widths for an SAE.  Run the same"
        " command again to continue.  It has no --device and --dtype, as `quantize`."
    )
    add = parser.add_argument
    note = "figures, codes and tables.md are written here; continues what exists"
    common.add_output(parser, "--work", note, "kept folder", required=True)
    common.add_model(parser)
    common.add_sae(parser, note=", for the SAE's table")
    common.add_layer(parser)
    common.add_text(parser, ["pydoc"], "; to train on (first) and measure on (last)")
    add("--windows", type=int, default=40, metavar="N", help="held-out windows of 255 tokens, the text's last")
    add("--train-windows", type=int, default=80, metavar="N", help="training windows of 255 tokens")
    add("--epochs", type=int, default=4, metavar="N", help="passes over the windows for each block")
    add("--steps", type=int, default=40, metavar="N", help="qat: steps of end-to-end training after the blocks")
    add("--methods", default=",".join(METHODS), metavar="M,M,…", help="methods of the grid")
    add("--only", default=",".join(PARTS), metavar="P,P,…", help="parts to measure")
    add_skip_experts(parser)
    add("--quick", action="store_true", help="fewer windows and passes, and the smaller grid")
    common.add_plot(parser, "Mix'n'Match's frontier")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markdown import Markdown

    from gemmascope_fast.analysis.pair import load_pair
    from gemmascope_fast.analysis.widths import grid, mixnmatch
    from gemmascope_fast.files import identity
    from gemmascope_fast.quant.model import check_experts
    from gemmascope_fast.training import arithmetic

    wanted = args.only.split(",")
    if set(wanted) - set(PARTS):
        raise ValueError(f"--only: expected some of {', '.join(PARTS)}, got {args.only!r}")
    methods = args.methods.split(",")
    if set(methods) - set(METHODS):
        raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {args.methods!r}")
    if args.quick:
        args.windows, args.train_windows = min(args.windows, 12), min(args.train_windows, 20)
        args.epochs, args.steps = min(args.epochs, 2), min(args.steps, 5)
    model, tokenizer, sae, layer = load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere)
    check_experts(model, "ffn", args.skip_experts)
    held_out, training = windows(args, tokenizer)
    comparison = grid.Comparison(
        model, training, held_out, args.work, {"epochs": args.epochs}, args.steps, bar,
        {"sae": identity.of_module(sae), "layer": layer},
    )  # fmt: skip
    if "sae" in wanted:
        sae_table(model, sae, layer, held_out, training, comparison.results)
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


def sae_table(model: Any, sae: Any, layer: int, held_out: Any, training: Any, results: Any) -> None:
    """The SAE's rows: reconstruction on all held-out windows, losses on a quarter of them (two to ten)."""
    import torch

    from gemmascope_fast.analysis.widths import measure_sae
    from gemmascope_fast.training.activations import activations

    cases = measure_sae.cases()
    if all(case.key() in results for case in cases):
        return
    x = torch.cat(list(activations(model, layer, held_out.split(4))))
    mean = torch.cat(list(activations(model, layer, training[:8].split(4)))).mean(0)
    losses = held_out[: max(2, min(10, held_out.shape[0] // 4))]
    measure_sae.compare_sae(model, sae, layer, x, losses, results, cases, mean, lambda rows: bar(rows, desc="SAE"))
