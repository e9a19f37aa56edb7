"""Where an SAE reads and writes: a site of a model, with a name that does not depend on the model class."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The kinds, and where they are in transformers' Gemma 2 and 3:
#   resid           the residual stream after a block: output of model.layers[L]
#   mlp             what the MLP adds to the residual stream: output of post_feedforward_layernorm
#   attn            the attention heads, concatenated: input of self_attn.o_proj
#   mlp_in          what the MLP reads: output of pre_feedforward_layernorm, gain included (Gemma Scope 2 transcoders)
#   mlp_in_no_gain  the same norm without its gain (Gemma Scope 1 transcoders)
#   attn_out        what attention adds to the residual stream: output of post_attention_layernorm
#   embed           the token embeddings, unscaled
# docs/reference/sites.md has a table of the architectures.
KINDS = ("resid", "mlp", "attn", "mlp_in", "mlp_in_no_gain", "attn_out", "embed")
PREFIX = "path:"  # put before a module path in `hook_name` if the path alone would be read as another kind

_LAYER = re.compile(r"((?:^|\.)(?:layers?|h|blocks?)\.)([0-9]{1,6})(\.|$)")  # in a module's path


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model: a kind and a layer (None for `embed`), or a module path ending in `.output` or `.input`."""

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
        """Its name as in Gemma Scope 2's config.json, in terms of transformers' modules."""
        if self.kind == "path":
            path = str(self.path)
            # a path that is also Gemma's name of a site must still be read back as a path
            return path if self._named(path).kind in ("path", "resid") else PREFIX + path
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

    @property
    def at_layer(self) -> int | None:
        """The layer; for a module path, the layer number in it. None if there is none."""
        if self.kind != "path":
            return self.layer
        found = _LAYER.search(str(self.path))
        return None if found is None else int(found[2])

    def at(self, layer: int) -> Site:
        """The site of the same kind in another layer; for a site without a layer, that layer's residual stream."""
        if self.at_layer is None:
            return Site("resid", layer)
        if self.kind != "path":
            return Site(self.kind, layer)
        return Site("path", path=_LAYER.sub(rf"\g<1>{layer}\g<3>", str(self.path), count=1))

    @classmethod
    def from_hook_name(cls, name: str) -> Site:
        """The inverse of `hook_name`; an unknown name becomes a site of kind "path"."""
        return cls("path", path=name[len(PREFIX) :]) if name.startswith(PREFIX) else cls._named(name)

    @classmethod
    def _named(cls, name: str) -> Site:
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
