"""SAEs of two linear layers in one file of `torch.save`: Goodfire's (Llama 3.1 8B and 3.3 70B) and qresearch's
(DeepSeek R1 Distill Llama 8B).

ReLU SAEs of the residual stream, without subtracting a bias.  Goodfire's names are `encoder_linear.weight`
[d_sae, d_in] and so on, qresearch's `encoder.weight`; the file name gives model and layer.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.checkpoints.torch_write import check_relu, save_torch
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.write import Source
from gemmascope_fast.sae.sites import Site

FORMAT = "goodfire"
NAME = re.compile(r"(.+)-SAE-l([0-9]{1,6})\.pth?")
_MODELS = {"Llama": "meta-llama/", "DeepSeek": "deepseek-ai/"}


def read(path: Path, arrays: dict[str, Entry]) -> Checkpoint:
    """Read a file such as `Llama-3.3-70B-Instruct-SAE-l50.pt`; with another kind of name the site is None."""
    suffix = "_linear" if "encoder_linear.weight" in arrays else ""
    ours = {f"encoder{suffix}.weight": "W_enc", f"decoder{suffix}.weight": "W_dec"}
    vectors = {f"encoder{suffix}.bias": "b_enc", f"decoder{suffix}.bias": "b_dec"}
    made = {(ours | vectors).get(name, name): e.transposed() if name in ours else e for name, e in arrays.items()}
    named = NAME.fullmatch(path.name)
    model = None if named is None else _MODELS.get(named[1].partition("-")[0], "") + named[1]
    return Checkpoint(
        path,
        "sae",
        made,
        None if named is None else Site("resid", int(named[2])),
        model_name=model,
        threshold_value=0.0,
        format=FORMAT,
    )


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `MODEL-SAE-lN.pt` with Goodfire's names."""
    site = checkpoint.site
    if checkpoint.kind != "sae" or site is None or site.kind != "resid":
        raise CheckpointError(
            f"{folder}: Goodfire's format is for ReLU SAEs of the residual stream, got a {checkpoint.kind} at"
            f" {site.hook_name if site else 'an unknown site'}"
        )
    check_relu(folder, "Goodfire's format", arrays)
    stored = {
        f"{layer}_linear.{part}": (name, part == "weight")
        for layer, part, name in (
            ("encoder", "weight", "W_enc"),
            ("encoder", "bias", "b_enc"),
            ("decoder", "weight", "W_dec"),
            ("decoder", "bias", "b_dec"),
        )
    }
    model = (checkpoint.model_name or "model").rpartition("/")[2]
    save_torch(folder / f"{model}-SAE-l{site.layer}.pt", arrays, stored, dtype)
