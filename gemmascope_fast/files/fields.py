"""Checks the fields of headers and configs, one function for each kind. An invalid field is a CheckpointError with the
file's name."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import CheckpointError

MOST = (1 << 63) - 1
MAX_DIMENSIONS = 8  # of an array; no array here has more than four

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 80, 80, 40


def shown(value: object) -> str:
    """`value` as text for an error message, shortened to about one line."""
    return _repr.repr(value)


def json_object(path: Path, what: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text.  CheckpointError if it is something else."""
    try:
        loaded = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what}: not readable as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: {what}: expected a JSON object, got {type(loaded).__name__}")
    return loaded


def integer(path: Path, what: str, value: object, least: int = 1, most: int = MOST) -> int:
    """Check that `value` is an integer from `least` to `most` and return it.  A float, text or bool is not accepted."""
    if type(value) is int and least <= value <= most:
        return value
    limits = f"an integer from {least} to {most}" if most < MOST else f"an integer, at least {least}"
    raise CheckpointError(f"{path}: {what}: expected {limits}, got {shown(value)}")


def integers(path: Path, what: str, value: object, count: int | None = None, most: int = MOST) -> list[int]:
    """A list of integers from 0 to `most`, of length `count` if given."""
    if not isinstance(value, list) or len(value) != (len(value) if count is None else count):
        wanted = "integers" if count is None else f"{count} integers"
        raise CheckpointError(f"{path}: {what}: expected a list of {wanted}, got {shown(value)}")
    return [integer(path, what, number, 0, most) for number in value]


def sizes(path: Path, what: str, value: object) -> tuple[int, ...]:
    """The shape of an array: a list of up to 8 non-negative integers."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {what}: expected up to {MAX_DIMENSIONS} sizes, got {shown(value)}")
    return tuple(integers(path, what, value))


def flag(path: Path, what: str, value: object) -> bool:
    """Check that `value` is true or false and return it."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {what}: expected true or false, got {shown(value)}")
    return value


def text(path: Path, what: str, value: object) -> str | None:
    """Check that `value` is a non-empty text and return it; None stays None."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise CheckpointError(f"{path}: {what}: expected text, got {shown(value)}")
