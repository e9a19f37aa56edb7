"""Writes results of a job atomically: JSON, text, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gemmascope_fast.files.atomic import make_folder, replacing, saying_where


def write_json(path: Path, value: Any) -> None:
    """`json_text` as a file.  The file appears whole."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON has no NaN and no infinity: null says that there is no such figure."""
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """The file appears whole, in a folder that is made if it is missing.  OSError names it."""
    make_folder(path.parent)
    with saying_where(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure in the format of the path's ending; otherwise as `write_text`."""
    make_folder(path.parent)
    with saying_where(path), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, Path) else value


def shown(value: Any) -> str:
    """Format a number for tables."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
