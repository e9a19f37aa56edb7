"""Gemma Scope 2 (Gemma 3): params.safetensors and config.json.

Single-layer SAEs and transcoders, with and without affine skip. The skip is stored as [d_in, d_out]: x @ A.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.checkpoints.base import Checkpoint, check_activation, hook_site, one_of, read_json
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import open_safetensors
from gemmascope_fast.files.fields import flag, integer, shown
from gemmascope_fast.files.results import write_json
from gemmascope_fast.files.write import Source, write_safetensors
from gemmascope_fast.sae.sites import Site

FILE = "params.safetensors"
NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
_FOLDER = re.compile(r"(resid_post|mlp_out|attn_out|transcoder|clt|crosscoder)(?:_all)?/(?:layer_(\d+)_)?")
_REPOSITORY = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
_SITES = {"resid_post": "resid", "mlp_out": "mlp", "attn_out": "attn"}


def read(path: Path) -> Checkpoint:
    """Read `params.safetensors` and the `config.json` next to it.

    Without a config, the folder's name gives kind and site. Without that too, the site is None and the kind is a
    guess (`kind_known`).  If both exist, they must agree.
    """
    entries, _ = open_safetensors(path)
    arrays = {NAMES.get(name, name): entry for name, entry in entries.items()}
    config, config_path = read_config(path)
    skip = "W_skip" in arrays
    declared, site, site_out = _declared(config_path, config)
    named, layer = named_by_folder(path)
    if named in ("clt", "crosscoder"):
        raise CheckpointError(f"{path}: one file in a folder of {named}s: expected params_layer_*.safetensors")
    if named:
        folder_kind = "transcoder" if named == "transcoder" else "sae"
        folder_site, folder_out = folder_sites(named, layer)
        _agree(config_path, "type", declared, folder_kind)
        _agree(config_path, "hf_hook_point_in", site, folder_site)
        if folder_kind == "transcoder":
            _agree(config_path, "hf_hook_point_out", site_out, folder_out)
        declared, site, site_out = folder_kind, site or folder_site, site_out or folder_out
    if declared == "sae" and site_out not in (None, site):
        raise CheckpointError(
            f"{config_path}: hf_hook_point_out: expected the hook point in for an SAE, got {site_out}"
        )
    if declared == "sae" and skip:
        raise CheckpointError(f"{config_path}: type: an SAE cannot have the affine_skip_connection in {path.name}")
    if flag(config_path, "affine_connection", config.get("affine_connection", skip)) != skip:
        raise CheckpointError(f"{config_path}: affine_connection contradicts {sorted(entries)}")
    kind = "skip_transcoder" if skip else declared
    # an SAE's input and output have the same width, so different widths mean a transcoder
    shapes = [arrays[n].shape for n in ("W_enc", "W_dec") if n in arrays]
    if kind is None:
        kind = "transcoder" if len(shapes) == 2 and shapes[0][0] != shapes[1][-1] else "sae"
    known = skip or declared is not None or kind == "transcoder"
    found = Checkpoint(
        path,
        kind,
        arrays,
        site,
        None if kind == "sae" else site_out,
        model_name(path, config),
        kind_known=known,
        format="gemma-scope-2",
    )
    width = integer(config_path, "width", config.get("width", found.d_sae))
    if width != found.d_sae:
        raise CheckpointError(f"{config_path}: width {width} contradicts W_enc {found.arrays['W_enc'].shape}")
    return found


def read_config(path: Path) -> tuple[dict[str, Any], Path]:
    """The config next to `path`, with its architecture checked; empty if there is none."""
    config_path = path.with_name("config.json")
    config = read_json(config_path) if config_path.exists() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise CheckpointError(f"{config_path}: architecture: expected jump_relu, got {shown(config['architecture'])}")
    check_activation(config_path, config, ("relu", "jump_relu", "jumprelu"))
    return config, config_path


def _declared(config_path: Path, config: dict[str, Any]) -> tuple[str | None, Site | None, Site | None]:
    declared = one_of(config_path, "type", config.get("type"), ("sae", "transcoder"), optional=True)
    site = hook_site(config_path, config.get("hf_hook_point_in"))
    return declared, site, hook_site(config_path, config.get("hf_hook_point_out"))


def _agree(path: Path, what: str, configured: Any, named: Any) -> None:
    if None not in (configured, named) and configured != named:
        raise CheckpointError(f"{path}: {what}: {configured} contradicts the folder's name, which says {named}")


def named_by_folder(path: Path) -> tuple[str | None, int | None]:
    """(family, layer) from the names of the last two folders of the path; None if they do not say."""
    found = _FOLDER.fullmatch("/".join(path.parts[-3:-1]).partition("_width_")[0] + "_")
    if found is None:
        found = _FOLDER.match("/".join(path.parts[-3:-1]))
    if found is None:
        return None, None
    return found[1], None if found[2] is None else int(found[2])


def folder_sites(family: str, layer: int | None) -> tuple[Site | None, Site | None]:
    """Where a family reads and writes. Transcoders read the norm with its gain, unlike Gemma Scope 1's."""
    if layer is None:
        return None, None
    if family == "transcoder":
        return Site("mlp_in", layer), Site("mlp", layer)
    return Site(_SITES[family], layer), None


def model_name(path: Path, config: dict[str, Any]) -> str | None:
    """transformers' name of the model: configs say gemma-v3-270m-pt, the hub google/gemma-3-270m."""
    name = config.get("model_name")
    if name is None:
        found = _REPOSITORY.findall(path.as_posix())
        name = "gemma-3-{}-{}".format(*found[-1]) if found else None
    if not isinstance(name, str):
        return None
    name = name.replace("gemma-v3-", "gemma-3-")
    if name.startswith("gemma-3-"):
        name = "google/" + name
    return name.removesuffix("-pt") if "gemma-3-270m" in name else name


def write(checkpoint: Checkpoint, arrays: dict[str, Source], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `params.safetensors` and `config.json`."""
    if checkpoint.kind not in ("sae", "transcoder", "skip_transcoder"):
        raise CheckpointError(f"{folder}: writing a {checkpoint.kind} as Gemma Scope 2 is not supported")
    back = {ours: theirs for theirs, ours in NAMES.items()}
    write_safetensors(folder / FILE, {back.get(n, n): a for n, a in arrays.items()}, {}, dtype)
    site_out = checkpoint.site_out or checkpoint.site
    config = {
        "architecture": "jump_relu",
        "type": "sae" if checkpoint.kind == "sae" else "transcoder",
        "affine_connection": checkpoint.kind == "skip_transcoder",
        "width": checkpoint.d_sae,
        "model_name": checkpoint.model_name,
        "hf_hook_point_in": checkpoint.site.hook_name if checkpoint.site else None,
        "hf_hook_point_out": site_out.hook_name if site_out else None,
    }
    write_json(folder / "config.json", {name: value for name, value in config.items() if value is not None})
