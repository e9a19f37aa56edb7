"""Writes results of a job atomically: JSON, text, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gemmascope_fast.files.atomic import replacing, saying_where


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. JSON has no NaN and infinity, so they become null."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically.  An OSError names the file."""
    with saying_where(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure in the format of the path's suffix, atomically.  An OSError names the file."""
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
