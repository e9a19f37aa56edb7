"""dictionary_learning's folders: `ae.pt` and `config.json` (tested with version 0.1).

SAEs of GPT-OSS 20B, Llama 3.1 8B and Qwen 2.5 7B by A. Arditi, and SAEBench's, have this format.  ReLU, top-k, batch
top-k (a JumpReLU with the threshold that training stored), Matryoshka, JumpReLU and gated.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint, one_of, read_json
from gemmascope_fast.checkpoints.gated import ungated
from gemmascope_fast.checkpoints.torch_write import check_relu, save_torch, tensor_of
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import integer, shown, text
from gemmascope_fast.files.results import write_json
from gemmascope_fast.files.write import Source
from gemmascope_fast.sae.sites import Site

FILE = "ae.pt"
FORMAT = "dictionary-learning"
_BATCH = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
CLASSES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "JumpReluAutoEncoder", "GatedAutoEncoder", *_BATCH)
_NAMES = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "encoder.bias": "b_enc",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_ASIDE = ("k", "group_sizes")  # buffers that do not affect the latents, or repeat the config


def read(path: Path, arrays: dict[str, Entry]) -> Checkpoint:
    """Read `ae.pt` and the `config.json` next to it, according to the class that the config names."""
    config_path = path.with_name("config.json")
    trainer = read_json(config_path).get("trainer")
    if not isinstance(trainer, dict):
        raise CheckpointError(f"{config_path}: trainer: expected an object, got {shown(trainer)}")
    made_by = one_of(config_path, "trainer: dict_class", trainer.get("dict_class"), CLASSES)
    held: dict[str, Entry] = {}
    for name, entry in arrays.items():
        if name not in _ASIDE:
            held[_NAMES.get(name, name)] = entry.transposed() if name.endswith(".weight") else entry
    fields, value = {}, None
    if made_by == "AutoEncoderTopK":
        held.pop("threshold", None)  # used only by an encode that is not the default
        fields["k"] = _k(path, config_path, trainer, arrays.get("k"))
    if made_by in _BATCH:
        value = _single(path, "threshold", held.pop("threshold", None))
    if made_by == "GatedAutoEncoder":
        held = ungated(path, held)
    if made_by in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK"):
        value = 0.0
    layer, at = trainer.get("layer"), text(config_path, "trainer: submodule_name", trainer.get("submodule_name"))
    found = Checkpoint(
        path,
        "topk_sae" if fields else "sae",
        held,
        Site("resid", layer) if type(layer) is int and 0 <= layer < 10**6 and _is_resid(at) else None,
        model_name=text(config_path, "trainer: lm_name", trainer.get("lm_name")),
        subtracts_b_dec=made_by not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        threshold_value=None if value is None else max(0.0, value),
        fields=fields,
        format=FORMAT,
    )
    for name, size in (("activation_dim", found.d_in), ("dict_size", found.d_sae)):
        if integer(config_path, f"trainer: {name}", trainer.get(name, size)) != size:
            raise CheckpointError(f"{config_path}: trainer: {name}: {trainer[name]} contradicts the arrays: {size}")
    return found


def _is_resid(submodule: str | None) -> bool:
    return submodule is None or re.match("resid_post", submodule) is not None


def _k(path: Path, config_path: Path, trainer: dict[str, Any], buffer: Entry | None) -> int:
    """k from the config, checked against the file if that has it too."""
    held = _single(path, "k", buffer) if buffer is not None else None
    if trainer.get("k") is None and held is not None and held.is_integer():
        return int(held)
    k = integer(config_path, "trainer: k", trainer.get("k"))
    if held is not None and held != k:
        raise CheckpointError(f"{config_path}: trainer: k: {k} contradicts {path.name}, which has {held:g}")
    return k


def _single(path: Path, name: str, entry: Entry | None) -> float:
    if entry is None or math.prod(entry.shape) != 1:
        got = "none" if entry is None else f"shape {entry.shape}"
        raise CheckpointError(f"{path}: {name}: expected one number, got {got}")
    return float(entry.read(torch.device("cpu"), torch.float64).reshape(-1)[0])


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `ae.pt` and `config.json`: AutoEncoderTopK, AutoEncoderNew for ReLU, or JumpReluAutoEncoder."""
    if checkpoint.kind not in ("sae", "topk_sae"):
        raise CheckpointError(f"{folder}: dictionary_learning has no {checkpoint.kind}")
    layers = {"encoder.weight": ("W_enc", True), "decoder.weight": ("W_dec", True), "encoder.bias": ("b_enc", False)}
    values: dict[str, Any] = {}
    trainer: dict[str, Any] = {"activation_dim": checkpoint.d_in, "dict_size": checkpoint.d_sae}
    trainer |= {"lm_name": checkpoint.model_name, "layer": checkpoint.site.layer if checkpoint.site else None}
    if checkpoint.kind == "topk_sae":
        # its encoder reads x - b_dec, so the part of b_dec in our b_enc is added back
        matrix, b_dec = (tensor_of(arrays[name], torch.float64) for name in ("W_enc", "b_dec"))
        given = arrays | {"b_enc": tensor_of(arrays["b_enc"], torch.float64) + b_dec @ matrix}
        k = checkpoint.fields["k"]
        values = {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        held = dtype or arrays["W_enc"].dtype
        save_torch(folder / FILE, given, layers | {"b_dec": ("b_dec", False)}, held, values)
        trainer |= {"dict_class": "AutoEncoderTopK", "k": k}
    elif _has_threshold(arrays):
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        save_torch(folder / FILE, arrays, {name: (name, False) for name in names}, dtype)
        trainer["dict_class"] = "JumpReluAutoEncoder"
    else:
        check_relu(folder, "AutoEncoderNew", arrays)
        save_torch(folder / FILE, arrays, layers | {"decoder.bias": ("b_dec", False)}, dtype)
        trainer["dict_class"] = "AutoEncoderNew"
    write_json(folder / "config.json", {"trainer": {n: v for n, v in trainer.items() if v is not None}, "buffer": {}})


def _has_threshold(arrays: dict[str, Source]) -> bool:
    return "threshold" in arrays and bool((tensor_of(arrays["threshold"], torch.float64) > 0).any())
