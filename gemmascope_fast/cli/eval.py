"""`gemmascope-fast eval`: an SAE's figures on a text of any length."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.atomic import make_folder
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_pair(parser)
    common.add_text(parser, ["pydoc"])
    parser.add_argument("--held-out", action="store_true", help="read its last tenth only, which `train` never sees")
    common.add_window(parser, 255)
    parser.add_argument("--no-losses", action="store_true", help="leave out the second pass: cross-entropies")
    note = "end the second pass after about N tokens (default: the whole text)"
    parser.add_argument("--loss-tokens", type=int, metavar="N", help=note)
    common.add_output(parser, "--state", "save progress in this file, and continue from it if it exists", "kept file")
    common.add_json(parser)
    common.add_plot(parser, "the firing frequencies")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.evaluation.run import Evaluation, sites_of
    from gemmascope_fast.analysis.pair import load_model, load_sae
    from gemmascope_fast.attach.origin import move

    text, label = _text(args)
    sae = load_sae(args.sae, args.sae_id, args.device)
    if args.anywhere:
        move(sae.cfg, args.layer)
    reads, writes = sites_of(sae, args.layer)  # before the model, which takes longer
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    if args.state is not None:
        make_folder(args.state.parent)
    run = Evaluation(
        model, tokenizer, sae, args.layer, text, window=args.window, state=args.state, loss_tokens=args.loss_tokens,
        about={"model": args.model, "sae": args.sae, "sae_id": args.sae_id, "text": label},
    )  # fmt: skip
    figures = _with_bars(run, not args.no_losses)
    place = writes.hook_name if reads == writes else f"{reads.hook_name} → {writes.hook_name}"
    rows = [(key, common.figure(value)) for key, value in figures.items()]
    common.print_table(("figure", "value"), rows, f"{args.sae} at {place} of {args.model}, {label}")
    frequencies = run.frequencies()
    everything = {"model": args.model, "sae": args.sae, "layer": reads.layer, "text": label}
    everything |= {"site": reads.hook_name, "site_out": writes.hook_name}
    common.write_figures(args, everything | figures | {"firing_frequencies": frequencies.tolist()})
    if args.plot is not None:
        plot_frequencies(frequencies, args.plot, f"{label}: {figures['tokens']} tokens, L0 {figures['l0']:.1f}")
    return 0


def _text(args: argparse.Namespace) -> tuple[Callable[[], Iterable[str]], str]:
    """(the texts' parts, from the start at each call; their names, each with a hash of its content)."""
    from gemmascope_fast.files import identity
    from gemmascope_fast.training.text import NAMED, Text, read_text

    parts: list[Callable[[], Iterable[str]]] = []
    labels = []
    for name in args.text:
        if name in NAMED or args.held_out:
            whole = read_text(name)
            shown = Text(name, whole).split()[1] if args.held_out else whole
            parts.append(partial(list, [shown]))
            digest = identity.of_text(shown)
        else:
            parts.append(partial(_parts, name))
            digest = identity.of_file(name)
        labels.append(f"{name}{', last tenth' if args.held_out else ''} ({digest[:8]})")
    return lambda: chain.from_iterable(part() for part in parts), "; ".join(labels)


def _parts(name: str) -> Iterator[str]:
    with open(name, encoding="utf-8") as file:
        # a file without line breaks is a text too: bounded reads, not lines
        while part := file.read(1 << 20):
            yield part


def _with_bars(run: Any, losses: bool) -> dict[str, Any]:
    bars: dict[str, Any] = {}

    def progress(which: str, tokens: int) -> None:
        if which not in bars:
            bars[which] = bar(desc=which, unit="token", unit_scale=True)
        bars[which].update(tokens)

    try:
        return run.run(losses, progress)
    finally:
        for each in bars.values():
            each.close()


def plot_frequencies(frequencies: Any, path: Path, title: str) -> None:
    """Histogram of log10 of the share of tokens on which a feature fires; features that never fired are counted."""
    from matplotlib.figure import Figure

    alive = frequencies[frequencies > 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(alive.log10().tolist(), bins=60, color="#3b6ea5")
    axes.set_xlabel("log10 of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    axes.set_title(f"{title}; {len(frequencies) - len(alive)} of {len(frequencies)} features never fire")
    save_figure(figure, path)
