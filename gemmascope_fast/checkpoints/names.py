"""SAELens's names of releases and SAEs, from a table written by scripts/saelens_names.py."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemmascope_fast.checkpoints.saelens import REFUSED
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


@cache
def _pages() -> dict[tuple[str, str], str]:
    """(repository's own name, path in it) → Neuronpedia's id, for every SAE that has a page."""
    found: dict[tuple[str, str], str] = {}
    for entry in releases().values():
        for sae_id, page in entry.get("neuronpedia", {}).items():
            path = entry.get("paths", {}).get(sae_id, entry.get("prefix", "") + sae_id)
            found.setdefault((entry["repo"].rpartition("/")[2], path), page)
    return found


@cache
def _repositories() -> frozenset[str]:
    return frozenset(repo for repo, _ in _pages())


def neuronpedia_id(path: Path) -> str | None:
    """Neuronpedia's id of the checkpoint in a file whose path names its repository: …/gemma-scope-2b-pt-res/layer_20/
    width_16k/average_l0_71/params.npz, or the same in Hugging Face's cache.  None if SAELens's table has none."""
    parts = path.parts
    for i in reversed(range(len(parts) - 1)):
        repo, below = parts[i].rpartition("--")[2], parts[i + 1 :]
        if repo not in _repositories():
            continue
        if parts[i].startswith("models--") and below[0] == "snapshots":
            below = below[2:]
        for end in (len(below), len(below) - 1, len(below) - 2):  # a file, its folder, or the folder above that one
            page = _pages().get((repo, "/".join(below[:end])))
            if page is not None:
                return page
    return None


def lookup(release: str, sae_id: str | None) -> Named | None:
    """Look up `release` and `sae_id`; None if there is no such release.

    Raises CheckpointError for a release without that SAE, naming the nearest, and for one of a kind that is not
    computed here.
    """
    entry = releases().get(release)
    if entry is None:
        return None
    if entry["format"] in REFUSED:
        raise CheckpointError(f"{release}: {entry['format']} SAEs are not supported: {REFUSED[entry['format']]}")
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
