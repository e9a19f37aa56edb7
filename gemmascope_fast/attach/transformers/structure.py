"""Where a site is in a given model, found by structure: no list of model classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae.sites import Site

# Inside a block, by the names that transformers' models share; the first that is there counts.  A norm after the
# MLP (Gemma) comes before the MLP itself: `mlp` is what is added to the residual stream.
_INSIDE: dict[str, tuple[tuple[str, str], ...]] = {
    "mlp": (
        ("post_feedforward_layernorm", "output"),
        ("mlp", "output"),
        ("feed_forward", "output"),
        ("output.dense", "output"),
    ),
    "attn": (
        ("self_attn.o_proj", "input"),
        ("self_attn.out_proj", "input"),
        ("self_attn.dense", "input"),
        ("attention.output.dense", "input"),
    ),
    "mlp_in": (("pre_feedforward_layernorm", "output"), ("mlp", "input"), ("feed_forward", "input")),
    "mlp_in_no_gain": (("pre_feedforward_layernorm", "input"), ("post_attention_layernorm", "input")),
    "attn_out": (("self_attn", "output"), ("attention.output.dense", "output")),
}


@dataclass(frozen=True)
class Place:
    """One end of one module.  `form` says how what passes there becomes what the SAE reads: as it is (""),
    divided by its root mean square ("no_gain"), or looked up in the table without its scale ("unscaled")."""

    module: nn.Module
    end: str  # "input" or "output"
    name: str
    width: int | None
    form: str = ""


class Structure:
    """The text stack of a model: its token embedding and its list of blocks.

    The stack is the smallest module that holds both the input embedding and a list of blocks: for a multimodal
    wrapper its text decoder, for a head its backbone.  Nothing is looked for until a site needs it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(m): name for name, m in model.named_modules()}

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
        """(the text stack, its blocks).  AttachError where there is none or more than one at the same depth."""
        at = self.names.get(id(self.embedding), "")
        while at:
            at = at.rpartition(".")[0]
            holder = self.model.get_submodule(at)
            lists = [(name.count("."), m) for name, m in holder.named_modules() if _is_blocks(m)]
            if lists:
                depth = min(d for d, _ in lists)
                shallow = [m for d, m in lists if d == depth]
                if len(shallow) > 1:
                    raise AttachError(f"{self._title}: several lists of blocks; give the site as a module path")
                return holder, shallow[0]
        raise AttachError(f"{self._title}: no list of blocks found; give the site as a module path")

    def place(self, site: Site) -> Place:
        """Where `site` is.  AttachError where the model has no such site."""
        if site.kind == "path":
            return self._by_path(str(site.path))
        if site.kind == "embed":
            scaled = hasattr(self.embedding, "embed_scale")
            width = getattr(self.embedding, "embedding_dim", None)
            name = self.names.get(id(self.embedding), "embed_tokens")
            return Place(self.embedding, "output", f"{name}.output", width, "unscaled" if scaled else "")
        block, name = self._block(site.layer or 0, str(site.hook_name))
        if site.kind == "resid":
            return Place(block, "output", f"{name}.output", self.hidden_size)
        return self._inside(block, name, site)

    def _block(self, layer: int, asked: str) -> tuple[nn.Module, str]:
        _, blocks = self.stack()
        if layer >= len(blocks):
            raise AttachError(
                f"site {asked}: {self._title} has {len(blocks)} layers, expected a layer in [0, {len(blocks)})"
            )
        block = blocks[layer]
        return block, self.names[id(block)]

    def _inside(self, block: nn.Module, name: str, site: Site) -> Place:
        choices = _INSIDE[site.kind]
        if site.kind == "attn_out" and _child(block, "pre_feedforward_layernorm") is not None:
            choices = (("post_attention_layernorm", "output"),)  # Gemma normalises before it adds
        for path, end in choices:
            module = _child(block, path)
            if module is None:
                continue
            width = _width(module, end) if site.kind == "attn" else self.hidden_size
            form = "no_gain" if site.kind == "mlp_in_no_gain" else ""
            return Place(module, end, f"{name}.{path}.{end}", width, form)
        looked = ", ".join(path for path, _ in choices)
        raise AttachError(
            f"site {site.hook_name}: {type(block).__name__} of {self._title} has none of {looked};"
            " give the site as a module path"
        )

    def _by_path(self, path: str) -> Place:
        stem, _, end = path.rpartition(".")
        if end not in ("input", "output"):
            stem, end = path, "output"
        module = _child(self.model, stem)
        if module is None and "layers." in stem:
            # a path written for the text-only model, resolved against this model's own text decoder
            layer, _, rest = stem.split("layers.", 1)[1].partition(".")
            if layer.isdigit():
                block, name = self._block(int(layer), path)
                module, stem = (_child(block, rest), f"{name}.{rest}") if rest else (block, name)
        if module is None:
            raise AttachError(f"site {path}: {self._title} has no module {stem!r}")
        return Place(module, end, f"{stem}.{end}", self._path_width(module, end))

    def _path_width(self, module: nn.Module, end: str) -> int | None:
        try:
            if any(module is block for block in self.stack()[1]):
                return self.hidden_size
        except AttachError:
            pass
        return _width(module, end)


def _is_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split(".") if path else ():
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def _width(module: nn.Module, end: str) -> int | None:
    """The last dimension at one end of a leaf module, where its attributes tell it; else None."""
    size: Any = getattr(module, "in_features" if end == "input" else "out_features", None)
    if size is None and isinstance(module, nn.Embedding) and end == "output":
        size = module.embedding_dim
    if size is None and "norm" in type(module).__name__.lower():
        weight = getattr(module, "weight", None)
        size = weight.numel() if weight is not None and weight.dim() == 1 else None
    return size if isinstance(size, int) else None


def submodules(model: nn.Module) -> Iterator[nn.Module]:
    """The model and its text stack, where it has one: the modules whose forward is a call."""
    yield model
    try:
        holder, _ = Structure(model).stack()
    except AttachError:
        return
    if holder is not model:
        yield holder
