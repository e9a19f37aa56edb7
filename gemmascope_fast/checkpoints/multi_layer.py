"""Gemma Scope 2's cross-layer transcoders and crosscoders: one file params_layer_{i}.safetensors per layer.

In a cross-layer transcoder, layer i has w_dec [d_sae, n_layers, d], of which [:, i:, :] is used: it writes to its own
layer and the later ones.  A crosscoder's files have either w_dec [d_sae, d], the layer's part of one set of latents,
or w_dec [d_sae, n_layers, d] as in the transcoder: each layer has its own latents and writes to the later layers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint, one_of
from gemmascope_fast.checkpoints.gemma_scope_2 import NAMES, model_name, read_config
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry, open_safetensors
from gemmascope_fast.files.fields import flag, integer, shown
from gemmascope_fast.sae.sites import Site

PATTERN = "params_layer_*.safetensors"
_NUMBER = re.compile(r"params_layer_(\d+)\.safetensors")
_LAYERS = re.compile(r"layer_(\d+(?:_\d+)*)_width_")
_DECLARED = {"clt": "cross_layer_transcoder", "crosscoder": "crosscoder"}


def read(folder: Path) -> Checkpoint:
    """Read the folder with all layers' files.  CheckpointError if a layer is missing or shapes disagree."""
    files = {int(m[1]): folder / m[0] for m in (_NUMBER.fullmatch(p.name) for p in folder.iterdir()) if m}
    if set(files) != set(range(len(files))):
        raise CheckpointError(f"{folder}: expected {PATTERN} numbered from 0, got {shown(sorted(files))}")
    config, config_path = read_config(folder / "config.json")
    kind = _kind(folder, config_path, config.get("type"))
    n = len(files)
    layers = tuple(_layer(files[i], i, n, kind) for i in range(n))
    first = layers[0]
    for layer in layers[1:]:
        if layer.d_in != first.d_in or (layer.arrays["W_dec"].dtype != first.arrays["W_dec"].dtype):
            raise CheckpointError(f"{layer.path}: W_enc: expected d = {first.d_in}, like {first.path.name}")
    total = sum(layer.d_sae for layer in layers)
    if integer(config_path, "width", config.get("width", total)) not in (total, first.d_sae):
        raise CheckpointError(f"{config_path}: width {config['width']} contradicts {n} layers of {first.d_sae}")
    skips = {f"W_skip_{i}": layer.extra["W_skip"] for i, layer in enumerate(layers) if "W_skip" in layer.extra}
    declared = flag(config_path, "affine_connection", config.get("affine_connection", bool(skips)))
    if len(skips) not in (0, n) or declared != bool(skips):
        raise CheckpointError(f"{folder}: affine_skip_connection: in {len(skips)} of {n} files, config says otherwise")
    layers = tuple(replace(layer, **_sites(folder, kind, i, n)) for i, layer in enumerate(layers))
    shared = kind == "crosscoder" and first.arrays["W_dec"].shape[1] == first.d_in and first.extra["shared"]
    if shared:
        _one_set_of_latents(layers)
    return Checkpoint(
        folder,
        kind,
        skips,
        model_name=model_name(folder / "config.json", config),
        layers=layers,
        extra={"shared": shared},
        format="gemma-scope-2",
    )


def _kind(folder: Path, config_path: Path, declared: object) -> str:
    one_of(config_path, "type", declared, _DECLARED, optional=True)
    parent = folder.parent.name.removesuffix("_all")
    if declared is not None and parent in _DECLARED and declared != parent:
        raise CheckpointError(f"{config_path}: type: {declared} contradicts the folder's name, which says {parent}")
    name = declared if isinstance(declared, str) else parent
    if name not in _DECLARED:
        raise CheckpointError(f"{folder}: neither a config.json nor a folder named clt or crosscoder says what this is")
    return _DECLARED[name]


def _layer(path: Path, i: int, n: int, kind: str) -> Checkpoint:
    arrays = {NAMES.get(name, name): entry for name, entry in open_safetensors(path)[0].items()}
    extra: dict[str, object] = {"W_skip": arrays.pop("W_skip")} if "W_skip" in arrays else {}
    missing = {"W_enc", "W_dec", "b_dec"} - set(arrays)
    if missing:
        raise CheckpointError(f"{path}: missing {sorted(missing)}, got {shown(sorted(arrays))}")
    W_dec, b_dec = arrays["W_dec"], arrays["b_dec"]
    extra["shared"] = len(W_dec.shape) == 2
    if len(W_dec.shape) == 3:
        d_sae, outputs, d = W_dec.shape
        if outputs != n or b_dec.shape != (d,):
            raise CheckpointError(
                f"{path}: w_dec: expected [d_sae, {n}, d] and b_dec [d], got {W_dec.shape}, {b_dec.shape}"
            )
        arrays["W_dec"] = W_dec.mapped(lambda block, start: block[:, i:].flatten(1), (d_sae, (n - i) * d))
        # the layer's bias belongs to the first output that it writes
        arrays["b_dec"] = _padded(b_dec, (n - i) * d)
    elif kind == "cross_layer_transcoder":
        raise CheckpointError(f"{path}: w_dec: expected [d_sae, n_layers, d], got {W_dec.shape}")
    return Checkpoint(path, "transcoder", arrays, extra=extra, format="gemma-scope-2")


def _padded(entry: Entry, size: int) -> Entry:
    """A vector followed by zeros. It is much smaller than a block of bytes, so one block is enough."""
    have = entry.shape[0]

    def pad(block: torch.Tensor, start: int) -> torch.Tensor:
        tail = size - have if start + block.shape[0] == have else 0
        return torch.nn.functional.pad(block, (0, tail))

    return entry.mapped(pad, (size,))


def _sites(folder: Path, kind: str, i: int, n: int) -> dict[str, Any]:
    if kind == "cross_layer_transcoder":
        return {"site": Site("mlp_in", i), "site_out": Site("mlp", i)}
    found = _LAYERS.match(folder.name)
    numbers = [int(part) for part in found[1].split("_")] if found else []
    if found and len(numbers) != n:
        raise CheckpointError(f"{folder}: its name says {len(numbers)} layers, but it has {n} files")
    return {"site": Site("resid", numbers[i]), "site_out": Site("resid", numbers[i])} if numbers else {}


def _one_set_of_latents(layers: tuple[Checkpoint, ...]) -> None:
    """Check that files with parts of one set of latents agree on its bias and thresholds."""
    for name in ("b_enc", "threshold"):
        held = [layer.arrays[name] for layer in layers if name in layer.arrays]
        first = held[0].read(torch.device("cpu"), torch.float32) if held else None
        for entry in held[1:]:
            if first is None or not torch.equal(first, entry.read(torch.device("cpu"), torch.float32)):
                raise CheckpointError(
                    f"{entry.file}: {name} differs from the first layer's: these are not parts of one set of latents"
                )
