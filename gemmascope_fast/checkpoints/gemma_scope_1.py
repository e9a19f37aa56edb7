"""Gemma Scope (Gemma 2): params.npz. The site is read from the path."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import open_npz
from gemmascope_fast.files.write import Source, write_npz
from gemmascope_fast.sae.sites import Site

FILE = "params.npz"
_REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_SITES = {"res": "resid", "mlp": "mlp", "att": "attn"}


def read(path: Path) -> Checkpoint:
    """`params.npz`.

    If the path has no repository name, the site is None and the kind is a guess (`kind_known`), because a transcoder
    has the shapes of a residual SAE.  If a path has several names, the last one is used.
    """
    text = path.as_posix()
    repositories, layer = _REPOSITORY.findall(text), re.search(r"/layer_(\d+)/", text)
    arrays = {("W" + name[1:] if name.startswith("w_") else name): entry for name, entry in open_npz(path).items()}
    if not repositories:
        # an SAE's input and output have the same width, so different widths mean a transcoder
        shapes = [arrays[name].shape for name in ("W_enc", "W_dec") if name in arrays]
        differs = len(shapes) == 2 and shapes[0][:1] != shapes[1][-1:]
        return Checkpoint(path, "transcoder" if differs else "sae", arrays, kind_known=differs, format="gemma-scope-1")
    size, tuned, family = repositories[-1]
    model = f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")
    kind = "transcoder" if family == "transcoders" else "sae"
    site = site_out = None
    if "/embedding/" in text:
        site = Site("embed")
    elif layer and kind == "transcoder":
        site, site_out = Site("mlp_in_no_gain", int(layer[1])), Site("mlp", int(layer[1]))
    elif layer:
        site = Site(_SITES[family], int(layer[1]))
    return Checkpoint(path, kind, arrays, site, site_out, model, format="gemma-scope-1")


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `params.npz`, always float32. Raises an error for what the format cannot store (a skip, another dtype)."""
    if checkpoint.kind not in ("sae", "transcoder"):
        raise CheckpointError(f"{folder}: Gemma Scope 1 has no {checkpoint.kind}")
    if dtype not in (None, torch.float32):
        raise CheckpointError(f"{folder}: Gemma Scope 1 stores float32, not {dtype}")
    write_npz(folder / FILE, arrays)
