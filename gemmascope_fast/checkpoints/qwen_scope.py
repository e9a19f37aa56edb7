"""Qwen Scope (Qwen 3 and 3.5): `layerN.sae.pt`, top-k SAEs of the residual stream.

The file has W_enc [d_sae, d_in], W_dec [d_in, d_sae], b_enc and b_dec.  k is only in the repository's name:
SAE-Res-Qwen3-1.7B-Base-W32K-L0_50 has k = 50.  Files from `write` also contain k, so that they can be read anywhere;
SAELens ignores it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.checkpoints.torch_write import save_torch
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import integer
from gemmascope_fast.files.write import Source
from gemmascope_fast.sae.sites import Site

FORMAT = "qwen-scope"
NAME = re.compile(r"layer([0-9]{1,6})\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-([\w.-]+?)-W[0-9]+K-L0_([0-9]{1,9})(?![0-9])")


def read(path: Path, arrays: dict[str, Entry], values: dict[str, Any]) -> Checkpoint:
    """Read a `layerN.sae.pt`; model and k come from the last name of a Qwen Scope repository in its path."""
    repositories, layer = _REPOSITORY.findall(path.as_posix()), NAME.fullmatch(path.name)
    named = int(repositories[-1][1]) if repositories else None
    k = named if values.get("k") is None else integer(path, "k", values["k"])
    if k is None:
        raise CheckpointError(
            f"{path}: k: missing: Qwen Scope keeps it in the repository's name, so the file must be in a folder such as"
            " SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    if named is not None and k != named:
        raise CheckpointError(f"{path}: k: {k} contradicts the repository's name, which says {named}")
    transposed = {name: entry.transposed() if name in ("W_enc", "W_dec") else entry for name, entry in arrays.items()}
    return Checkpoint(
        path,
        "topk_sae",
        transposed,
        Site("resid", int(layer[1])) if layer else None,
        model_name=f"Qwen/{repositories[-1][0]}" if repositories else None,
        threshold_value=0.0,
        fields={"k": k},
        format=FORMAT,
    )


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `layerN.sae.pt`, where N is the layer of the SAE's site."""
    site = checkpoint.site
    if checkpoint.kind != "topk_sae" or site is None or site.kind != "resid":
        raise CheckpointError(
            f"{folder}: Qwen Scope's format is for top-k SAEs of the residual stream, got a {checkpoint.kind} at"
            f" {site.hook_name if site else 'an unknown site'}"
        )
    stored = {"W_enc": ("W_enc", True), "W_dec": ("W_dec", True), "b_enc": ("b_enc", False), "b_dec": ("b_dec", False)}
    save_torch(folder / f"layer{site.layer}.sae.pt", arrays, stored, dtype, {"k": checkpoint.fields["k"]})
