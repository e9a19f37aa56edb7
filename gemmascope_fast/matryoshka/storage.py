"""Packed matrices in safetensors: tensors `<name>.plane0` …, `.scale`, `.zero_point`, `.overflow_crow`, `.overflow_col`
and whatever stands beside them (bias, mean), with one JSON object of shapes under the metadata key "matryoshka"."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.matryoshka.planes import WIDTHS, Packed

KEY = "matryoshka"
VERSION = 1


def save(path: str | Path, matrices: Mapping[str, Packed], beside: Mapping[str, Tensor], about: dict[str, Any]) -> int:
    """Write atomically; gives the file's size in bytes.  `about` must be JSON."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: _own(tensor) for name, tensor in beside.items()}
    layers = {}
    for name, packed in matrices.items():
        tensors |= {f"{name}.plane{i}": _own(p) for i, p in enumerate(packed.planes)}
        tensors |= {f"{name}.scale": _own(packed.scale), f"{name}.zero_point": _own(packed.zero_point)}
        if packed.overflow is not None:
            tensors |= {
                f"{name}.overflow_crow": _own(packed.overflow[0]),
                f"{name}.overflow_col": _own(packed.overflow[1]),
            }
        layers[name] = {
            "shape": [packed.out_features, packed.in_features],
            "group_size": packed.group_size,
            "stored": packed.stored,
            "mode": packed.mode,
        }
    header = json.dumps({"version": VERSION, "layers": layers, "about": about})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={KEY: header})
        size = os.path.getsize(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return size


def _own(tensor: Tensor) -> Tensor:
    # a flat copy shares its scales with the nested code; a file holds each under its own name
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load(path: str | Path) -> tuple[dict[str, Packed], dict[str, Tensor], dict[str, Any]]:
    """(matrices, what stood beside them, about).  CheckpointError where codes, scales and shapes disagree."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable file of matryoshka codes: {error}") from error
    try:
        if header["version"] != VERSION:
            raise CheckpointError(f"{path}: version: expected {VERSION}, got {header['version']}")
        matrices = {name: _matrix(tensors, name, layer) for name, layer in header["layers"].items()}
        about = header["about"]
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: codes, scales and shapes disagree: {error}") from error
    return matrices, tensors, about


def _matrix(tensors: dict[str, Tensor], name: str, layer: dict[str, Any]) -> Packed:
    """Take one matrix's tensors out of `tensors`."""
    rows, columns = layer["shape"]
    stored = layer["stored"]
    planes = tuple(tensors.pop(f"{name}.plane{i}") for i in range(len(WIDTHS[stored])))
    crow, col = tensors.pop(f"{name}.overflow_crow", None), tensors.pop(f"{name}.overflow_col", None)
    if (crow is None) != (col is None):
        raise ValueError(f"{name}: half an overflow list")
    scale = tensors.pop(f"{name}.scale")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name}.scale: expected finite values")
    overflow = None if crow is None or col is None else (crow, col)
    zero = tensors.pop(f"{name}.zero_point")
    return Packed(planes, scale, zero, rows, columns, layer["group_size"], stored, layer["mode"], overflow)
