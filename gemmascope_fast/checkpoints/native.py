"""The package's own safetensors: tensors by name, one JSON object under the metadata key "gemmascope_fast"."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gemmascope_fast.checkpoints.arrays import open_safetensors
from gemmascope_fast.checkpoints.base import REQUIRED, Checkpoint, hook_site
from gemmascope_fast.errors import CheckpointError

if TYPE_CHECKING:
    from gemmascope_fast.sae import JumpReLUSAE

KEY = "gemmascope_fast"
KINDS = ("sae", "transcoder", "skip_transcoder")


def read(path: Path) -> Checkpoint:
    """A file written by `save`; tensors under "screen." are left to the screen."""
    entries, metadata = open_safetensors(path)
    try:
        about = json.loads(metadata[KEY])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata {KEY!r}: expected a JSON object: {error}") from error
    if not isinstance(about, dict) or about.get("version") != 1 or about.get("kind") not in KINDS:
        raise CheckpointError(f"{path}: metadata {KEY!r}: expected version 1 and a kind of {KINDS}, got {about!r:.200}")
    arrays = {name: entry for name, entry in entries.items() if not name.startswith("screen.")}
    site, site_out = hook_site(path, about.get("hook_name")), hook_site(path, about.get("hook_name_out"))
    return Checkpoint(path, about["kind"], arrays, site, site_out, about.get("model_name"), about.get("figures") or {})


def save(sae: JumpReLUSAE, path: str | Path) -> None:
    """Write atomically: a temporary file in the same folder, renamed when complete."""
    from safetensors.torch import save_file

    path = Path(path)
    names = REQUIRED + (("W_skip",) if sae.kind == "skip_transcoder" else ())
    tensors = {name: getattr(sae, name).detach().cpu().contiguous() for name in names}
    about = {"version": 1, "kind": sae.kind, "hook_name": sae.cfg.hook_name, "hook_name_out": sae.cfg.hook_name_out}
    about |= {"model_name": sae.cfg.metadata.model_name, "figures": sae.cfg.metadata.extra.get("figures", {})}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={KEY: json.dumps(about)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
