"""SAELens folders: cfg.json and sae_weights.safetensors (tested with version 6.54)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.checkpoints import transformer_lens
from gemmascope_fast.checkpoints.base import Checkpoint, check_activation, hook_site, one_of, read_json
from gemmascope_fast.checkpoints.gated import ungated
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry, open_safetensors
from gemmascope_fast.files.fields import MOST, flag, integer, shown, text
from gemmascope_fast.files.results import write_json
from gemmascope_fast.files.write import Source, write_safetensors

FILE = "sae_weights.safetensors"
VERSION = "6.54.0"  # we write cfg.json as this version reads it
# What each architecture computes at inference.  BatchTopK uses a threshold that training stored.
_KINDS = {
    "jumprelu": "sae",
    "standard": "sae",
    "topk": "topk_sae",
    "abstopk": "abs_topk_sae",
    "gated": "sae",
    "batchtopk": "sae",
    "matryoshka_batchtopk": "sae",
    "jumprelu_transcoder": "transcoder",
    "transcoder": "transcoder",
    "jumprelu_skip_transcoder": "skip_transcoder",
    "skip_transcoder": "skip_transcoder",
}
_ARCHITECTURES = {
    "sae": "jumprelu",
    "topk_sae": "topk",
    "abs_topk_sae": "abstopk",
    "transcoder": "jumprelu_transcoder",
    "skip_transcoder": "jumprelu_skip_transcoder",
}
# Activation functions that the config of each may name; others (tanh-relu) existed before version 6 only.
_ACTIVATIONS = {
    "jumprelu": ("relu", "jumprelu"),
    "topk": ("topk",),
    "abstopk": ("abstopk", "topk"),
    "gated": ("relu",),
    "batchtopk": ("relu", "jumprelu", "batchtopk"),
    "matryoshka_batchtopk": ("relu", "jumprelu", "batchtopk"),
    "jumprelu_transcoder": ("relu", "jumprelu"),
    "jumprelu_skip_transcoder": ("relu", "jumprelu"),
}
# Named where they come up, with the reason.
REFUSED = {
    "matching_pursuit": "a matching pursuit SAE encodes step by step, each step after the last one's residual",
    "temporal": "a temporal SAE reads the other tokens of its text too",
}
_OLD_NAMES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_ABOUT_MODEL = ("model_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out", "neuronpedia_id")


def read(path: Path) -> Checkpoint:
    """Read `sae_weights.safetensors` and the `cfg.json` next to it, with SAELens's defaults.

    Raises an error for other architectures, and for activations that are normalised at run time.
    """
    config_path = path.with_name("cfg.json")
    stored = read_json(config_path)
    config = modern(stored, config_path)
    check_refused(config_path, config.get("architecture"))
    architecture = one_of(config_path, "architecture", config.get("architecture"), _KINDS)
    check_activation(config_path, stored, _ACTIVATIONS.get(architecture, ("relu",)))
    kind, metadata = _KINDS[architecture], config["metadata"]
    normalisation = config.get("normalize_activations") or "none"
    default = "transcoder" not in kind
    subtracts = flag(config_path, "apply_b_dec_to_input", config.get("apply_b_dec_to_input", default))
    if subtracts and "transcoder" in kind:
        raise CheckpointError(f"{config_path}: apply_b_dec_to_input: expected false for a transcoder, got true")
    rescale = flag(config_path, "rescale_acts_by_decoder_norm", config.get("rescale_acts_by_decoder_norm", False))
    arrays, value = _arrays(path, architecture, rescale)
    fields: dict[str, Any] = {}
    if kind == "topk_sae" and ("threshold" in arrays or value > 0):
        kind = "sae"
    elif "topk" in kind:
        fields["k"] = integer(config_path, "k", config.get("k"), 1, _d_sae(arrays))
    model = metadata.get("model_name")
    found = Checkpoint(
        path,
        kind,
        arrays,
        _site(config_path, metadata, "", model),
        _site(config_path, metadata, "_out", model) if "transcoder" in kind else None,
        model if isinstance(model, str) else None,
        normalisation=str(normalisation),
        subtracts_b_dec=subtracts,
        threshold_value=value,
        fields=fields,
        extra={"neuronpedia_id": text(config_path, "neuronpedia_id", metadata.get("neuronpedia_id"))},
        format="saelens",
    )
    for name, size in (("d_in", found.d_in), ("d_sae", found.d_sae), ("d_out", found.arrays["W_dec"].shape[1])):
        if integer(config_path, name, config.get(name, size)) != size:
            raise CheckpointError(f"{config_path}: {name}: {config[name]} contradicts the arrays, which have {size}")
    return found


def check_refused(path: Path, architecture: object) -> None:
    """CheckpointError for an architecture that is known and not computed here."""
    if isinstance(architecture, str) and architecture in REFUSED:
        raise CheckpointError(f"{path}: architecture: {architecture!r} is not supported: {REFUSED[architecture]}")


def _d_sae(arrays: dict[str, Entry]) -> int:
    """Number of features according to the arrays; `Checkpoint` checks that they agree."""
    shape = arrays["W_enc"].shape if "W_enc" in arrays else ()
    return shape[1] if len(shape) == 2 and shape[1] else MOST


def modern(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Convert a cfg.json of any SAELens version to the current form, as SAELens's loader does.  path: for errors."""
    metadata = config.get("metadata")
    about: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
    version = str(config.get("sae_lens_version") or about.get("sae_lens_version") or "")
    if re.match(r"[6-9]|[1-9]\d", version):
        return config | {"metadata": about}
    new = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    new["metadata"] = {name: new[name] for name in _ABOUT_MODEL if name in new} | about
    new.setdefault("architecture", "standard")
    arguments = new.get("activation_fn_kwargs") or {}
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: activation_fn_kwargs: expected an object, got {shown(arguments)}")
    if new.get("activation_fn") == "topk" and new["architecture"] in ("standard", "topk"):
        k = arguments.get("k", new.get("k"))
        if new.get("k", k) != k:
            raise CheckpointError(
                f"{path}: k: {shown(new['k'])} contradicts activation_fn_kwargs, which say {shown(k)}"
            )
        new |= {"architecture": "topk", "k": k}
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    return new


