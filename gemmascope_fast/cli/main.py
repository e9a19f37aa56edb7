"""The command `gemmascope-fast`.  Each command is a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemmascope_fast._version import __version__
from gemmascope_fast.cli import arguments
from gemmascope_fast.errors import GemmaScopeFastError


@dataclass(frozen=True)
class Command:
    """`name` is one word or two, `example` the words after `gemmascope-fast`.  The module's `add_arguments(parser)`
    declares its arguments; `run(args)` returns the exit status (None: 0)."""

    name: str
    help: str
    module: str
    example: str


_CLI, _DEV = "gemmascope_fast.cli", "gemmascope_fast.dev"
COMMANDS = (
    Command("demo", "a model reads a text, an SAE reads the model", f"{_CLI}.demo", "demo --html page.html"),
    Command("info", "versions, and which implementation serves each op and why", f"{_CLI}.info", "info --json -"),
    Command(
        "watch", "a model writes token by token, beside the features of each token; edits while it runs",
        f"{_CLI}.watch", 'watch --prompt "My day began with" --add 1383=2000',
    ),
    Command(
        "ls", "list the checkpoints in a folder, a Hugging Face repository or a SAELens release",
        f"{_CLI}.ls", "ls google/gemma-scope-2b-pt-res",
    ),
    Command(
        "convert", "write a checkpoint in another format", f"{_CLI}.convert", "convert demo saelens_folder --to saelens"
    ),
    Command(
        "train", "train a JumpReLU SAE on a model's activations", f"{_CLI}.train",
        "train --layer 12 --d-sae 4096 --out sae.safetensors",
    ),
    Command(
        "eval", "L0, FVU, losses and firing frequencies of an SAE on a text", f"{_CLI}.eval",
        "eval --text book.txt --json figures.json",
    ),
    Command(
        "extract", "write the latents of any amount of text as Parquet files", f"{_CLI}.extract",
        "extract --text corpus/ --out latents",
    ),
    Command(
        "dashboard", "make a page for each feature from extracted latents", f"{_CLI}.dashboard",
        "dashboard --latents latents --out site",
    ),
    Command(
        "concepts", "find and steer concepts by SAE, DiffMean, probe and ReFT-r1", f"{_CLI}.concepts",
        "concepts --json concepts.json --plot concepts.svg",
    ),
    Command(
        "compare texts", "which features differ between two sets of texts", f"{_CLI}.compare_texts",
        "compare texts --a demo:past --b demo:present --plot compare.svg",
    ),
    Command(
        "compare models", "which features two models gain, lose and share", f"{_CLI}.compare_models",
        "compare models --model-b tuned --text pydoc --most 100",
    ),
    Command(
        "compare variants", "how stable features and labels are over rewordings", f"{_CLI}.compare_variants",
        "compare variants --labels positive negative",
    ),
    Command(
        "compare conversation", "features for each turn and role of a conversation", f"{_CLI}.compare_conversation",
        "compare conversation --html talk.html",
    ),
    Command(
        "quantize", "write a model's linear layers as nested low-bit codes", f"{_CLI}.quantize",
        "quantize --out codes.safetensors --bits 4",
    ),
    Command(
        "quantize tables", "measure widths and training methods for a model and an SAE", f"{_CLI}.quantize_tables",
        "quantize tables --work grid --quick",
    ),
    Command(
        "dev bench", "time every op and compare with other libraries", f"{_DEV}.bench.command",
        "dev bench --quick --json bench.json",
    ),
    Command(
        "dev report", "a page, plots and a table from a benchmark's JSON", f"{_DEV}.report.command",
        "dev report bench.json --html report.html",
    ),
    Command(
        "dev roof", "measure this machine's memory bandwidth and peak rates", f"{_DEV}.roof_command",
        "dev roof --threads 1 2",
    ),
    Command(
        "dev profile", "where the time of a model with an SAE goes", f"{_DEV}.profile_command",
        "dev profile --tokens 16 --trace trace.json",
    ),
    Command(
        "dev gpu-check", "compile the GPU kernels without a GPU and check their resources", f"{_DEV}.gpu.check",
        "dev gpu-check --arch sm_90 --out gpu-check.json",
    ),
)  # fmt: skip
GROUPS = {
    "compare": "compare texts, models, variants of a text, or the turns of a conversation",
    "dev": "for developers of this package",
}


def named(words: Sequence[str]) -> Command | None:
    """The command that these words begin with."""
    by_name = {command.name: command for command in COMMANDS}
    return by_name.get(" ".join(words[:2])) or by_name.get(words[0] if words else "")


def parser_of(command: Command) -> argparse.ArgumentParser:
    """The parser of one command; imports its module."""
    module: Any = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"gemmascope-fast {command.name}",
        description=command.help[0].upper() + command.help[1:] + ".",
        epilog=f"example:\n  gemmascope-fast {command.example}",
        formatter_class=arguments.Formatter,
    )
    module.add_arguments(parser)
    arguments.add_common(parser)
    parser.description = textwrap.fill(str(parser.description), 100)
    parser.set_defaults(run=module.run, command=command.name)
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
        return parser_of(command).parse_args(words[len(command.name.split()) :])
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
        arguments.check_outputs(args)
        with arguments.console(args):
            return int(args.run(args) or 0)
    except (GemmaScopeFastError, ValueError, OSError) as error:
        print(f"gemmascope-fast {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"gemmascope-fast {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
