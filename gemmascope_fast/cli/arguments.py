"""The options that several commands share, each declared once, and what `main` does for all of them.

No module of a command imports PyTorch at its top: `--help` would take seconds.  The work is imported in `run`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import require
from gemmascope_fast.files import progress
from gemmascope_fast.files.results import json_text, write_text

PLACE = "a file, a folder, a Hugging Face repository, or a SAELens release; 'demo' is the bundled SAE"
LAYER = "the layer whose output the SAE reads"
PLOTS = (".png", ".svg", ".pdf")
STDOUT = Path("-")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds each option's default to its help."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is None or isinstance(default, bool) or default in ([], argparse.SUPPRESS) or "(default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


# ---- one function for each option --------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, default: str | None = "demo", note: str = "") -> None:
    what = "a transformers model or folder; 'demo' is Gemma 3 270M"
    parser.add_argument("--model", default=default, metavar="MODEL", help=what + note)


def add_sae(parser: argparse.ArgumentParser, default: str | None = "demo", note: str = "") -> None:
    """--sae and --sae-id."""
    what = "an SAE's repository, folder or file; 'demo' is the bundled one"
    parser.add_argument("--sae", default=default, metavar="SAE", help=what + note)
    parser.add_argument("--sae-id", metavar="ID", help="the SAE within its repository")


def add_layer(parser: argparse.ArgumentParser) -> None:
    """--layer and --anywhere."""
    parser.add_argument("--layer", type=int, metavar="N", help=LAYER + " (default: the SAE's own)")
    parser.add_argument("--anywhere", action="store_true", help="allow a --layer that is not the SAE's own")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="where to compute: cpu, cuda or cuda:N")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    choices = ("float32", "bfloat16")
    what = f"type in which the model computes: {' or '.join(choices)}"
    parser.add_argument("--dtype", default="float32", choices=choices, metavar="TYPE", help=what)


def add_pair(parser: argparse.ArgumentParser) -> None:
    """The options of `load_pair`."""
    for add in (add_model, add_sae, add_layer, add_device, add_dtype):
        add(parser)


def add_prompt(parser: argparse._ActionsContainer, note: str, default: str | None = None) -> None:
    parser.add_argument("--prompt", default=default, metavar="TEXT", help="text, literally; " + note)


def add_text(parser: argparse._ActionsContainer, default: list[str] | None, note: str = "") -> None:
    what = "files, 'pydoc', 'stdlib', or '-' for standard input"
    parser.add_argument("--text", nargs="+", default=default, metavar="FILE", help=what + note)


def add_documents(parser: argparse.ArgumentParser, split: str, text: bool = True) -> None:
    """--text, --column and --split."""
    if text:
        note = "; also folders, hf:DATASET[:CONFIG][@SPLIT]; files are .txt, .jsonl (each also .gz) or .parquet"
        add_text(parser, ["pydoc"], note)
    parser.add_argument("--column", default="text", metavar="KEY", help="the text's key in JSON lines and Parquet")
    parser.add_argument("--split", default=split, metavar="UNIT", help="documents of a .txt: file, paragraph or line")


def add_window(parser: argparse.ArgumentParser, default: int = 1023) -> None:
    parser.add_argument("--window", type=int, default=default, metavar="N", help="tokens after each BOS")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random")


# ---- outputs -----------------------------------------------------------------------------------------


def add_output(
    parser: argparse.ArgumentParser, flag: str, what: str, kind: str = "file", *,
    default: Path | None = None, required: bool = False,
) -> None:  # fmt: skip
    """A file or folder to write.  kind: "file" or "folder", which are refused where they exist, unless --overwrite;
    "kept file" or "kept folder", which the command continues or adds to and never replaces."""
    metavar = "PATH" if flag == "--out" else "FOLDER" if "folder" in kind else "FILE"
    options: dict[str, Any] = {"required": required} if flag.startswith("-") else {}
    action = parser.add_argument(flag, type=Path, default=default, metavar=metavar, help=what, **options)
    parser.set_defaults(outputs=(*(parser.get_default("outputs") or ()), (action.dest, flag, kind)))


def add_out(parser: argparse.ArgumentParser, what: str, kind: str = "file", **options: Any) -> None:
    add_output(parser, "--out", f"where the result is written: {what}", kind, **options)


def add_json(parser: argparse.ArgumentParser) -> None:
    add_output(parser, "--json", "write the figures as JSON; '-' is standard output")


def add_plot(parser: argparse.ArgumentParser, what: str = "the figures") -> None:
    add_output(parser, "--plot", f"draw {what}, as .png, .svg or .pdf")


def add_common(parser: argparse.ArgumentParser) -> None:
    """--quiet, and --overwrite where anything is written.  `main` adds them last."""
    if parser.get_default("outputs"):
        parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def check_outputs(args: argparse.Namespace) -> None:
    """Checks the outputs before any work; nothing is made yet.  ValueError where one cannot be written, or exists and
    there is no --overwrite, and for --plot without matplotlib."""
    for dest, flag, kind in getattr(args, "outputs", ()):
        path: Path | None = getattr(args, dest)
        if path is None or (dest == "json" and path == STDOUT):
            continue
        folder = "folder" in kind
        if path.exists() and folder != path.is_dir():
            raise ValueError(f"{flag}: expected a {'folder' if folder else 'file'}, got {path}")
        if dest == "plot":
            require("matplotlib", "plot", "--plot")
            if path.suffix not in PLOTS:
                raise ValueError(f"--plot: expected a name ending in {', '.join(PLOTS)}, got {path}")
        there = path if folder and path.exists() else next(p for p in path.absolute().parents if p.exists())
        if not there.is_dir():
            raise ValueError(f"{flag}: expected a place in a folder, got {path}: {there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{flag}: expected a place to write, got {path}: no permission to write in {there}")
        taken = any(path.iterdir()) if folder and path.exists() else path.exists()
        if taken and "kept" not in kind and not args.overwrite:
            raise ValueError(f"{flag}: {path} exists; --overwrite replaces it")


def write_figures(args: argparse.Namespace, value: Any) -> None:
    """What --json asks for, if anything."""
    if args.json == STDOUT:
        args.stdout.write(json_text(value))
    elif args.json is not None:
        write_text(args.json, json_text(value))


@contextmanager
def console(args: argparse.Namespace) -> Iterator[None]:
    """Within the block --quiet silences progress, and with `--json -` standard output gets the figures alone."""
    args.stdout = sys.stdout
    other = sys.stderr if getattr(args, "json", None) == STDOUT else sys.stdout
    with progress.quiet(args.quiet), redirect_stdout(other):
        try:
            yield
        finally:
            progress.close_bars()


# ---- what several commands do --------------------------------------------------------------------------


def check_least(args: argparse.Namespace, *names: str, least: int = 1) -> None:
    """ValueError where one of these options is smaller."""
    for name in names:
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")


def load_pair(args: argparse.Namespace) -> tuple[Any, Any, Any, int]:
    """(model, tokenizer, SAE, layer) of the options that `add_pair` adds."""
    from gemmascope_fast.analysis import pair

    return pair.load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere, args.device, args.dtype)


def figure(value: Any) -> str:
    """A figure with four decimals; anything else as it is."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
