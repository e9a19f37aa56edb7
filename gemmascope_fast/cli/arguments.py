"""What several sub-commands share: the arguments that name a model and an SAE, and how results are written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from gemmascope_fast.errors import require

PLACE = "a file, a folder, a Hugging Face repository, or a SAELens release; 'demo' is the bundled SAE"
OUTPUTS = ("json", "plot", "html", "trace")
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


def check_outputs(args: argparse.Namespace, files: Sequence[str] = OUTPUTS, folders: Sequence[str] = ()) -> None:
    """ValueError where a file or folder of these options could not be written, and --plot without its extra: asked
    before the minutes are spent.  Nothing is made yet: a file needs a folder that exists, a folder may lie in folders
    that do not."""
    for name in files:
        path = getattr(args, name, None)
        if path is None:
            continue
        flag = "--" + name.replace("_", "-")
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"{flag}: expected a file in a folder that exists, got {path}")
        _check_writable(flag, path, path.parent)
        if name == "plot":
            require("matplotlib", "plot", "--plot")
            if path.suffix not in PLOTS:
                raise ValueError(f"--plot: expected a name ending in {', '.join(PLOTS)}, got {path}")
    for name in folders:
        if (path := getattr(args, name, None)) is not None:
            check_folder("--" + name.replace("_", "-"), path)


def check_folder(flag: str, path: Path) -> None:
    """ValueError where a folder could neither be made nor written into."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{flag}: expected a folder, got {path}: {there} is a file")
    _check_writable(flag, path, there)


def _check_writable(flag: str, path: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{flag}: expected a place that can be written, got {path}: no permission to write in {folder}"
        )
