"""Checkpoints written by `torch.save`; the names of their arrays show which format they have.

Qwen Scope's `layerN.sae.pt`, Goodfire's and qresearch's `.pt` and `.pth`, OpenAI's `N.pt`, dictionary_learning's
`ae.pt`.  They are read without unpickling (`files/torch_zip.py`), in blocks like every other format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemmascope_fast.checkpoints import dictionary_learning, goodfire, openai, qwen_scope
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import shown
from gemmascope_fast.files.torch_zip import open_torch

SUFFIXES = (".pt", ".pth")


def read(path: Path) -> Checkpoint:
    """Read the checkpoint in a file of torch.save, in any of these formats."""
    held = open_torch(path)
    arrays: dict[str, Entry] = {name: value for name, value in held.items() if isinstance(value, Entry)}
    values: dict[str, Any] = {name: value for name, value in held.items() if name not in arrays}
    if path.name == dictionary_learning.FILE:
        return dictionary_learning.read(path, arrays)
    if "pre_bias" in arrays:
        return openai.read(path, arrays, values)
    if "encoder_linear.weight" in arrays or "encoder.weight" in arrays:
        return goodfire.read(path, arrays)
    if "W_enc" in arrays:
        return qwen_scope.read(path, arrays, values)
    raise CheckpointError(
        f"{path}: expected an SAE of Qwen Scope, Goodfire, OpenAI or dictionary_learning, got arrays"
        f" {shown(sorted(arrays))}"
    )
