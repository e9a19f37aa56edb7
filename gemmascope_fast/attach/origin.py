"""Checks whether an SAE is attached where its checkpoint says: the site, and the model that it was trained on."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

from torch import nn

from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae.sites import Site

# Suffixes of a repository name that do not make it another model.
_SAME = re.compile(r"-(pt|hf|bnb|4bit|8bit|gptq|awq|gguf|int4|int8|fp8|bf16|fp16|float16|float32)$")
_ALIASES = {"gpt2-small": "gpt2"}


def check_site(key: Any, site: Site, own: Site, structure: Structure | None) -> None:
    """Raise AttachError if `site` is not `own`, the site in the checkpoint."""
    if _same(site, own, structure):
        return
    kind = own.path if own.kind == "path" else "embed" if own.layer is None else f"layer {own.layer}, {own.kind!r}"
    raise AttachError(
        f"saes: key {key!r}: the checkpoint's own site is {own.hook_name} ({kind}); attach it there, or pass"
        " anywhere=True (--anywhere on the command line)"
    )


def _same(site: Site, own: Site, structure: Structure | None) -> bool:
    if site == own:
        return True
    wanted = _place(own, structure)
    if wanted is not None:
        found = _place(site, structure)
        # a site that the model lacks gets its own error later
        return found is None or found.is_at(wanted)
    if None not in (site.at_layer, own.at_layer) and site.at_layer != own.at_layer:
        return False
    return "path" in (site.kind, own.kind) or (site.kind, site.layer) == (own.kind, own.layer)


def _place(site: Site, structure: Structure | None) -> Any:
    try:
        return None if structure is None else structure.place(site)
    except AttachError:
        return None


def move(cfg: Any, layer: int | None) -> None:
    """Move a coder to another layer (`--anywhere`): its sites keep their kinds.  None leaves them unchanged."""
    if layer is None:
        return
    cfg.site = Site("resid", layer) if cfg.site is None else cfg.site.at(layer)
    if cfg.site_out is not None:
        cfg.site_out = cfg.site_out.at(layer)


def check_model(trained_on: str | None, model: nn.Module) -> None:
    """Warn if the model's name is known and is not the one that the SAE was trained on."""
    config = getattr(model, "config", None)
    given = [getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None)]
    names = {name for name in map(plain_name, given) if name is not None}
    own = plain_name(trained_on)
    if own is not None and names and own not in names:
        warnings.warn(
            f"saes: this SAE was trained on {trained_on}, and the model is {next(n for n in given if plain_name(n))}",
            UserWarning,
            stacklevel=3,
        )


def plain_name(name: object) -> str | None:
    """A model's name without its owner and without suffixes for storage formats. None for the path of a folder, which
    says nothing, unless it is a snapshot in Hugging Face's cache."""
    if not isinstance(name, str) or not name.strip("/."):
        return None
    cached = re.search(r"models--[^/\\]+?--([^/\\]+)", name)
    if cached:
        name = cached[1]
    elif os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name):
        return None
    plain = name.rstrip("/").rpartition("/")[2].lower().replace("_", "-").removeprefix("meta-")
    while _SAME.search(plain):
        plain = _SAME.sub("", plain)
    return _ALIASES.get(plain, plain)