def _site(path: Path, metadata: dict[str, Any], which: str, model: Any) -> Any:
    """Use transformers' hook name if SAELens gives it, because SAELens's hook_mlp_in is not TransformerLens's."""
    exact = metadata.get(f"hf_hook_name{which}")
    if exact is not None:
        return hook_site(path, exact)
    return transformer_lens.site_of(metadata.get(f"hook_name{which}"), model if isinstance(model, str) else None)


def _arrays(path: Path, architecture: str, rescale: bool) -> tuple[dict[str, Entry], float]:
    """Arrays under our names, and the threshold if an SAE has one number for all features."""
    arrays, value = open_safetensors(path)[0], 0.0
    scale = arrays.pop("scaling_factor", None)
    if scale is not None and any(bool((block != 1).any()) for _, block in scale.blocks(torch.float32)):
        raise CheckpointError(f"{path}: scaling_factor: expected ones, got a fine-tuned scaling factor")
    single = arrays.pop("topk_threshold", None)
    if single is not None:
        if math.prod(single.shape) != 1:
            raise CheckpointError(f"{path}: topk_threshold: expected one number, got shape {single.shape}")
        value = max(0.0, float(single.read(torch.device("cpu"), torch.float64).reshape(-1)[0]))
    if architecture.endswith("batchtopk") and single is None and "threshold" not in arrays:
        raise CheckpointError(f"{path}: {architecture} without a threshold: save the inference model")
    if architecture.startswith("jumprelu") and "threshold" not in arrays:
        raise CheckpointError(f"{path}: threshold: missing from a {architecture}")
    if "W_skip" in arrays:
        arrays["W_skip"] = arrays["W_skip"].transposed()  # SAELens holds [d_out, d_in]
    if architecture == "gated":
        arrays = ungated(path, arrays)
    if rescale and {"W_enc", "W_dec", "b_enc"} <= set(arrays):
        arrays |= _rescaled(arrays)
    return arrays, value


def _rescaled(arrays: dict[str, Entry]) -> dict[str, Entry]:
    """z · ‖W_dec‖ is compared and W_dec / ‖W_dec‖ decodes, which equals an SAE with decoder rows of unit length."""
    W_dec, W_enc, b_enc = arrays["W_dec"], arrays["W_enc"], arrays["b_enc"]
    if (len(W_enc.shape), len(W_dec.shape), b_enc.shape) != (2, 2, W_enc.shape[1:]) or W_dec.shape[:1] != b_enc.shape:
        return {}  # the error for its shapes comes later and names it
    norm = torch.cat([block.reshape(block.shape[0], -1).norm(dim=1) for _, block in W_dec.blocks(torch.float64)])
    if not bool((norm > 0).all()):
        raise CheckpointError(f"{W_dec.file}: W_dec: expected rows that are not zero to rescale by their norm")

    def rows(block: Tensor, start: int) -> Tensor:
        return block.double() / norm[start : start + block.shape[0], None]

    return {
        "W_dec": W_dec.mapped(rows),
        "W_enc": W_enc.mapped(lambda block, start: block.double() * norm),
        "b_enc": b_enc.mapped(lambda block, start: block.double() * norm[start : start + block.shape[0]]),
    }


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `sae_weights.safetensors` and a `cfg.json` that SAELens 6 loads with `SAE.load_from_disk`."""
    if checkpoint.kind not in _ARCHITECTURES:
        raise CheckpointError(f"{folder}: SAELens has no {checkpoint.kind}")
    arrays = dict(arrays)
    if "k" in checkpoint.fields:
        arrays.pop("threshold", None)
    if "W_skip" in arrays:
        skip = arrays["W_skip"]
        arrays["W_skip"] = skip.transposed() if isinstance(skip, Entry) else skip.t()
    held = dtype or arrays["W_enc"].dtype
    write_safetensors(folder / FILE, arrays, {}, held)
    write_json(folder / "cfg.json", _config(checkpoint, str(held).removeprefix("torch.")))


def _config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    site, out = checkpoint.site, checkpoint.site_out
    metadata: dict[str, Any] = {"sae_lens_version": VERSION, "model_name": checkpoint.model_name}
    metadata |= {"hook_name": transformer_lens.name_of(site), "hf_hook_name": site.hook_name if site else None}
    config: dict[str, Any] = {
        "architecture": _ARCHITECTURES[checkpoint.kind],
        "d_in": checkpoint.d_in,
        "d_sae": checkpoint.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        # SAELens reshapes only SAEs of hook_z, because TransformerLens keeps the heads separate
        "reshape_activations": "hook_z" if site and site.kind == "attn" else "none",
    }
    if "transcoder" in checkpoint.kind:
        config["d_out"] = checkpoint.arrays["W_dec"].shape[1]
        metadata |= {"hook_name_out": transformer_lens.name_of(out), "hf_hook_name_out": out.hook_name if out else None}
    if "k" in checkpoint.fields:
        config |= {"k": checkpoint.fields["k"], "rescale_acts_by_decoder_norm": False}
    if checkpoint.extra.get("neuronpedia_id"):
        metadata["neuronpedia_id"] = checkpoint.extra["neuronpedia_id"]
    config["metadata"] = {name: value for name, value in metadata.items() if value is not None}
    return config
