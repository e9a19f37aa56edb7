"""The package's own format (safetensors): tensors by name, and JSON under the metadata key "gemmascope_fast"."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint, hook_site, one_of
from gemmascope_fast.checkpoints.kinds import ARRAYS, KINDS
from gemmascope_fast.checkpoints.stored_screen import check_screen
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import open_safetensors
from gemmascope_fast.files.fields import integer, json_object, shown, text
from gemmascope_fast.files.write import Source, write_safetensors
from gemmascope_fast.sae.screen import Screen, weights_digest

if TYPE_CHECKING:
    from gemmascope_fast.sae.jumprelu import JumpReLUSAE

KEY = "gemmascope_fast"
FILE = "sae.safetensors"
_SCREEN = tuple(field.name for field in fields(Screen))


def read(path: Path) -> Checkpoint:
    """Read a file written by `save`; `read_screen` reads the tensors named "screen."."""
    entries, metadata = open_safetensors(path)
    about = _metadata(path, metadata)
    integer(path, "version", about.get("version"), 1, 1)
    kind = one_of(path, "kind", about.get("kind"), KINDS)
    arrays = {name: entry for name, entry in entries.items() if not name.startswith("screen.")}
    figures = about.get("figures") or {}
    if not isinstance(figures, dict):
        raise CheckpointError(f"{path}: metadata {KEY!r}: figures: expected an object, got {shown(figures)}")
    return Checkpoint(
        path,
        kind,
        arrays,
        hook_site(path, about.get("hook_name")),
        hook_site(path, about.get("hook_name_out")) if "transcoder" in kind else None,
        text(path, "model_name", about.get("model_name")),
        figures,
        fields={name: about[name] for name in _field_names() if about.get(name) is not None},
        extra={"neuronpedia_id": text(path, "neuronpedia_id", about.get("neuronpedia_id"))},
        format="native",
    )


def is_own(path: Path) -> bool:
    """Whether a safetensors file says that this package wrote it; a file of any name may."""
    return KEY in open_safetensors(path)[1]


def _field_names() -> set[str]:
    """The fields of all kinds: one that is not the checkpoint's own kind's is an error."""
    return {name for coder in KINDS.values() for name in coder.extra_fields}


def _metadata(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise CheckpointError(f"{path}: metadata {KEY!r}: expected a JSON object, got none")
    return json_object(path, f"metadata {KEY!r}", metadata[KEY])


def read_screen(sae: JumpReLUSAE, path: Path) -> Screen | None:
    """The screen stored with the weights that `sae` was loaded from; None if there is none, or if the weights were cast
    and are no longer those it was built from.

    Raises CheckpointError if it was built from other weights than the file's, or has values that no build produces.
    """
    entries, metadata = open_safetensors(path)
    about = _metadata(path, metadata)
    digest = about.get("screen")
    if digest is None:
        return None
    held = {name.removeprefix("screen."): e for name, e in entries.items() if name.startswith("screen.")}
    if entries["W_enc"].dtype != sae.dtype or sae.device.type != "cpu":
        return None
    if digest != weights_digest(sae.W_enc, sae.b_enc, sae.threshold):
        raise CheckpointError(f"{path}: screen: built from other weights than those of the file")
    if not {"code", "table"} <= set(held) <= set(_SCREEN):
        raise CheckpointError(f"{path}: screen: expected code, table and some of {_SCREEN}, got {shown(sorted(held))}")
    # START may be infinite; `check_screen` checks the table's values
    tensors = {name: entry.read(sae.device, entry.dtype, finite=False) for name, entry in held.items()}
    optional = (tensors.get(name) for name in ("centre", "directions", "scales"))
    screen = Screen(tensors["code"], tensors.get("code2"), tensors["table"], *optional)
    check_screen(path, screen, sae.d_in, sae.d_sae)
    if screen.digest() != about.get("screen_data"):
        raise CheckpointError(f"{path}: screen: damaged")
    return screen


def save(sae: JumpReLUSAE, path: str | Path, matrix_dtype: torch.dtype | None = None, screen: bool = False) -> None:
    """Write atomically, block by block: the file gets its final name only when it is complete.

    matrix_dtype: what matrices are stored in (None: as held); vectors stay as held.
    screen: store the certified screen too, with a hash of the weights it is of, so that loading builds nothing.
    """
    if sae.kind not in KINDS:
        raise CheckpointError(f"{path}: expected one of {', '.join(KINDS)}, got a {sae.kind}")
    about = _about(sae.kind, sae.cfg.hook_name, sae.cfg.hook_name_out, sae.cfg.metadata.model_name)
    about |= {"figures": sae.cfg.metadata.extra.get("figures", {})}
    about |= {"neuronpedia_id": sae.cfg.metadata.neuronpedia_id}
    about |= {name: getattr(sae, name) for name in sae.extra_fields}
    arrays: dict[str, Source] = {name: getattr(sae, name).detach() for name in (*ARRAYS, *sae.extra_arrays)}
    if screen:
        if matrix_dtype not in (None, sae.dtype):
            raise ValueError(f"screen: it was built from {sae.dtype} weights, which does not fit {matrix_dtype}")
        made = sae.prepare().screen_cache.screen
        assert made is not None
        arrays |= {f"screen.{name}": tensor for name, tensor in made.tensors().items()}
        about |= {"screen": weights_digest(sae.W_enc, sae.b_enc, sae.threshold), "screen_data": made.digest()}
    write_safetensors(Path(path), arrays, {KEY: json.dumps(about)}, matrix_dtype, only_matrices=True)


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `sae.safetensors` from the entries of another format."""
    if checkpoint.kind not in KINDS:
        raise CheckpointError(f"{folder}: writing a {checkpoint.kind} as one file is not supported")
    site, out = checkpoint.site, checkpoint.site_out or checkpoint.site
    about = _about(
        checkpoint.kind, site.hook_name if site else None, out.hook_name if out else None, checkpoint.model_name
    )
    about |= {"figures": checkpoint.figures, "neuronpedia_id": checkpoint.extra.get("neuronpedia_id")}
    about |= checkpoint.fields
    write_safetensors(folder / FILE, arrays, {KEY: json.dumps(about)}, dtype)


def _about(kind: str, hook_name: str | None, hook_name_out: str | None, model_name: str | None) -> dict[str, Any]:
    return {
        "version": 1,
        "kind": kind,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "model_name": model_name,
    }
