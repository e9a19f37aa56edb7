"""SAELens's names of releases and SAEs, from a table written by scripts/saelens_names.py."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gemmascope_fast.errors import CheckpointError


@dataclass(frozen=True)
class Named:
    """The checkpoint that a name refers to.  scale: SAELens's norm_scaling_factor, folded into the weights."""

    repo: str
    path: str
    model: str
    neuronpedia_id: str | None = None
    scale: float | None = None


@cache
def releases() -> dict[str, dict[str, Any]]:
    """Release name → repo, model, format, prefix, ids, paths, neuronpedia, scale (the last four by id)."""
    return json.loads(files("gemmascope_fast.checkpoints").joinpath("data/saelens_names.json").read_text("utf-8"))[
        "releases"
    ]


def ids(release: str) -> list[str]:
    """Names of the SAEs of a release."""
    return releases()[release]["ids"]


def lookup(release: str, sae_id: str | None) -> Named | None:
    """Look up `release` and `sae_id`; None if there is no such release.

    Raises CheckpointError for a release without that SAE, with the most similar names.
    """
    entry = releases().get(release)
    if entry is None:
        return None
    if sae_id not in entry["ids"]:
        near = difflib.get_close_matches(sae_id or "", entry["ids"], 3, 0.0) if sae_id else entry["ids"][:3]
        raise CheckpointError(
            f"sae_id: expected one of the {len(entry['ids'])} SAEs of {release}, such as {', '.join(near)}, got"
            f" {sae_id!r}; `gemmascope-fast ls {release}` lists them"
        )
    path = entry.get("paths", {}).get(sae_id, entry.get("prefix", "") + sae_id)
    return Named(
        entry["repo"],
        path,
        entry["model"],
        entry.get("neuronpedia", {}).get(sae_id),
        entry.get("scale", {}).get(sae_id),
    )
