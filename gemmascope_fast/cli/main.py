"""The command `gemmascope-fast`.  Each command is a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemmascope_fast._version import __version__
from gemmascope_fast.errors import GemmaScopeFastError


@dataclass(frozen=True)
class Command:
    """`name` is one word or two.  The module's `add_arguments(parser)` declares its arguments; `run(args)` returns the
    exit status (None: 0)."""

    name: str
    help: str
    module: str


_CLI, _DEV = "gemmascope_fast.cli", "gemmascope_fast.dev"
COMMANDS = (
    Command("demo", "a model reads a text, an SAE reads the model", f"{_CLI}.demo"),
    Command("info", "versions, and which implementation serves which op and why", f"{_CLI}.info"),
    Command("watch", "a model writes token by token and you see and change its features", f"{_CLI}.watch"),
    Command("ls", "list the checkpoints in a folder, a Hugging Face repository or a SAELens release", f"{_CLI}.ls"),
    Command("convert", "write a checkpoint in another format", f"{_CLI}.convert"),
    Command("train", "train an SAE on a model's activations", f"{_CLI}.train"),
    Command("eval", "L0, FVU, losses and firing frequencies of an SAE on a text", f"{_CLI}.eval"),
    Command("extract", "write the latents of any amount of text as Parquet", f"{_CLI}.extract"),
    Command("dashboard", "make pages about every feature from extracted latents", f"{_CLI}.dashboard"),
    Command("concepts", "find and steer concepts by SAE, DiffMean, probe and ReFT-r1", f"{_CLI}.concepts"),
    Command("compare texts", "which features differ between two sets of texts", f"{_CLI}.compare_texts"),
    Command("compare models", "which features two models gain, lose and share", f"{_CLI}.compare_models"),
    Command("compare variants", "how stable features and labels are over rewordings", f"{_CLI}.compare_variants"),
    Command("compare conversation", "features per turn and role of a conversation", f"{_CLI}.compare_conversation"),
    Command("quantize", "write a model's linear layers as nested low-bit codes", f"{_CLI}.quantize"),
    Command("quantize tables", "measure widths and training methods for a model and an SAE", f"{_CLI}.quantize_tables"),
    Command("dev bench", "time every op against what people use today", f"{_DEV}.bench.command"),
    Command("dev report", "a page, plots and a table from a benchmark's JSON", f"{_DEV}.report.results_page"),
    Command("dev roof", "measure this machine's memory bandwidth and peak rates", f"{_DEV}.roof"),
    Command("dev profile", "where the time of a model with an SAE goes", f"{_DEV}.profile"),
    Command("dev gpu-check", "compile the GPU kernels without a GPU and check what they use", f"{_DEV}.gpu.check"),
)
GROUPS = {
    "compare": "what differs between texts, models, variants of a text, turns of a conversation",
    "dev": "for those who build this package",
}


def named(words: Sequence[str]) -> Command | None:
    """The command that these words begin with."""
    by_name = {command.name: command for command in COMMANDS}
    return by_name.get(" ".join(words[:2])) or by_name.get(words[0] if words else "")


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser of one command; imports its module."""
    module: Any = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"gemmascope-fast {command.name}", description=command.help[0].upper() + command.help[1:] + "."
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def usage(group: str | None = None) -> str:
    """All commands, or those of a group, a line each."""
    shown = [c for c in COMMANDS if group is None or c.name.split()[0] == group]
    width = max(len(c.name) for c in shown)
    lines = [f"  {c.name.ljust(width)}  {c.help}" for c in shown]
    head = "Exact, sparse and fast SAEs of the Gemma Scope family." if group is None else GROUPS[group] + "."
    prog = "gemmascope-fast" + (f" {group}" if group else "")
    return "\n".join(
        [
            f"usage: {prog} COMMAND [options]",
            "",
            head[0].upper() + head[1:],
            "",
            *lines,
            "",
            f"`{prog} COMMAND --help` describes a command.",
        ]
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, with `run` and `command`.  SystemExit where it names no command, as argparse."""
    words = list(argv)
    command = named(words)
    if command is not None:
        args = parser_of(command).parse_args(words[len(command.name.split()) :])
        args.command = command.name
        return args
    if words[:1] == ["--version"]:
        print(f"gemmascope-fast {__version__}")
        raise SystemExit(0)
    group = words[0] if words and words[0] in GROUPS else None
    rest = words[1:] if group else words
    if rest[:1] in (["--help"], ["-h"]):
        print(usage(group))
        raise SystemExit(0)
    print(usage(group), file=sys.stderr)
    got = f"no such command: {' '.join(words[:2])!r}" if rest else "expected a command"
    print(f"\ngemmascope-fast: {got}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 where the input was wrong (one line on stderr says what), 2 for wrong usage, 130 for
    Ctrl-C."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args) or 0)
    except (GemmaScopeFastError, ValueError, OSError) as error:
        print(f"gemmascope-fast {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gemmascope-fast {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
