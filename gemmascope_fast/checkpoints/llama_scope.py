"""Llama Scope (OpenMOSS), Llama 3.1 8B and DeepSeek R1 Distill Llama 8B, with the activation scale folded in.

The first series has `hyperparams.json` and `checkpoints/final.safetensors`, the R1 series `config.json` and
`sae_weights.safetensors`.  Both were trained on activations scaled to a mean norm of √d_model.  With s = √d_model /
norm a latent is z = s · (x @ W_enc) + b_enc where it fires, and x̂ = (f @ W_dec + b_dec) / s_out.  Here s goes into
W_enc and s_out into W_dec and b_dec, so that raw activations go in and come out.

The threshold θ.  First series: one number for all features, in units of raw activations.  The library scales its
weights to raw activations before it compares, so z / s > θ. If `sparsity_include_decoder_norm` is true, it compares
z / s times the norm of the feature's decoder row, which is then scaled by s / s_out, so z · ‖row‖ / s_out > θ.
R1 series: one per feature, the exponential of `log_jumprelu_threshold`, compared with z, or with z · ‖row‖.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.checkpoints import transformer_lens
from gemmascope_fast.checkpoints.base import Checkpoint, one_of, read_json
from gemmascope_fast.checkpoints.torch_write import tensor_of
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry, open_safetensors
from gemmascope_fast.files.fields import flag, integer, shown, text
from gemmascope_fast.files.results import write_json
from gemmascope_fast.files.write import Source, write_safetensors
from gemmascope_fast.sae.sites import Site

FILE, CONFIG = "final.safetensors", "hyperparams.json"
R1_FILE, R1_CONFIG = "sae_weights.safetensors", "config.json"
FORMAT = "llama-scope"
MODEL, R1_MODEL = "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
_NAMES = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "decoder.bias": "b_dec"}
_NORM = "dataset_average_activation_norm"


def read(path: Path) -> Checkpoint:
    """Read `checkpoints/final.safetensors` of a folder with `hyperparams.json`."""
    config_path = path.parent.parent / CONFIG
    config = read_json(config_path)
    arrays, norms = _arrays(path)
    s, s_out = _scales(config_path, config, norms)
    if s is None or s_out is None:
        raise CheckpointError(f"{config_path}: {_NORM}: missing, and with it the scale of the activations")
    threshold = _number(config_path, "jump_relu_threshold", config.get("jump_relu_threshold"))
    threshold *= s_out if _by_decoder_norm(config_path, config) else s
    return _checkpoint(path, config_path, config, arrays, MODEL, (s, s_out), threshold)


def read_r1(path: Path) -> Checkpoint:
    """Read `sae_weights.safetensors` and the `config.json` next to it.

    If neither gives the norm of the activations, `normalisation` stays "expected_average_only_in". For SAELens's names
    the scale is known, and `find_checkpoint` folds it in.
    """
    config_path = path.with_name(R1_CONFIG)
    config = read_json(config_path)
    arrays, norms = _arrays(path)
    logs = arrays.pop("log_jumprelu_threshold", None)
    if logs is None:
        raise CheckpointError(f"{path}: log_jumprelu_threshold: missing, and with it the threshold")
    s, s_out = _scales(config_path, config, norms)
    scales = (1.0, 1.0) if s is None or s_out is None else (s, s_out)
    threshold = logs.mapped(lambda block, start: block.double().exp())
    found = _checkpoint(path, config_path, config, arrays, R1_MODEL, scales, threshold)
    if s is None:
        found.normalisation = "expected_average_only_in"
    return found


def is_r1(path: Path) -> bool:
    """Whether `sae_weights.safetensors` is of the R1 series and not SAELens's, which has a cfg.json."""
    return not path.with_name("cfg.json").exists() and path.with_name(R1_CONFIG).exists()


def _arrays(path: Path) -> tuple[dict[str, Entry], dict[str, float]]:
    """Arrays under our names, and norms of activations by hook point, if the file has them."""
    made: dict[str, Entry] = {}
    norms: dict[str, float] = {}
    for name, entry in open_safetensors(path)[0].items():
        if name.startswith(_NORM + "."):
            if math.prod(entry.shape) != 1:
                raise CheckpointError(f"{path}: {name:.80}: expected one number, got shape {entry.shape}")
            norms[name[len(_NORM) + 1 :]] = float(entry.read(torch.device("cpu"), torch.float64).reshape(-1)[0])
        else:
            made[_NAMES.get(name, name)] = entry.transposed() if name.endswith(".weight") else entry
    return made, norms


def _scales(path: Path, config: dict[str, Any], norms: dict[str, float]) -> tuple[float | None, float | None]:
    """√d_model / norm of the input and of the output; None if the norm is unknown."""
    normalised = config.get("norm_activation", "dataset-wise")
    if one_of(path, "norm_activation", normalised, ("dataset-wise", "inference")) == "inference":
        return 1.0, 1.0
    found = config.get(_NORM)
    if found is None and norms:
        found = {end: norms.get(name or "") for end, name in zip(("in", "out"), _hooks(path, config), strict=True)}
    if found is None:
        return None, None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {_NORM}: expected an object, got {shown(found)}")
    root = math.sqrt(integer(path, "d_model", config.get("d_model")))
    given = (_number(path, f"{_NORM}: {end}", found.get(end)) for end in ("in", "out"))
    s, s_out = (root / value if value > 0 else 0.0 for value in given)
    if not (s > 0 and s_out > 0 and math.isfinite(s) and math.isfinite(s_out)):
        raise CheckpointError(f"{path}: {_NORM}: expected norms above 0, got {shown(found)}")
    return s, s_out


