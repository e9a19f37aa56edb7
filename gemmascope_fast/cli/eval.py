"""`gemmascope-fast eval`: an SAE's figures on a text of any length."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import add_anywhere_argument, check_outputs
from gemmascope_fast.files import identity
from gemmascope_fast.files.results import save_figure, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    parser.add_argument("--sae", default="demo", help="an SAE's repository, folder or file; 'demo' is the bundled one")
    parser.add_argument("--sae-id", help="the SAE within its repository")
    parser.add_argument("--layer", type=int, help="the layer to put the SAE in (default: the SAE's own)")
    add_anywhere_argument(parser)
    parser.add_argument("--text", default="pydoc", help="a UTF-8 file, 'pydoc' or 'stdlib' (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="read its last tenth only, which `train` never sees")
    parser.add_argument("--window", type=int, default=255, help="tokens after each BOS (default: %(default)s)")
    parser.add_argument("--no-losses", action="store_true", help="leave out the second pass: cross-entropies")
    parser.add_argument(
        "--loss-tokens",
        type=int,
        metavar="N",
        help="end the second pass after about N tokens (default: the whole text)",
    )
    parser.add_argument("--state", type=Path, metavar="FILE", help="save progress there, and go on from it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and firing frequencies there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="firing frequencies as .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    check_outputs(args, ("json", "plot", "state"))
    text, label = _text(args)
    from gemmascope_fast.analysis.evaluation.run import Evaluation, sites_of
    from gemmascope_fast.analysis.pair import load_model, load_sae
    from gemmascope_fast.attach.origin import move

    sae = load_sae(args.sae, args.sae_id)
    if args.anywhere:
        move(sae.cfg, args.layer)
    reads, writes = sites_of(sae, args.layer)  # before the model, which takes longer
    model, tokenizer = load_model(args.model)

    about = {"model": args.model, "sae": args.sae, "sae_id": args.sae_id, "text": label}
    run = Evaluation(
        model,
        tokenizer,
        sae,
        args.layer,
        text,
        window=args.window,
        state=args.state,
        about=about,
        loss_tokens=args.loss_tokens,
    )
    figures = _with_bars(run, not args.no_losses)
    place = writes.hook_name if reads == writes else f"{reads.hook_name} → {writes.hook_name}"
    table = Table("figure", "value", title=f"{args.sae} at {place} of {args.model}, {label}")
    for key, value in figures.items():
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    frequencies = run.frequencies()
    if args.json is not None:
        everything = {"model": args.model, "sae": args.sae, "layer": reads.layer, "text": label}
        everything |= {"site": reads.hook_name, "site_out": writes.hook_name}
        write_json(args.json, everything | figures | {"firing_frequencies": frequencies.tolist()})
    if args.plot is not None:
        plot_frequencies(frequencies, args.plot, f"{label}: {figures['tokens']} tokens, L0 {figures['l0']:.1f}")
    return 0


def _text(args: argparse.Namespace) -> tuple[Callable[[], Iterable[str]], str]:
    """(the text's lines, anew at each call; what it is called, with a hash of what it says)."""
    from gemmascope_fast.training.text import Text, pydoc_topics, stdlib_docstrings

    builtin = {"pydoc": pydoc_topics, "stdlib": stdlib_docstrings}
    name = args.text + (", last tenth" if args.held_out else "")
    if args.text in builtin or args.held_out:
        whole = builtin[args.text]() if args.text in builtin else Path(args.text).read_text("utf-8")
        shown = Text(args.text, whole).split()[1] if args.held_out else whole
        return (lambda: [shown]), f"{name} ({identity.of_text(shown)[:8]})"

    def lines() -> Iterator[str]:
        with open(args.text, encoding="utf-8") as file:
            # a file without line breaks is a text too: bounded reads, not lines
            while part := file.read(1 << 20):
                yield part

    return lines, f"{name} ({identity.of_file(args.text)[:8]})"


def _with_bars(run: Any, losses: bool) -> dict[str, Any]:
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def progress(which: str, tokens: int) -> None:
        if which not in bars:
            bars[which] = tqdm(desc=which, unit="token", unit_scale=True)
        bars[which].update(tokens)

    try:
        return run.run(losses, progress)
    finally:
        for bar in bars.values():
            bar.close()


def plot_frequencies(frequencies: Any, path: Path, title: str) -> None:
    """Histogram of log10 of the share of tokens on which a feature fires; features that never fired are counted."""
    from matplotlib.figure import Figure

    alive = frequencies[frequencies > 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(alive.log10().tolist(), bins=60, color="#3b6ea5")
    axes.set_xlabel("log10 of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    axes.set_title(f"{title}; {len(frequencies) - len(alive)} of {len(frequencies)} features silent")
    save_figure(figure, path)
