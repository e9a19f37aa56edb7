"""Replaces a model's linear layers by nested codes: quantise, choose widths, save and load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops.codes import Codes, check_bits, quantize
from gemmascope_fast.quant import storage
from gemmascope_fast.quant.linear import MatryoshkaLinear, MatryoshkaMatrix
from gemmascope_fast.quant.planes import Packed
from gemmascope_fast.quant.trained import Trained, put

SCOPES = ("ffn", "all-linear")
_FFN = {"mlp", "ffn", "feed_forward", "block_sparse_moe"}


def targets(model: nn.Module, scope: str = "ffn", head: bool = False) -> dict[str, nn.Linear]:
    """The linear layers of a scope, by module path: "ffn" are those inside a feed-forward block, "all-linear" all
    except the output head, which `head` adds.  Experts stored as one fused weight (`fused_experts`) are not linear
    layers. ValueError if there are none, or if some are quantised already.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    quantised = layers(model)
    if quantised:
        raise ValueError(f"model: already quantised ({next(iter(quantised))} and {len(quantised) - 1} more)")
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        inside = module is not output and (scope == "all-linear" or bool(_FFN & set(name.split("."))))
        if inside or (head and module is output):
            found[name] = module
    if not found:
        raise ValueError(f"model: scope {scope!r} has no linear layer in {type(model).__name__}")
    return found


def fused_experts(model: nn.Module, scope: str = "ffn") -> list[str]:
    """Paths of the weights of a scope that contain the matrices of several experts, as [experts, rows, columns] or
    stacked vertically. These are not quantised."""
    found = []
    for name, module in model.named_modules():
        inside = "experts" in name.split(".")
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        if not inside and scope == "ffn" and not _FFN & set(name.split(".")):
            continue
        for path, weight in module.named_parameters(name, recurse=False):
            if weight.dim() >= (2 if inside else 3) and weight.is_floating_point():
                found.append(path)
    return found


def check_experts(model: nn.Module, scope: str, skip_experts: bool = False) -> None:
    """Raise ValueError for a model with fused experts, unless they are to be skipped."""
    fused = fused_experts(model, scope)
    if fused and not skip_experts:
        raise ValueError(
            f"model: the experts of {type(model).__name__} are fused weights ({fused[0]} and {len(fused) - 1} more),"
            " which are not quantised; skip_experts=True (--skip-experts) leaves them unchanged and quantises the"
            " linear layers"
        )


