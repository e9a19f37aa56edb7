"""The package's own safetensors: tensors by name, one JSON object under the metadata key "gemmascope_fast"."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch

from gemmascope_fast.checkpoints.base import REQUIRED, SINGLE, Checkpoint, hook_site
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import open_safetensors
from gemmascope_fast.files.write import Source, write_safetensors
from gemmascope_fast.ops.screen_rows import Row, table_stride
from gemmascope_fast.sae.screen import Screen, weights_digest

if TYPE_CHECKING:
    from gemmascope_fast.sae.jumprelu import JumpReLUSAE

KEY = "gemmascope_fast"
FILE = "sae.safetensors"


def read(path: Path) -> Checkpoint:
    """A file written by `save`; tensors under "screen." are read by `read_screen`."""
    entries, metadata = open_safetensors(path)
    try:
        about = json.loads(metadata[KEY])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: metadata {KEY!r}: expected a JSON object: {error}") from error
    if not isinstance(about, dict) or about.get("version") != 1 or about.get("kind") not in SINGLE:
        raise CheckpointError(
            f"{path}: metadata {KEY!r}: expected version 1 and a kind of {SINGLE}, got {about!r:.200}"
        )
    arrays = {name: entry for name, entry in entries.items() if not name.startswith("screen.")}
    figures, k = about.get("figures") or {}, about.get("k")
    if not isinstance(figures, dict) or not (k is None or (type(k) is int and k > 0)):
        raise CheckpointError(f"{path}: metadata {KEY!r}: figures: expected an object, k a positive integer")
    if not isinstance(about.get("model_name"), (str, NoneType)):
        raise CheckpointError(f"{path}: metadata {KEY!r}: model_name: expected text, got {about['model_name']!r:.80}")
    return Checkpoint(
        path,
        about["kind"],
        arrays,
        hook_site(path, about.get("hook_name")),
        hook_site(path, about.get("hook_name_out")) if "transcoder" in about["kind"] else None,
        about.get("model_name"),
        figures,
        k=k,
        format="native",
    )


def read_screen(sae: JumpReLUSAE, path: Path) -> Screen | None:
    """The screen stored beside the weights that `sae` was just loaded with; None where there is none, or where the
    weights were cast on the way and are no longer those it was built from.

    Raises CheckpointError where it is of other weights than the file's.
    """
    entries, metadata = open_safetensors(path)
    about = json.loads(metadata[KEY])
    digest = about.get("screen")
    if digest is None:
        return None
    held = {name.removeprefix("screen."): e for name, e in entries.items() if name.startswith("screen.")}
    if entries["W_enc"].dtype != sae.dtype or sae.device.type != "cpu":
        return None
    if digest != weights_digest(sae.W_enc, sae.b_enc, sae.threshold):
        raise CheckpointError(f"{path}: screen: built from other weights than those of the file")
    d, F = sae.d_in, sae.d_sae
    k = held["directions"].shape[0] if "directions" in held and held["directions"].shape else 0
    tiles, table = (-(-F // 4), -(-d // 64), 4, 64), (len(Row) + k, table_stride(F))
    want = {"code": (tiles, torch.uint8), "table": (table, torch.float32)}
    want |= {"code2": (tiles, torch.uint8), "centre": ((d,), torch.float32), "directions": ((k, d), torch.float32)}
    want |= {"scales": ((d,), torch.float32)}
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in held.items():
        if name not in want or (entry.shape, entry.dtype) != want[name]:
            raise CheckpointError(f"{path}: screen.{name}: expected {want.get(name)}, got {entry.shape} {entry.dtype}")
        # START may be infinite: the table is checked by its digest, not for finite values
        tensors[name] = entry.read(sae.device, entry.dtype, finite=False)
    if not {"code", "table"} <= set(tensors):
        raise CheckpointError(f"{path}: screen: expected code and table, got {sorted(tensors)}")
    optional = (tensors.get(name) for name in ("centre", "directions", "scales"))
    screen = Screen(tensors["code"], tensors.get("code2"), tensors["table"], *optional)
    if screen.digest() != about.get("screen_data"):
        raise CheckpointError(f"{path}: screen: damaged")
    return screen


def save(sae: JumpReLUSAE, path: str | Path, matrix_dtype: torch.dtype | None = None, screen: bool = False) -> None:
    """Write atomically and block by block: under the final name only when complete.

    matrix_dtype: what W_enc, W_dec and W_skip are stored in (None: as held); vectors stay as held.
    screen: store the certified screen too, with a hash of the weights it is of, so that loading builds nothing.
    """
    if sae.kind not in SINGLE:
        raise CheckpointError(f"{path}: expected one of {', '.join(SINGLE)}, got a {sae.kind}")
    names = REQUIRED + (("W_skip",) if sae.kind == "skip_transcoder" else ())
    about = _about(sae.kind, sae.cfg.hook_name, sae.cfg.hook_name_out, sae.cfg.metadata.model_name)
    about |= {"figures": sae.cfg.metadata.extra.get("figures", {}), "k": getattr(sae, "k", None)}
    arrays: dict[str, Source] = {name: getattr(sae, name).detach() for name in names}
    if screen:
        if matrix_dtype not in (None, sae.dtype):
            raise ValueError(f"screen: it is of the weights as held, {sae.dtype}; matrix_dtype asks for {matrix_dtype}")
        made = sae.prepare().screen_cache.screen
        assert made is not None
        arrays |= {f"screen.{name}": tensor for name, tensor in made.tensors().items()}
        about |= {"screen": weights_digest(sae.W_enc, sae.b_enc, sae.threshold), "screen_data": made.digest()}
    write_safetensors(Path(path), arrays, {KEY: json.dumps(about)}, matrix_dtype, only_matrices=True)


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """`sae.safetensors` out of another format's entries."""
    if checkpoint.kind not in SINGLE:
        raise CheckpointError(f"{folder}: writing a {checkpoint.kind} as one file is not supported")
    site, out = checkpoint.site, checkpoint.site_out or checkpoint.site
    about = _about(
        checkpoint.kind, site.hook_name if site else None, out.hook_name if out else None, checkpoint.model_name
    )
    about |= {"figures": checkpoint.figures, "k": checkpoint.k}
    write_safetensors(folder / FILE, arrays, {KEY: json.dumps(about)}, dtype)


def _about(kind: str, hook_name: str | None, hook_name_out: str | None, model_name: str | None) -> dict[str, Any]:
    return {
        "version": 1,
        "kind": kind,
        "hook_name": hook_name,
        "hook_name_out": hook_name_out,
        "model_name": model_name,
    }
