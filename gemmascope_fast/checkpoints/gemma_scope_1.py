"""Gemma Scope (Gemma 2): params.npz; the site is told by the path (facts section 1)."""

from __future__ import annotations

import re
from pathlib import Path

from gemmascope_fast.checkpoints.arrays import open_npz
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.sites import Site

_REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_SITES = {"res": "resid", "mlp": "mlp", "att": "attn"}


def read(path: Path) -> Checkpoint:
    """`params.npz`.  Without a repository's name in the path the site stays None: it cannot be guessed."""
    text = path.as_posix()
    repository, layer = _REPOSITORY.search(text), re.search(r"/layer_(\d+)/", text)
    kind, site, site_out, model = "sae", None, None, None
    if repository:
        size, tuned, family = repository.groups()
        model = f"google/gemma-2-{size}" + ("-it" if tuned == "it" else "")
        kind = "transcoder" if family == "transcoders" else "sae"
        if "/embedding/" in text:
            site = Site("embed")
        elif layer and kind == "transcoder":
            site, site_out = Site("mlp_in_no_gain", int(layer[1])), Site("mlp", int(layer[1]))
        elif layer:
            site = Site(_SITES[family], int(layer[1]))
    return Checkpoint(path, kind, open_npz(path), site, site_out, model)
