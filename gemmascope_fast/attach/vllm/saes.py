"""The SAEs of one engine: how they are declared in `additional_config`, and how they are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.sites import Site

KEY = "gemmascope"  # in `additional_config`, and in a request's `extra_args`
_FIELDS = {"path", "sae_id", "layer"}


@dataclass(frozen=True)
class About:
    """What a request must know of an SAE.  layer: the decoder layer whose output it reads."""

    layer: int
    d_in: int
    d_sae: int


def engine_config(saes: Mapping[str, str | Mapping[str, Any]]) -> dict[str, Any]:
    """The `additional_config` of an engine with these SAEs: `LLM(..., additional_config=engine_config(saes))`.

    saes: by a name of your choice, a file, folder or repository as `gsf.SAE.from_pretrained` takes it, or a dict with
    "path" and, if needed, "sae_id" and "layer".  Without "layer", the site in the checkpoint is used.
    Raises AttachError for anything else.  Nothing is loaded here.
    """
    return {KEY: {"saes": declared({"saes": dict(saes)})}}


def declared(config: Any) -> dict[str, dict[str, Any]]:
    """The declarations by name, checked.  config: what is under "gemmascope" in `additional_config`."""
    if not isinstance(config, Mapping) or set(config) != {"saes"} or not isinstance(config["saes"], Mapping):
        raise AttachError(f'additional_config: expected {{"{KEY}": {{"saes": {{name: path}}}}}}, got {config!r}')
    found = {}
    for name, given in config["saes"].items():
        spec = {"path": given} if isinstance(given, str) else given
        if not isinstance(name, str) or not isinstance(spec, Mapping) or "path" not in spec or set(spec) - _FIELDS:
            raise AttachError(f"saes: expected a path or a dict of {', '.join(sorted(_FIELDS))}, got {given!r}")
        layer = spec.get("layer")
        if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
            raise AttachError(f"saes: {name}: layer: expected a layer number, got {layer!r}")
        found[name] = dict(spec)
    if not found:
        raise AttachError("saes: expected at least one SAE, got none")
    return found


_LOADED: WeakValueDictionary[str, Coder] = WeakValueDictionary()
_ABOUT: dict[str, About] = {}


def load(name: str, spec: Mapping[str, Any], device: Any = "cpu") -> Coder:
    """The SAE of a declaration, loaded once per process while it is in use.

    AttachError for an SAE that does not read a decoder layer's output.
    """
    key = json.dumps([dict(spec), str(device)], sort_keys=True)
    sae = _LOADED.get(key)
    if sae is None:
        loaded: Any = from_pretrained(spec["path"], spec.get("sae_id"), device=device, progress=False)
        site = getattr(getattr(loaded, "cfg", None), "site", None)
        if not isinstance(loaded, Coder) or "transcoder" in loaded.kind:
            raise AttachError(f"saes: {name}: expected an SAE of one site, got a {loaded.kind.replace('_', ' ')}")
        if site is not None and site.kind != "resid":
            raise AttachError(
                f"saes: {name}: only the residual stream after a layer is supported in vLLM, and this SAE reads"
                f" {site.hook_name}"
            )
        loaded.prepare()
        sae = _LOADED[key] = loaded
    return sae


def about(name: str, spec: Mapping[str, Any]) -> About:
    """Layer and shape of a declared SAE.  Reads the checkpoint once per process."""
    key = json.dumps(dict(spec), sort_keys=True)
    if key not in _ABOUT:
        _ABOUT[key] = describe(name, spec, load(name, spec))
    return _ABOUT[key]


def describe(name: str, spec: Mapping[str, Any], sae: Coder) -> About:
    """Layer and shape of a loaded SAE; AttachError if neither the declaration nor the checkpoint names its layer."""
    site: Site | None = sae.cfg.site
    layer = spec.get("layer")
    if layer is None:
        if site is None or site.layer is None:
            raise AttachError(f'saes: {name}: the checkpoint names no layer; give {{"path": ..., "layer": ...}}')
        layer = site.layer
    return About(layer, sae.d_in, sae.d_sae)
