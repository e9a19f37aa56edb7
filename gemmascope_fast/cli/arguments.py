"""What several sub-commands share: the arguments that name a model and an SAE, and how results are written."""

from __future__ import annotations

import argparse
from pathlib import Path

from gemmascope_fast.errors import require

PLACE = "a file, a folder, a Hugging Face repository, or a SAELens release; 'demo' is the bundled SAE"
PLOTS = (".png", ".svg", ".pdf")


def add_pair_arguments(parser: argparse.ArgumentParser, *, sae: bool = True) -> None:
    """--model, and with `sae` --sae, --sae-id, --layer and --anywhere: what `demo_model.load_pair` takes."""
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    if sae:
        parser.add_argument("--sae", default="demo", help="an SAE's repository, folder or file; 'demo': bundled")
        parser.add_argument("--sae-id", help="the SAE within its repository")
        parser.add_argument("--layer", type=int, help="the layer whose output the SAE reads (default: the SAE's own)")
        add_anywhere_argument(parser)


def add_anywhere_argument(parser: argparse.ArgumentParser) -> None:
    """--anywhere, beside --layer."""
    parser.add_argument("--anywhere", action="store_true", help="allow a --layer that is not the SAE's own")


def add_output_arguments(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    """--json and --plot."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as .png, .svg or .pdf")


def check_outputs(args: argparse.Namespace) -> None:
    """ValueError where --json, --plot, --html or --trace could not be written, and --plot without its extra: asked
    before the minutes are spent."""
    for name in ("json", "plot", "html", "trace"):
        path = getattr(args, name, None)
        if path is None:
            continue
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"--{name}: expected a file in a folder that exists, got {path}")
        if name == "plot":
            require("matplotlib", "plot", "--plot")
            if path.suffix not in PLOTS:
                raise ValueError(f"--plot: expected a name ending in {', '.join(PLOTS)}, got {path}")
