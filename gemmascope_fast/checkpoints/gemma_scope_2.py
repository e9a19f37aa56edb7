"""Gemma Scope 2 (Gemma 3): params.safetensors and config.json (facts section 2).

Single-layer SAEs and transcoders, with and without affine skip; the skip is stored [d_in, d_out]: x @ A.
"""

from __future__ import annotations

from pathlib import Path

from gemmascope_fast.checkpoints.arrays import open_safetensors
from gemmascope_fast.checkpoints.base import Checkpoint, hook_site, read_json
from gemmascope_fast.errors import CheckpointError

NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}


def read(path: Path) -> Checkpoint:
    """`params.safetensors` beside its `config.json`; without the config the site is None."""
    entries, _ = open_safetensors(path)
    arrays = {NAMES.get(name, name): entry for name, entry in entries.items()}
    config_path = path.with_name("config.json")
    config = read_json(config_path) if config_path.exists() else {}
    skip, declared = "W_skip" in arrays, config.get("type", "sae")
    if declared not in ("sae", "transcoder"):
        raise CheckpointError(f"{config_path}: type: expected sae or transcoder, got {declared!r}")
    if config and bool(config.get("affine_connection", skip)) != skip:
        raise CheckpointError(f"{config_path}: affine_connection contradicts {sorted(entries)}")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise CheckpointError(f"{config_path}: architecture: expected jump_relu, got {config['architecture']!r}")
    kind = "skip_transcoder" if skip else declared
    site, site_out = hook_site(path, config.get("hf_hook_point_in")), hook_site(path, config.get("hf_hook_point_out"))
    found = Checkpoint(path, kind, arrays, site, site_out, config.get("model_name"))
    width = config.get("width", found.arrays["W_enc"].shape[1])
    if width != found.arrays["W_enc"].shape[1]:
        raise CheckpointError(f"{config_path}: width {width} contradicts W_enc {found.arrays['W_enc'].shape}")
    return found
