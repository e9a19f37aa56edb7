"""What several sub-commands share: the arguments that name a model and an SAE, and how results are written."""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemmascope_fast.files.atomic import replacing, saying_where

PLOTS = (".png", ".svg", ".pdf")
EXAMPLES = Path(__file__).parent / "data" / "examples"


def add_pair_arguments(parser: argparse.ArgumentParser, *, sae: bool = True) -> None:
    """--model, and with `sae` --sae, --sae-id and --layer: what `demo_model.load_pair` takes."""
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    if sae:
        parser.add_argument("--sae", default="demo", help="an SAE's repository, folder or file; 'demo': bundled")
        parser.add_argument("--sae-id", help="the SAE within its repository")
        parser.add_argument("--layer", type=int, help="the layer whose output the SAE reads (default: the SAE's own)")


def add_output_arguments(parser: argparse.ArgumentParser, *, plot: bool = True) -> None:
    """--json and --plot."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as .png, .svg or .pdf")


def example(value: str | Path, name: str) -> Path:
    """The bundled example `name` for the value "demo"; any other path stands for itself."""
    return EXAMPLES / name if str(value) == "demo" else Path(value)


def require(module: str, extra: str, what: str) -> None:
    """ValueError naming the extra where a module is not installed; asked before the minutes are spent."""
    if find_spec(module) is None:
        raise ValueError(f"{what}: expected {module}, which is not installed; pip install 'gemmascope-fast[{extra}]'")


def write_json(path: Path, value: Any) -> None:
    """JSON has no NaN and no infinity: null says that there is no such figure.  The file appears whole."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """The file appears whole.  OSError names it."""
    with saying_where(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure as what the path's ending says; the file appears whole.  OSError names it."""
    with saying_where(path), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, Path) else value


def shown(value: Any) -> str:
    """A figure as tables show it."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
