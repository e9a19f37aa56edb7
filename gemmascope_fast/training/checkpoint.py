"""A training run on disk: one safetensors file, replaced atomically, so that a kill at any time loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.atomic import make_folder
from gemmascope_fast.files.write import write_safetensors
from gemmascope_fast.training.trainer import Trainer

KEY = "gemmascope_fast.training"


def save_run(trainer: Trainer, path: Path, about: dict[str, Any]) -> None:
    """Write the run's state and `about` (what it is a run of) to disk, then rename the file to `path`."""
    tensors, numbers = trainer.state()
    make_folder(path.parent)
    write_safetensors(path, tensors, {KEY: json.dumps({"version": 1, "numbers": numbers, "about": about})})


def load_run(path: Path) -> tuple[Trainer, dict[str, Any]]:
    """(trainer, about).  CheckpointError if the file is not such a run."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {})[KEY])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stored["version"] != 1:
            raise CheckpointError(f"{path}: expected version 1 of a training run, got {stored['version']}")
        return Trainer.restore(tensors, stored["numbers"]), stored["about"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a training run that can be resumed: {error}") from error
