"""Fields of headers and configs, each kind checked in one place: what is wrong is a CheckpointError with the file's
name."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import CheckpointError

MOST = (1 << 63) - 1
MAX_DIMENSIONS = 8  # of an array; nothing read here has more than four

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 80, 80, 40


def shown(value: object) -> str:
    """`value` for an error message, in about one line whatever it is."""
    return _repr.repr(value)


def json_object(path: Path, what: str, text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text.  CheckpointError where it is something else."""
    try:
        loaded = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what}: not readable as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: {what}: expected a JSON object, got {type(loaded).__name__}")
    return loaded


def integer(path: Path, what: str, value: object, least: int = 1, most: int = MOST) -> int:
    """`value`, checked to be an integer from `least` to `most`.  A float, a text or a bool is not one."""
    if type(value) is int and least <= value <= most:
        return value
    limits = f"an integer from {least} to {most}" if most < MOST else f"an integer, at least {least}"
    raise CheckpointError(f"{path}: {what}: expected {limits}, got {shown(value)}")


def integers(path: Path, what: str, value: object, count: int | None = None, most: int = MOST) -> list[int]:
    """A list of integers from 0 to `most`, as many as `count` where it is given."""
    if not isinstance(value, list) or len(value) != (len(value) if count is None else count):
        wanted = "integers" if count is None else f"{count} integers"
        raise CheckpointError(f"{path}: {what}: expected a list of {wanted}, got {shown(value)}")
    return [integer(path, what, number, 0, most) for number in value]


def sizes(path: Path, what: str, value: object) -> tuple[int, ...]:
    """The shape of an array: a list of up to 8 integers that are not negative."""
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {what}: expected up to {MAX_DIMENSIONS} sizes, got {shown(value)}")
    return tuple(integers(path, what, value))


def flag(path: Path, what: str, value: object) -> bool:
    """`value`, checked to be true or false."""
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {what}: expected true or false, got {shown(value)}")
    return value


def text(path: Path, what: str, value: object) -> str | None:
    """`value`, checked to be a text that is not empty; None stays None."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise CheckpointError(f"{path}: {what}: expected text, got {shown(value)}")