def _hooks(path: Path, config: dict[str, Any]) -> list[str | None]:
    """TransformerLens's names of where it reads and writes."""
    return [text(path, name, config.get(name)) for name in ("hook_point_in", "hook_point_out")]


def _number(path: Path, what: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    raise CheckpointError(f"{path}: {what}: expected a number, got {shown(value)}")


def _checkpoint(
    path: Path,
    config_path: Path,
    config: dict[str, Any],
    arrays: dict[str, Entry],
    model: str,
    scales: tuple[float, float],
    threshold: float | Entry,
) -> Checkpoint:
    one_of(config_path, "act_fn", config.get("act_fn", "jumprelu"), ("jumprelu",))
    if flag(config_path, "use_glu_encoder", config.get("use_glu_encoder", False)):
        raise CheckpointError(f"{config_path}: use_glu_encoder: an encoder with a gated linear unit is not supported")
    model = text(config_path, "model_name", config.get("model_name")) or model
    names = _hooks(config_path, config)
    transcodes = names[1] is not None and names[1] != names[0]
    sites = [transformer_lens.site_of(name, model) for name in names]
    subtracts = flag(
        config_path, "apply_decoder_bias_to_pre_encoder", config.get("apply_decoder_bias_to_pre_encoder", False)
    )
    if subtracts and transcodes:
        raise CheckpointError(f"{config_path}: apply_decoder_bias_to_pre_encoder: expected false for a transcoder")
    s, s_out = scales
    made = arrays | {name: entry.scaled(s) for name, entry in arrays.items() if name == "W_enc"}
    made |= {name: entry.scaled(1 / s_out) for name, entry in arrays.items() if name in ("W_dec", "b_dec")}
    if _by_decoder_norm(config_path, config) and {"W_dec", "b_enc"} <= set(arrays):
        made["threshold"] = _over_norm(path, arrays, threshold)
    elif isinstance(threshold, Entry):
        made["threshold"] = threshold
    found = Checkpoint(
        path,
        "transcoder" if transcodes else "sae",
        made,
        sites[0],
        sites[1] if transcodes else None,
        model,
        subtracts_b_dec=subtracts,
        threshold_value=threshold if isinstance(threshold, float) else None,
        format=FORMAT,
    )
    for name, size in (("d_model", found.d_in), ("d_sae", found.d_sae)):
        if integer(config_path, name, config.get(name, size)) != size:
            raise CheckpointError(f"{config_path}: {name}: {config[name]} contradicts the arrays, which have {size}")
    return found


def _by_decoder_norm(path: Path, config: dict[str, Any]) -> bool:
    name = "sparsity_include_decoder_norm"
    return flag(path, name, config.get(name, False))


def _over_norm(path: Path, arrays: dict[str, Entry], threshold: float | Entry) -> Entry:
    """The threshold for z, if z times the norm of the decoder row is compared with `threshold`."""
    W_dec, like = arrays["W_dec"], threshold if isinstance(threshold, Entry) else arrays["b_enc"]
    if len(W_dec.shape) != 2 or like.shape != W_dec.shape[:1]:
        return like  # the error for its shape comes later and names it
    # blocks of W_dec as stored are rows of [d_out, d_sae]
    squares = torch.zeros(W_dec.shape[0], dtype=torch.float64)
    for start, block in W_dec.blocks(torch.float64):
        if W_dec.flip:
            squares += block.square().sum(0)
        else:
            squares[start : start + block.shape[0]] = block.square().sum(1)
    if not bool((squares > 0).all()):
        raise CheckpointError(
            f"{path}: decoder.weight: expected rows that are not zero, whose norm scales the threshold"
        )
    norms = squares.sqrt()

    def divided(block: Tensor, start: int) -> Tensor:
        value = block.double() if isinstance(threshold, Entry) else threshold
        return value / norms[start : start + block.shape[0]]

    return like.mapped(divided)


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `hyperparams.json` and `checkpoints/final.safetensors`, with scale 1."""
    if checkpoint.kind not in ("sae", "transcoder") or checkpoint.d_in != checkpoint.arrays["W_dec"].shape[1]:
        raise CheckpointError(f"{folder}: Llama Scope has no {checkpoint.kind} of these widths")
    threshold = tensor_of(arrays["threshold"], torch.float64)
    if bool((threshold != threshold[0]).any()):
        raise CheckpointError(f"{folder}: Llama Scope has one threshold for all features, and this SAE has several")
    stored: dict[str, Source] = {}
    for theirs, ours in _NAMES.items():
        source = arrays[ours]
        stored[theirs] = source if ours.startswith("b") else _turned(source)
    root = math.sqrt(checkpoint.d_in)
    out: Site | None = checkpoint.site_out or checkpoint.site
    config = {
        "d_model": checkpoint.d_in,
        "d_sae": checkpoint.d_sae,
        "act_fn": "jumprelu",
        "jump_relu_threshold": max(0.0, float(threshold[0])),
        "norm_activation": "dataset-wise",
        _NORM: {"in": root, "out": root},
        "sparsity_include_decoder_norm": False,
        "apply_decoder_bias_to_pre_encoder": False,
        "hook_point_in": transformer_lens.name_of(checkpoint.site),
        "hook_point_out": transformer_lens.name_of(out),
        "model_name": checkpoint.model_name,
    }
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_safetensors(folder / "checkpoints" / FILE, stored, {}, dtype or arrays["W_enc"].dtype)
    write_json(folder / CONFIG, {name: value for name, value in config.items() if value is not None})


def _turned(source: Source) -> Source:
    return source.transposed() if isinstance(source, Entry) else source.t()
