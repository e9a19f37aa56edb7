"""circuit-tracer's transcoder sets: one `layer_N.safetensors` per layer, and a `config.yaml` for all (version 0.5).

ReLU, or JumpReLU if the file has `activation_function.threshold`; W_enc [d_sae, d_in] and W_skip [d_out, d_in].
SAELens's mwhanna transcoders are such sets.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemmascope_fast.checkpoints import transformer_lens
from gemmascope_fast.checkpoints.base import Checkpoint
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import open_safetensors
from gemmascope_fast.files.regular import read_small

CONFIG = "config.yaml"
FORMAT = "circuit-tracer"
NAME = re.compile(r"layer_([0-9]{1,6})\.safetensors")
_LINE = re.compile(r"^(model_name|feature_input_hook|feature_output_hook)\s*:\s*[\"']?([\w./-]{1,200})[\"']?\s*$", re.M)


def read(path: Path) -> Checkpoint:
    """Read `layer_N.safetensors`; sites and model come from the set's `config.yaml` if it is in the same folder."""
    arrays = dict(open_safetensors(path)[0])
    if "activation_function.threshold" in arrays:
        arrays["threshold"] = arrays.pop("activation_function.threshold")
    for name in ("W_enc", "W_skip"):
        if name in arrays:
            arrays[name] = arrays[name].transposed()
    said = _config(path.with_name(CONFIG))
    layer, model = path.stem.removeprefix("layer_"), said.get("model_name")
    hooks = [f"blocks.{layer}.{said[f'feature_{end}_hook']}" if said else None for end in ("input", "output")]
    sites = [transformer_lens.site_of(hook, model) for hook in hooks]
    return Checkpoint(
        path,
        "skip_transcoder" if "W_skip" in arrays else "transcoder",
        arrays,
        sites[0],
        sites[1],
        model,
        threshold_value=None if "threshold" in arrays else 0.0,
        format=FORMAT,
    )


def _config(path: Path) -> dict[str, str]:
    """Three fields of the YAML file; empty if it is missing or names no hooks."""
    if not path.exists():
        return {}
    try:
        found = dict(_LINE.findall(read_small(path).decode("utf-8")))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not readable as text: {error}") from error
    hooks = {"feature_input_hook", "feature_output_hook"}
    return found if hooks <= set(found) else {}
