"""`gemmascope-fast demo`: a model reads a text, an SAE reads the model, and all figures are measured on the spot."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.progress import status
from gemmascope_fast.files.results import write_text

if TYPE_CHECKING:
    from gemmascope_fast.analysis.reading import Reading

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
    common.add_prompt(source, "the text to read (default: a passage of about 120 words)")
    common.add_text(source, None, "; instead of --prompt")
    common.add_pair(parser)
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="read only the text's first N tokens")
    parser.add_argument("--top", type=int, default=4, metavar="N", help="features shown per token")
    common.add_json(parser)
    common.add_output(parser, "--html", "write a self-contained page")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.reading import read_text
    from gemmascope_fast.analysis.reading_page import render
    from gemmascope_fast.training.text import read_text as text_of

    text = "\n\n".join(map(text_of, args.text)) if args.text else PASSAGE if args.prompt is None else args.prompt
    with status("loading the model and the SAE"):
        model, tokenizer, sae, layer = common.load_pair(args)
    with status("reading, splicing, checking in fp64, timing"):
        name = "Gemma 3 270M" if args.model == "demo" else args.model
        reading = read_text(model, tokenizer, sae, layer, text, model_name=name, max_tokens=args.max_tokens)
    if reading.cut:
        print(f"The text was cut: {reading.cut} tokens beyond --max-tokens {args.max_tokens} were not read.")
    show(reading, args.top)
    common.write_figures(args, reading.figures)
    if args.html:
        write_text(args.html, render(reading))
        print(f"Page: {args.html}")
    return 0


def show(reading: Reading, top: int) -> None:
    """Tokens with their top features and activations, then the figures."""
    from rich.text import Text

    from gemmascope_fast.analysis.reading import LABELS, TIMES

    values, indices = reading.latents.topk(top)
    tokens: list[Any] = []
    for i, (piece, l0) in enumerate(zip(reading.pieces, reading.latents.l0().tolist(), strict=True)):
        found = [f"{f}: {v:.1f}" for f, v in zip(indices[i].tolist(), values[i].tolist(), strict=True) if f >= 0]
        tokens.append((Text(repr(piece)), str(l0), "   ".join(found) if reading.content[i] else "special, not read"))
    common.print_table(("token", "L0", "top features: activation"), tokens, "What the SAE sees")
    figures = reading.figures
    rows = [(label, common.figure(figures[key])) for key, label in LABELS.items()]
    rows += [(f"time per token, {label}", f"{figures['ms_per_token'][key]:.3f} ms") for key, label in TIMES.items()]
    common.print_table(("figure", "value"), rows, f"{figures['model']}, layer {figures['layer']}")
