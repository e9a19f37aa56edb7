"""TransformerLens's hook names, used in SAELens's configs, and the sites they mean."""

from __future__ import annotations

import re

from gemmascope_fast.sae.sites import Site

# In Gemma 2 and 3, TransformerLens's hook_mlp_out and hook_attn_out are after the norms that follow MLP and attention,
# and hook_normalized is before the gain.  For hook_mlp_in (Gemma Scope 2 in SAELens) see hf_hook_name.
_GEMMA = {
    "hook_resid_post": "resid",
    "hook_mlp_out": "mlp",
    "hook_attn_out": "attn_out",
    "attn.hook_z": "attn",
    "ln2.hook_normalized": "mlp_in_no_gain",
    "mlp.hook_in": "mlp_in",
}
# The residual stream is the same tensor in every model of transformers that has layers.  In models that normalise what
# attention and MLP read, and nothing else, the others are what they are in Gemma, whose last norms are missing there.
_ANY = ("hook_resid_post",)
_PRE_NORM = ("llama", "qwen", "mistral")


def site_of(hook_name: object, model_name: str | None) -> Site | None:
    """The site of a hook name such as "blocks.4.hook_resid_post"; None if transformers has no such tensor, or it is
    unknown for this model."""
    parts = hook_name.split(".", 2) if isinstance(hook_name, str) else []
    if len(parts) != 3 or parts[0] != "blocks" or not re.fullmatch("[0-9]{1,6}", parts[1]):
        return None
    layer, tail = int(parts[1]), parts[2]
    model = (model_name or "").lower()
    if tail == "hook_resid_pre" and layer > 0:
        tail, layer = "hook_resid_post", layer - 1
    if tail in _ANY:
        return Site("resid", layer)
    if "gemma-2-" in model or "gemma-3-" in model:
        return Site(_GEMMA[tail], layer) if tail in _GEMMA else None
    if tail in _GEMMA and any(name in model for name in _PRE_NORM):
        return Site(_GEMMA[tail], layer)
    return None


def name_of(site: Site | None) -> str | None:
    """The hook name of a site; None if TransformerLens has none."""
    if site is None:
        return None
    tails = {kind: tail for tail, kind in _GEMMA.items()}
    return f"blocks.{site.layer}.{tails[site.kind]}" if site.kind in tails else None
