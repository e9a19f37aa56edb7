"""Where an SAE reads and writes: a site of a model, named independently of any model class."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What each kind is in transformers' Gemma:
#   resid           output of model.layers[L]
#   mlp             output of post_feedforward_layernorm (what the MLP adds to the residual stream)
#   attn            input of self_attn.o_proj: the heads, concatenated
#   mlp_in          output of pre_feedforward_layernorm, gain included (Gemma Scope 2 transcoders)
#   mlp_in_no_gain  the same norm without its gain (Gemma Scope 1 transcoders)
#   attn_out        output of post_attention_layernorm
#   embed           the token embeddings, unscaled
KINDS = ("resid", "mlp", "attn", "mlp_in", "mlp_in_no_gain", "attn_out", "embed")


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model: a kind and a layer (None for `embed`), or a module path with `.output` / `.input`."""

    kind: str
    layer: int | None = None
    path: str | None = None  # only for kind "path": "model.layers.3.mlp.output"

    def __post_init__(self) -> None:
        if self.kind == "path":
            if not self.path:
                raise ValueError("path: expected a module path for a site of kind 'path'")
        elif self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)} or 'path', got {self.kind!r}")
        elif self.kind != "embed" and (self.layer is None or self.layer < 0):
            raise ValueError(f"layer: expected a layer number for a {self.kind} site, got {self.layer}")

    @property
    def hook_name(self) -> str:
        """Its name in transformers' terms, as Gemma Scope 2's config.json writes them."""
        if self.kind == "path":
            return str(self.path)
        if self.kind == "embed":
            return "model.embed_tokens.output"
        tail = {
            "resid": "output",
            "mlp": "post_feedforward_layernorm.output",
            "attn": "self_attn.o_proj.input",
            "mlp_in": "pre_feedforward_layernorm.output",
            "mlp_in_no_gain": "pre_feedforward_layernorm.output_without_gain",
            "attn_out": "post_attention_layernorm.output",
        }[self.kind]
        return f"model.layers.{self.layer}.{tail}"

    @classmethod
    def from_hook_name(cls, name: str) -> Site:
        """The inverse of `hook_name`; a name of no known kind becomes a site of kind "path"."""
        parts = name.split(".")
        if name == "model.embed_tokens.output":
            return cls("embed")
        if "layers" in parts:
            at = parts.index("layers") + 1
            if at < len(parts) and re.fullmatch("[0-9]{1,6}", parts[at]):
                layer = int(parts[at])
                for kind in KINDS:
                    if kind != "embed" and cls(kind, layer).hook_name == name:
                        return cls(kind, layer)
        return cls("path", path=name)
