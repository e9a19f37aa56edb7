"""Packed matrices in safetensors: tensors `<name>.plane0` …, `.scale`, `.zero_point`, `.overflow_crow`, `.overflow_col`
and other tensors (bias, mean), with a JSON object of shapes under the metadata key "matryoshka"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.fields import integer, integers, json_object, shown
from gemmascope_fast.files.regular import check_regular
from gemmascope_fast.files.write import write_safetensors
from gemmascope_fast.quant.planes import WIDTHS, Packed

KEY = "matryoshka"
VERSION = 1


def save(path: str | Path, matrices: Mapping[str, Packed], beside: Mapping[str, Tensor], about: dict[str, Any]) -> int:
    """Write atomically; returns the size of the file in bytes.  `about` must be JSON."""
    path = Path(path)
    tensors = dict(beside)
    layers = {}
    for name, packed in matrices.items():
        tensors |= {f"{name}.plane{i}": p for i, p in enumerate(packed.planes)}
        tensors |= {f"{name}.scale": packed.scale, f"{name}.zero_point": packed.zero_point}
        if packed.overflow is not None:
            tensors |= {
                f"{name}.overflow_crow": packed.overflow[0],
                f"{name}.overflow_col": packed.overflow[1],
            }
        layers[name] = {
            "shape": [packed.out_features, packed.in_features],
            "group_size": packed.group_size,
            "stored": packed.stored,
            "mode": packed.mode,
        }
    header = json.dumps({"version": VERSION, "layers": layers, "about": about})
    # wide types first, so that each array stays aligned
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    write_safetensors(path, ordered, {KEY: header})
    return path.stat().st_size


def load(path: str | Path) -> tuple[dict[str, Packed], dict[str, Tensor], dict[str, Any]]:
    """(matrices, other tensors, about).  CheckpointError if codes, scales and shapes disagree."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            stored = (file.metadata() or {})[KEY]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable file of matryoshka codes: {error}") from error
    header = json_object(path, f"metadata {KEY!r}", stored)
    integer(path, "version", header.get("version"), VERSION, VERSION)
    try:
        matrices = {name: _matrix(path, tensors, name, layer) for name, layer in header["layers"].items()}
        about = header["about"]
        if not isinstance(about, dict):
            raise ValueError(f"about: expected an object, got {shown(about)}")
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: codes, scales and shapes disagree: {error}") from error
    return matrices, tensors, about


def _matrix(path: Path, tensors: dict[str, Tensor], name: str, layer: dict[str, Any]) -> Packed:
    """Remove one matrix's tensors from `tensors` and return the matrix."""
    rows, columns = (integer(path, f"{name}: shape", n) for n in integers(path, f"{name}: shape", layer["shape"], 2))
    stored, group = integer(path, f"{name}: stored", layer["stored"], 2, 8), layer["group_size"]
    group = None if group is None else integer(path, f"{name}: group_size", group)
    planes = tuple(tensors.pop(f"{name}.plane{i}") for i in range(len(WIDTHS[stored])))
    crow, col = tensors.pop(f"{name}.overflow_crow", None), tensors.pop(f"{name}.overflow_col", None)
    if (crow is None) != (col is None):
        raise ValueError(f"{name}: overflow_crow without overflow_col, or the reverse")
    scale = tensors.pop(f"{name}.scale")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name}.scale: expected finite values")
    overflow = None if crow is None or col is None else (crow, col)
    zero = tensors.pop(f"{name}.zero_point")
    return Packed(planes, scale, zero, rows, columns, group, stored, layer["mode"], overflow)
