"""The command `gemmascope-fast`.  Each sub-command is two functions of one module, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gemmascope_fast._version import __version__
from gemmascope_fast.errors import GemmaScopeFastError


@dataclass(frozen=True)
class Command:
    """One sub-command: `add` gets its parser, `run` the parsed arguments and returns the exit status (None: 0)."""

    name: str
    help: str
    module: str
    add: str
    run: str


COMMANDS = (
    Command(
        "demo",
        "a model reads a text, an SAE reads the model",
        "gemmascope_fast.cli.demo",
        "add_demo_arguments",
        "run_demo",
    ),
    Command(
        "train",
        "train a JumpReLU SAE on a model's activations",
        "gemmascope_fast.cli.train",
        "add_train_arguments",
        "run_train",
    ),
    Command(
        "eval",
        "L0, FVU, losses and firing frequencies of an SAE on a text",
        "gemmascope_fast.cli.eval",
        "add_eval_arguments",
        "run_eval",
    ),
    Command(
        "extract",
        "latents of any amount of text as Parquet shards",
        "gemmascope_fast.cli.extract",
        "add_extract_arguments",
        "run_extract",
    ),
    Command(
        "dashboard",
        "pages about every feature, from extracted latents",
        "gemmascope_fast.cli.dashboard",
        "add_dashboard_arguments",
        "run_dashboard",
    ),
    Command(
        "watch",
        "a model writes token by token, an SAE shows its features; hold some and see the text change",
        "gemmascope_fast.cli.watch",
        "add_watch_arguments",
        "run_watch",
    ),
    Command(
        "concepts",
        "find and steer concepts by SAE, DiffMean, probe and ReFT-r1, as AxBench does",
        "gemmascope_fast.cli.concepts",
        "add_concepts_arguments",
        "run_concepts",
    ),
    Command(
        "compare-texts",
        "which features differ between two sets of texts",
        "gemmascope_fast.cli.compare_texts",
        "add_compare_arguments",
        "run_compare",
    ),
    Command(
        "compare-models",
        "features gained, lost and moved between two models",
        "gemmascope_fast.cli.compare_models",
        "add_models_arguments",
        "run_models",
    ),
    Command(
        "variants",
        "how stable features and labels are over variants of a text",
        "gemmascope_fast.cli.compare_variants",
        "add_variants_arguments",
        "run_variants",
    ),
    Command(
        "conversation",
        "features per turn and role of a conversation",
        "gemmascope_fast.cli.compare_conversation",
        "add_conversation_arguments",
        "run_conversation",
    ),
    Command(
        "gpu-check",
        "compile the GPU kernels without a GPU, gate what they use, model what they could reach",
        "gemmascope_fast.dev.gpu.check",
        "add_gpu_check_arguments",
        "run_gpu_check",
    ),
    Command(
        "ls",
        "the checkpoints in a folder, a Hugging Face repository or a SAELens release",
        "gemmascope_fast.cli.checkpoints",
        "add_ls_arguments",
        "run_ls",
    ),
    Command(
        "convert",
        "a checkpoint in another format",
        "gemmascope_fast.cli.checkpoints",
        "add_convert_arguments",
        "run_convert",
    ),
    Command(
        "info",
        "versions, instruction sets, which implementation serves which op, and why",
        "gemmascope_fast.cli.info",
        "add_info_arguments",
        "run_info",
    ),
    Command(
        "bench",
        "verified, paired timings against what people use today",
        "gemmascope_fast.dev.bench.command",
        "add_bench_arguments",
        "run_bench",
    ),
    Command(
        "report",
        "a page, plots and the README's table from a benchmark's JSON",
        "gemmascope_fast.dev.report.results_page",
        "add_report_arguments",
        "run_report",
    ),
    Command(
        "profile",
        "where the time of a model's loop with an SAE goes",
        "gemmascope_fast.dev.profile",
        "add_profile_arguments",
        "run_profile",
    ),
    Command(
        "roof",
        "measured read bandwidth, fp32 and int8 peaks of this machine",
        "gemmascope_fast.dev.roof",
        "add_roof_arguments",
        "run_roof",
    ),
    Command(
        "quantize",
        "nested low-bit codes of a model's linear layers, and what each width costs",
        "gemmascope_fast.cli.quantize",
        "add_arguments",
        "run",
    ),
    Command(
        "compare",
        "tables of widths and methods for a model's layers and for an SAE; resumable",
        "gemmascope_fast.cli.quantize_tables",
        "add_compare_arguments",
        "run_compare",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command's arguments."""
    parser = argparse.ArgumentParser(
        prog="gemmascope-fast", description="Exact, sparse and fast JumpReLU SAEs of the Gemma Scope family."
    )
    parser.add_argument("--version", action="version", version=f"gemmascope-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        module = importlib.import_module(command.module)
        getattr(module, command.add)(sub)
        sub.set_defaults(run=getattr(module, command.run))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 where the input was wrong (one line on stderr says what), 2 for wrong usage."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (GemmaScopeFastError, ValueError, OSError) as error:
        print(f"gemmascope-fast {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