def quantize_(
    model: nn.Module,
    scope: str = "ffn",
    *,
    group_size: int | None = None,
    bits: int = 8,
    mode: str = "prefix",
    extra_precision: bool = False,
    head: bool = False,
    skip_experts: bool = False,
    activations: str = "int8",
    means: Mapping[str, Tensor] | None = None,
    codes: Mapping[str, Codes] | Trained | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> nn.Module:
    """Replace the linear layers of `scope` by MatryoshkaLinear, in place, and return the model.

    codes: trained codes instead of untrained min–max ones: the result of a training run (its norm gains are put into
    the model) or codes by module path. means: input means by module path, subtracted before int8 activations are
    rounded. The embedding table is not changed. head=True also quantises the output head; if its weights are tied, it
    gets its own code, and `model.tie_weights()` no longer ties it.

    Raises ValueError for a mixture whose experts are fused weights, unless skip_experts=True leaves them out.
    """
    check_bits(bits)
    check_experts(model, scope, skip_experts)
    trained = codes if isinstance(codes, Trained) else Trained(dict(codes or {}))
    found = targets(model, scope, head)
    if codes is not None and not set(trained.codes) <= set(found):
        raise ValueError(f"codes: {sorted(set(trained.codes) - set(found))[0]} is no linear layer of scope {scope!r}")
    set_gains(model, trained.gains)
    for name, linear in progress(list(found.items())):
        # a head that is not among the trained layers gets untrained codes
        code = trained.codes[name] if name in trained.codes else quantize(linear.weight, group_size)
        mean = None if means is None else means.get(name)
        bias = None if linear.bias is None else linear.bias.detach()
        packed = Packed.of(code, mode).to(linear.weight.device)
        put(model, name, MatryoshkaLinear(packed, bias, bits, mode, extra_precision, activations, mean))
    untie(model, found)
    return model


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Tell a transformers model that its quantised head is no longer tied to its embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not any(module is head for module in (model.get_submodule(name) for name in names)):
        return
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _configs(model: nn.Module) -> list[Any]:
    config: Any = getattr(model, "config", None)
    return [config, *([config.get_text_config()] if hasattr(config, "get_text_config") else [])]


@contextmanager
def _tied_as_before(model: nn.Module) -> Iterator[None]:
    configs = [c for c in _configs(model) if hasattr(c, "tie_word_embeddings")]
    flags, keys = [c.tie_word_embeddings for c in configs], getattr(model, "all_tied_weights_keys", None)
    try:
        yield
    finally:
        for config, flag in zip(configs, flags, strict=True):
            config.tie_word_embeddings = flag
        if keys is not None:
            model.all_tied_weights_keys = keys


def set_gains(model: nn.Module, gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give norms the new weights that belong to trained codes; returns the old weights."""
    before = {}
    for name, gain in gains.items():
        norm = model.get_submodule(name)
        weight: Tensor = norm.weight  # type: ignore[assignment]
        before[name] = weight.data
        weight.data = gain.to(weight.data)
        norm.carries_codes = True  # type: ignore[assignment]
    return before


@contextmanager
def gained(model: nn.Module, gains: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the norms have the weights that belong to the codes."""
    before = set_gains(model, gains)
    try:
        yield
    finally:
        for name, data in before.items():
            norm = model.get_submodule(name)
            norm.weight.data = data  # type: ignore[union-attr,assignment]
            del norm.carries_codes


@contextmanager
def restored(model: nn.Module, before: Mapping[str, nn.Module]) -> Iterator[None]:
    """After the block, put these modules back at their paths."""
    with _tied_as_before(model):
        try:
            yield
        finally:
            for name, module in before.items():
                put(model, name, module)


def layers(model: nn.Module) -> dict[str, MatryoshkaLinear]:
    """The quantised linear layers by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MatryoshkaLinear)}


def matrices(model: nn.Module) -> dict[str, MatryoshkaMatrix]:
    """All modules of `model` that have a width, by module path: linear layers, and the rows of a MatryoshkaSAE."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MatryoshkaMatrix)}


def set_bits(
    model: nn.Module,
    bits: int | Mapping[str, int],
    mode: str | None = None,
    extra_precision: bool | None = None,
) -> None:
    """Run the quantised layers of a model, or a MatryoshkaSAE, at another width. Nothing is copied or rewritten.

    bits: one width, or widths by pattern of module paths; later patterns override earlier ones.  A pattern is a path or
    the beginning of one. "0-5" matches any of these numbers, "*" any part of a component, a leading "…" or "..." any
    beginning: {"model.layers.0-5": 8, "…mlp.down_proj": 2}.  Raises ValueError for a width outside 1–8, a pattern that
    matches no quantised layer, or a model without any; then nothing is changed.
    """
    found = matrices(model)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no quantised layer; call quantize_ first")
    widths = resolve(found, {"…": bits} if isinstance(bits, int) else bits)
    for name, width in widths.items():  # check all before changing one
        found[name].packed.read(width, mode or found[name].mode)
    for name, width in widths.items():
        found[name].set_bits(width, mode, extra_precision)


def resolve(names: Iterable[str], patterns: Mapping[str, int]) -> dict[str, int]:
    """Width by name, for names that a pattern matches; ValueError for a pattern that matches none."""
    names = list(names)
    widths: dict[str, int] = {}
    for pattern, bits in patterns.items():
        check_bits(bits, f"bits[{pattern!r}]")
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            raise ValueError(f"bits: pattern {pattern!r} matches none of {len(names)} layers, e.g. {names[0]!r}")
        widths |= dict.fromkeys(hits, bits)
    return widths


def matches(pattern: str, name: str) -> bool:
    """Whether a module path matches the pattern or is below a path that does."""
    anywhere = pattern.startswith(("…", "..."))
    wanted = [part for part in pattern.removeprefix("...").removeprefix("…").split(".") if part]
    parts = name.split(".")
    starts = range(len(parts) - len(wanted) + 1) if anywhere else range(1)
    return any(
        len(parts) >= start + len(wanted) and all(_component(w, p) for w, p in zip(wanted, parts[start:], strict=False))
        for start in starts
    )


def _component(wanted: str, part: str) -> bool:
    span = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if span:
        return part.isdigit() and int(span[1]) <= int(part) <= int(span[2])
    return re.fullmatch(".*".join(re.escape(piece) for piece in wanted.split("*")), part) is not None


def nbytes(model: nn.Module) -> int:
    """Bytes of the quantised matrices at the current widths: what one token reads from linear layers."""
    return sum(matrix.nbytes() for matrix in matrices(model).values())


def save(model: nn.Module, path: str | Path, bits: int = 8, about: Mapping[str, Any] | None = None) -> int:
    """Write the quantised layers; returns the size in bytes.  `bits` below 8 stores only the first planes; for codes in
    mode "matquant" it stores a flat copy of that slice."""
    found = layers(model)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no quantised layer to save")
    packed = {n: _narrowed(layer.packed, bits, layer.mode) for n, layer in found.items()}
    beside = {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in found.items()
        for part in ("bias", "mean")
        if getattr(layer, part) is not None
    }
    beside |= {f"{name}.gain": m.weight for name, m in model.named_modules() if getattr(m, "carries_codes", False)}  # type: ignore[misc]
    return storage.save(path, packed, beside, dict(about or {}))


def _narrowed(packed: Packed, bits: int, mode: str) -> Packed:
    if bits >= packed.stored:  # layers already narrowed are stored unchanged
        return packed
    return packed.prefix(bits) if mode == "prefix" else packed.materialize(bits, mode)


def load_(model: nn.Module, path: str | Path, activations: str = "int8") -> nn.Module:
    """Replace the linear layers that a file names by its codes.

    Raises CheckpointError if the model lacks such a layer or its shape differs, ValueError if it is quantised already.
    """
    if layers(model):
        raise ValueError(f"model: already quantised ({next(iter(layers(model)))})")
    held, beside, _ = storage.load(path)
    modules = dict(model.named_modules())
    gains = {name.removesuffix(".gain"): tensor for name, tensor in beside.items() if name.endswith(".gain")}
    for name, gain in gains.items():
        if getattr(modules.get(name), "weight", gain.new_empty(0)).shape != gain.shape:
            raise CheckpointError(f"{path}: {name}: the model has no norm of that name and size")
    for name, packed in held.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{path}: {name}: the model has no linear layer of that name")
        if (linear.out_features, linear.in_features) != (packed.out_features, packed.in_features):
            raise CheckpointError(
                f"{path}: {name}: expected {linear.out_features} × {linear.in_features},"
                f" got {packed.out_features} × {packed.in_features}"
            )
    set_gains(model, gains)
    for name, packed in held.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        bias = beside.get(f"{name}.bias", None if linear.bias is None else linear.bias.detach())
        layer = MatryoshkaLinear(packed.to(linear.weight.device), bias, mean=beside.get(f"{name}.mean"))
        layer.activations = activations
        put(model, name, layer.to(linear.weight.device))
    untie(model, held)
    return model
