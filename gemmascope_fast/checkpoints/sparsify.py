"""EleutherAI's sparsify: `sae.safetensors` and `cfg.json` (tested with eai-sparsify 1.3).  Top-k SAEs and
transcoders, with or without a skip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint, check_activation, read_json
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry, open_safetensors
from gemmascope_fast.files.fields import flag, integer, text
from gemmascope_fast.files.results import write_json
from gemmascope_fast.files.write import Source, write_safetensors
from gemmascope_fast.sae.sites import Site

FILE = "sae.safetensors"
CONFIG = "cfg.json"
FORMAT = "sparsify"
_FOLDER = re.compile(r"(?:.*\.)?layers[._]([0-9]{1,6})(\..+)?")  # a module's path inside the model
_KINDS = {"topk_sae": (False, False), "topk_transcoder": (True, False), "topk_skip_transcoder": (True, True)}


def is_sparsify(path: Path) -> bool:
    """Whether `sae.safetensors` is sparsify's and not this package's own, which has no cfg.json."""
    return path.with_name(CONFIG).exists()


def read(path: Path) -> Checkpoint:
    """Read `sae.safetensors` and its `cfg.json`; the folder's name is the module path: layers.5, layers.5.mlp."""
    config_path = path.with_name(CONFIG)
    config = read_json(config_path)
    check_activation(config_path, config, ("topk",))
    for name in ("signed", "multi_topk", "transcode", "skip_connection"):
        flag(config_path, name, config.get(name, False))
    if config.get("signed"):
        raise CheckpointError(f"{config_path}: signed: top-k by magnitude is not supported in this format")
    arrays = dict(open_safetensors(path)[0])
    for old, new in (("encoder.weight", "W_enc"), ("encoder.bias", "b_enc")):
        if old in arrays:
            arrays[new] = arrays.pop(old)
    for name in ("W_enc", "W_skip"):
        if name in arrays:
            arrays[name] = arrays[name].transposed()
    transcodes, skips = bool(config.get("transcode")), "W_skip" in arrays
    if skips != bool(config.get("skip_connection")):
        raise CheckpointError(f"{config_path}: skip_connection: contradicts the arrays: {sorted(arrays)}")
    kind = next((kind for kind, about in _KINDS.items() if about == (transcodes, skips)), None)
    if kind is None:
        raise CheckpointError(f"{config_path}: skip_connection: expected false for an SAE, got true")
    site, out = sites_of(path.parent.name, transcodes)
    found = Checkpoint(
        path,
        kind,
        arrays,
        site,
        out,
        _model(path),
        subtracts_b_dec=not transcodes,
        threshold_value=0.0,
        fields={"k": integer(config_path, "k", config.get("k"))},
        format=FORMAT,
    )
    for name, size in (("d_in", found.d_in), ("num_latents", found.d_sae)):
        if integer(config_path, name, config.get(name) or size) != size:
            raise CheckpointError(f"{config_path}: {name}: {config[name]} contradicts the arrays, which have {size}")
    return found


def sites_of(folder: str, transcodes: bool) -> tuple[Site | None, Site | None]:
    """Where a coder of the module with this path reads and writes; a transcoder reads its input, writes its output."""
    named = _FOLDER.fullmatch(folder)
    if named is None:
        return None, None
    layer, module = int(named[1]), named[2]
    if module is None and not transcodes:
        return Site("resid", layer), None
    path = f"model.layers.{layer}{module or ''}"
    if transcodes:
        return Site("path", path=f"{path}.input"), Site("path", path=f"{path}.output")
    return Site("path", path=f"{path}.output"), None


def _model(path: Path) -> str | None:
    """The config of the whole training, one folder up."""
    above = path.parent.parent / "config.json"
    return text(above, "model", read_json(above).get("model")) if above.exists() else None


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `sae.safetensors` and `cfg.json` for sparsify's `SparseCoder.load_from_disk`."""
    if checkpoint.kind not in _KINDS or checkpoint.d_in != checkpoint.arrays["W_dec"].shape[1]:
        raise CheckpointError(f"{folder}: sparsify has no {checkpoint.kind} of these widths")
    transcodes, skips = _KINDS[checkpoint.kind]
    given: dict[str, Any] = dict(arrays)
    if not transcodes:
        # its encoder reads x - b_dec, so the part of b_dec in our b_enc is added back
        held = {n: _tensor(given[n]) for n in ("W_enc", "b_enc", "b_dec")}
        given["b_enc"] = (held["b_enc"] + held["b_dec"] @ held["W_enc"]).to(given["b_enc"].dtype)
    stored = {"encoder.weight": _turned(given["W_enc"]), "encoder.bias": given["b_enc"]}
    stored |= {"W_dec": given["W_dec"], "b_dec": given["b_dec"]}
    if skips:
        stored["W_skip"] = _turned(given["W_skip"])
    write_safetensors(folder / FILE, stored, {}, dtype or arrays["W_enc"].dtype)
    config = {
        "activation": "topk",
        "num_latents": checkpoint.d_sae,
        "k": checkpoint.fields["k"],
        "d_in": checkpoint.d_in,
    }
    config |= {"expansion_factor": -(-checkpoint.d_sae // checkpoint.d_in), "normalize_decoder": False}
    write_json(folder / CONFIG, config | {"multi_topk": False, "skip_connection": skips, "transcode": transcodes})


def _tensor(source: Source) -> torch.Tensor:
    return source.read(torch.device("cpu"), torch.float64) if isinstance(source, Entry) else source.detach().double()


def _turned(source: Source) -> Source:
    return source.transposed() if isinstance(source, Entry) else source.t()
