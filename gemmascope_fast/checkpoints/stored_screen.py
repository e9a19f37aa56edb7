"""Checks of a screen that was read from a file, before a kernel uses it.

A digest or checksum in the same file shows damage, not manipulation.  These checks are on the values: the table must
be one that a build can give, and no kernel may get a feature past d_sae or an invalid integer from it.  They do not
check that the bounds fit the weights, which would take as long as building the screen.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops.screen_rows import MOST_SCALE
from gemmascope_fast.ops.screen_terms import MOST_DIRECTIONS, Row, table_stride
from gemmascope_fast.sae.screen import Screen

# Rows of the table that are norms, bounds or scales.
_NOT_NEGATIVE = (Row.SCALE, Row.ERROR, Row.NORM, Row.SLACK, Row.SCALE2, Row.ERROR2)
_MAY_OVERFLOW = (Row.SLACK, Row.START)  # infinite if the centre is huge; in START also "never discard"


def check_screen(path: Path, screen: Screen, d_in: int, d_sae: int) -> None:
    """CheckpointError naming file and array if a screen of an encoder [d_in, d_sae] cannot be the result of a build."""
    directions = screen.directions
    k = 0 if directions is None or directions.dim() != 2 else directions.shape[0]
    tiles = (-(-d_sae // 4), -(-d_in // 64), 4, 64)
    wanted = {
        "code": (torch.uint8, tiles),
        "code2": (torch.uint8, tiles),
        "table": (torch.float32, (len(Row) + k, table_stride(d_sae))),
        "centre": (torch.float32, (d_in,)),
        "directions": (torch.float32, (k, d_in)),
        "scales": (torch.float32, (d_in,)),
    }
    for name, tensor in screen.tensors().items():
        dtype, shape = wanted[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise _wrong(path, name, f"{dtype} {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")
        if name in ("centre", "directions", "scales") and not bool(torch.isfinite(tensor).all()):
            raise _wrong(path, name, "finite values", "NaN or Inf")
    if directions is not None and not 0 < k <= min(MOST_DIRECTIONS, d_in):
        raise _wrong(path, "directions", f"1 to {min(MOST_DIRECTIONS, d_in)} of them", str(k))
    if screen.scales is not None and not _powers_of_two(screen.scales):
        raise _wrong(path, "scales", f"powers of two from 1 to {MOST_SCALE}", "others")
    _check_table(path, screen.table, d_sae)


def _check_table(path: Path, table: Tensor, d_sae: int) -> None:
    for row, values in enumerate(table):
        name = f"table, row {Row(row).name if row < len(Row) else row}"
        inside, beyond = values[:d_sae], values[d_sae:]
        past = -math.inf if row == Row.START else 0.0
        if not bool((beyond == past).all()):
            raise _wrong(path, name, f"{past} in the columns past d_sae = {d_sae}", "other values")
        # a single comparison that is false for NaN, infinity and numbers out of range
        least = 0.0 if row in (*_NOT_NEGATIVE, Row.ZERO) else -torch.finfo(table.dtype).max
        most = 255.0 if row == Row.ZERO else math.inf if row in _MAY_OVERFLOW else torch.finfo(table.dtype).max
        if not bool(((inside >= least) & (inside <= most)).all()):
            raise _wrong(path, name, f"numbers from {least:g} to {most:g}", "others or NaN")
    zero = table[Row.ZERO, :d_sae]
    if not bool((zero == zero.round()).all()):
        raise _wrong(path, "table, row ZERO", "whole numbers", "others")


def _powers_of_two(scales: Tensor) -> bool:
    return bool(((scales.frexp().mantissa == 0.5) & (scales >= 1) & (scales <= MOST_SCALE)).all())


def _wrong(path: Path, name: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(f"{path}: screen.{name}: expected {expected}, got {got}")
