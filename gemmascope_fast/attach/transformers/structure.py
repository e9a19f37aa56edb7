"""Finds where a site is in a model from its structure, without a list of model classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemmascope_fast.attach.transformers import blocks
from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae.sites import KINDS, Site

NO_GAIN = "output_without_gain"  # what Gemma Scope 1's transcoders read, as one end of a norm
# Paths of a text-only model: in a model whose decoder has another name they mean the same block.
_TEXT_PATH = re.compile(
    r"(model\.|language_model\.|model\.language_model\.|language_model\.model\.)?layers\.(?P<layer>[0-9]+)(\.(?P<rest>.+))?$"
)


@dataclass(frozen=True)
class Place:
    """One end of one module.  `form` says how the SAE's input is made from its value: unchanged (""), normalised
    without the norm's gain ("no_gain"), looked up in the table without its scale ("unscaled"), or multiplied by the
    factor that the block applies before adding it ("scaled")."""

    module: nn.Module
    end: str  # "input" or "output"
    name: str
    width: int | None
    form: str = ""
    scale: float = 1.0  # for form "scaled"

    def is_at(self, other: Place) -> bool:
        """Whether both give the same values."""
        return self.module is other.module and (self.end, self.form, self.scale) == (
            other.end,
            other.form,
            other.scale,
        )


class Structure:
    """The text part of a model: its token embedding and its list of blocks.

    It is the smallest module with both the input embedding and a list of blocks: the text decoder of a multimodal
    model, the backbone of a model with a head.  Nothing is searched until a site needs it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(m): name for name, m in model.named_modules()}
        self._stack: tuple[nn.Module, nn.ModuleList] | None = None

    @property
    def embedding(self) -> nn.Module:
        find = getattr(self.model, "get_input_embeddings", None)
        try:
            found = find() if find is not None else None
        except NotImplementedError:
            found = None
        if found is None:
            raise AttachError(f"{self._title}: no input embedding found; give the site as a module path")
        return found

    @property
    def hidden_size(self) -> int | None:
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        size = getattr(config, "hidden_size", None)
        return size if isinstance(size, int) else getattr(self.embedding, "embedding_dim", None)

    @property
    def _title(self) -> str:
        return type(self.model).__name__

    def stack(self) -> tuple[nn.Module, nn.ModuleList]:
        """(the text part, its blocks).  AttachError if there is none or more than one at the same depth."""
        if self._stack is None:
            self._stack = self._find_stack()
        return self._stack

    def _find_stack(self) -> tuple[nn.Module, nn.ModuleList]:
        at = self.names.get(id(self.embedding), "")
        while at:
            at = at.rpartition(".")[0]
            holder = self.model.get_submodule(at)
            lists = {name: m for name, m in holder.named_modules() if _is_blocks(m)}
            if lists:
                depth = min(name.count(".") for name in lists)
                shallow = {name: m for name, m in lists.items() if name.count(".") == depth}
                if len(shallow) > 1:
                    raise AttachError(
                        f"{self._title}: several lists of blocks ({', '.join(shallow)}); give the site as a module path"
                    )
                return holder, next(iter(shallow.values()))
        raise AttachError(f"{self._title}: no list of blocks found; give the site as a module path")

    def place(self, site: Site) -> Place:
        """Where `site` is.  AttachError if the model has no such site."""
        if site.kind == "path":
            return self._by_path(str(site.path))
        if site.kind == "embed":
            scaled = hasattr(self.embedding, "embed_scale")
            width = getattr(self.embedding, "embedding_dim", None)
            name = self.names.get(id(self.embedding), "embed_tokens")
            return Place(self.embedding, "output", f"{name}.output", width, "unscaled" if scaled else "")
        block, name = self._block(site.layer or 0, str(site.hook_name))
        if site.kind == "resid":
            why = blocks.streams(block)
            if why is not None:
                raise AttachError(
                    f"site 'resid' of layer {site.layer}: {type(block).__name__} of {self._title} {why};"
                    " give the site as a module path"
                )
            return Place(block, "output", f"{name}.output", self.hidden_size)
        return self._inside(block, name, site)

    def aliases(self, site: Site) -> frozenset[Site]:
        """Every site that is the same place as `site` in this model, including `site`."""
        own = self.place(site)
        layer = site.at_layer
        kinds = ("embed",) if layer is None else KINDS
        named = [Site(kind, None if kind == "embed" else layer) for kind in kinds]
        paths = [own.name, *(other.hook_name for other in named)]
        paths += [path.removesuffix(".output") for path in paths if path.endswith(".output")]
        found = {site}
        if site.kind == "embed":  # Gemma's name of it, although the module's output may be scaled
            found.add(Site("path", path=site.hook_name))
        for other in (*named, *(Site("path", path=path) for path in paths)):
            try:
                if self.place(other).is_at(own):
                    found.add(other)
            except AttachError:
                continue
        return frozenset(found)

    def _block(self, layer: int, asked: str) -> tuple[nn.Module, str]:
        _, found = self.stack()
        if layer >= len(found):
            raise AttachError(
                f"site {asked}: {self._title} has {len(found)} layers, expected a layer in [0, {len(found)})"
            )
        block = found[layer]
        return block, self.names[id(block)]

    def _inside(self, block: nn.Module, name: str, site: Site) -> Place:
        try:
            part = blocks.part(block, site.kind)
        except blocks.Unknown as error:
            instead = "" if error.path is None else f", such as '{name}.{error.path}.output'"
            raise AttachError(
                f"site {site.kind!r} of layer {site.layer}: {type(block).__name__} of {self._title} {error};"
                f" give the site as a module path{instead}"
            ) from None
        module = block.get_submodule(part.path)
        width = _width(module, part.end) if site.kind == "attn" else self.hidden_size
        form = "no_gain" if part.no_gain else "scaled" if part.scale != 1 else ""
        return Place(module, part.end, f"{name}.{part.path}.{part.end}", width, form, part.scale)

    def _by_path(self, path: str) -> Place:
        stem, _, end = path.rpartition(".")
        if end not in ("input", "output", NO_GAIN):
            stem, end = path, "output"
        module = _child(self.model, stem)
        text_only = _TEXT_PATH.match(stem) if module is None else None
        if text_only is not None:
            # a path of the text-only model: look in this model's text decoder
            block, name = self._block(int(text_only["layer"]), path)
            rest = text_only["rest"]
            module, stem = (_child(block, rest), f"{name}.{rest}") if rest else (block, name)
        if module is None:
            raise AttachError(f"site {path}: {self._title} has no module {stem!r}")
        if end == NO_GAIN:
            if not blocks.is_norm(module):
                raise AttachError(
                    f"site {path}: expected a root-mean-square norm or a LayerNorm, got {type(module).__name__}"
                )
            return Place(module, "input", f"{stem}.{end}", _width(module, "output"), "no_gain")
        return Place(module, end, f"{stem}.{end}", self._path_width(module, end))

    def _path_width(self, module: nn.Module, end: str) -> int | None:
        try:
            if any(module is block for block in self.stack()[1]):
                return self.hidden_size
        except AttachError:
            pass
        return _width(module, end)


def _is_blocks(module: nn.Module) -> bool:
    """A list of modules that have submodules: projections and norms in a list are not blocks."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(any(m.children()) for m in module)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split(".") if path else ():
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def _width(module: nn.Module, end: str) -> int | None:
    """The last dimension at one end of a leaf module, if its attributes give it; else None."""
    size: Any = getattr(module, "in_features" if end == "input" else "out_features", None)
    if size is None and isinstance(module, nn.Embedding) and end == "output":
        size = module.embedding_dim
    if size is None and "norm" in type(module).__name__.lower():
        weight = getattr(module, "weight", None)
        size = weight.numel() if weight is not None and weight.dim() == 1 else None
    return size if isinstance(size, int) else None


def submodules(model: nn.Module) -> Iterator[nn.Module]:
    """The model and its text part, if it has one: the modules whose forward counts as a call."""
    yield model
    try:
        holder, _ = Structure(model).stack()
    except AttachError:
        return
    if holder is not model:
        yield holder
