"""SAELens folders: cfg.json and sae_weights.safetensors, JumpReLU architectures (facts section 3)."""

from __future__ import annotations

from pathlib import Path

from gemmascope_fast.checkpoints.arrays import open_safetensors
from gemmascope_fast.checkpoints.base import Checkpoint, read_json
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.sites import Site

_KINDS = {"jumprelu": "sae", "jumprelu_transcoder": "transcoder"}


def read(path: Path) -> Checkpoint:
    """`sae_weights.safetensors` beside its `cfg.json`.

    Refused rather than read wrongly: architectures without a threshold, `apply_b_dec_to_input`, and
    normalised activations, none of which the JumpReLU modules compute.
    """
    config_path = path.with_name("cfg.json")
    config = read_json(config_path)
    architecture = config.get("architecture")
    if architecture not in _KINDS:
        raise CheckpointError(f"{config_path}: architecture: expected one of {sorted(_KINDS)}, got {architecture!r}")
    if config.get("apply_b_dec_to_input"):
        raise CheckpointError(f"{config_path}: apply_b_dec_to_input: expected false, got true")
    if config.get("normalize_activations", "none") != "none":
        raise CheckpointError(f"{config_path}: normalize_activations: expected none, got another")
    found = Checkpoint(path, _KINDS[architecture], open_safetensors(path)[0])
    shape = found.arrays["W_enc"].shape
    if (config.get("d_in", shape[0]), config.get("d_sae", shape[1])) != shape:
        raise CheckpointError(f"{config_path}: d_in and d_sae contradict W_enc {shape}")
    metadata = config.get("metadata") or {}
    found.model_name, hook = metadata.get("model_name"), metadata.get("hook_name")
    parts = hook.split(".") if isinstance(hook, str) else []
    # hook_resid_post is the only TransformerLens name that is one tensor of transformers' for every model.
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit() and parts[2] == "hook_resid_post":
        found.site = Site("resid", int(parts[1]))
    return found
