"""`gemmascope-fast demo`: a model reads a text, an SAE reads the model, and every figure is measured there and then."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.analysis.pair import load_pair
from gemmascope_fast.analysis.reading import LABELS, TIMES, Reading, read_text
from gemmascope_fast.cli.arguments import add_anywhere_argument, check_outputs
from gemmascope_fast.files.results import write_json, write_text

PASSAGE = (
    "In the winter of 1911 two expeditions were racing across the Antarctic ice. Roald Amundsen travelled with dogs"
    " and skis; Robert Falcon Scott trusted ponies and motor sledges. The dogs ran well in the cold, the ponies sank"
    " to their bellies, and the motors froze. Amundsen planted the Norwegian flag at the South Pole on 14 December,"
    " thirty-four days before his rival arrived to find a small tent and a polite letter addressed to the King. The"
    " lesson that engineers like to draw is a simple one: measure what you carry, test it where you mean to use it,"
    " and do not confuse courage with preparation."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="the text to read (default: a passage of about 120 words)")
    source.add_argument("--text-file", type=Path, metavar="FILE", help="read the text from a UTF-8 file")
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    parser.add_argument("--sae", default="demo", help="an SAE's repository or folder; 'demo' is the bundled one")
    parser.add_argument("--sae-id", help="the SAE within its repository")
    parser.add_argument("--layer", type=int, help="the layer whose output the SAE reads (default: the SAE's own)")
    add_anywhere_argument(parser)
    parser.add_argument("--max-tokens", type=int, default=1024, help="the text is cut there, and it says so")
    parser.add_argument("--top", type=int, default=4, help="features shown per token (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page there")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    check_outputs(args)
    text = args.text_file.read_text(encoding="utf-8") if args.text_file else args.text
    text = PASSAGE if text is None else text
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading the model and the SAE", total=None)
        model, tokenizer, sae, layer = load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere)
        progress.update(task, description="reading, splicing, checking in fp64, timing")
        name = "Gemma 3 270M" if args.model == "demo" else args.model
        reading = read_text(model, tokenizer, sae, layer, text, model_name=name, max_tokens=args.max_tokens)
        progress.update(task, description="done", total=1, completed=1)
    if reading.cut:
        console.print(f"The text was cut: {reading.cut} tokens beyond --max-tokens {args.max_tokens} were not read.")
    show(console, reading, args.top)
    if args.json:
        write_json(args.json, reading.figures)
    if args.html:
        from gemmascope_fast.analysis.reading_page import render

        write_text(args.html, render(reading))
        console.print(f"Page: {args.html}")
    return 0


def show(console: Any, reading: Reading, top: int) -> None:
    """Tokens with their top features and activations, then the figures."""
    from rich.table import Table
    from rich.text import Text

    values, indices = reading.latents.topk(top)
    tokens = Table("token", "L0", "top features: activation", title="What the SAE sees")
    for i, (piece, l0) in enumerate(zip(reading.pieces, reading.latents.l0().tolist(), strict=True)):
        found = [f"{f}: {v:.1f}" for f, v in zip(indices[i].tolist(), values[i].tolist(), strict=True) if f >= 0]
        shown = "" if reading.content[i] else "special, not read"
        tokens.add_row(Text(repr(piece)), str(l0), shown or "   ".join(found))
    console.print(tokens)
    table = Table("figure", "value", title=f"{reading.figures['model']}, layer {reading.figures['layer']}")
    for key, label in LABELS.items():
        value = reading.figures[key]
        table.add_row(label, f"{value:.4f}" if isinstance(value, float) else str(value))
    for key, label in TIMES.items():
        table.add_row(f"time per token, {label}", f"{reading.figures['ms_per_token'][key]:.3f} ms")
    console.print(table)
