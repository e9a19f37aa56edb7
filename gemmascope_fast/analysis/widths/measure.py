"""Log-perplexity of a model on held-out text, and the comparison of widths, slicings and groups."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.files import identity
from gemmascope_fast.files.atomic import replacing
from gemmascope_fast.ops.codes import Codes, quantize_alone
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.model import gained, layers, nbytes, quantize_, restored, set_bits, targets
from gemmascope_fast.quant.planes import Packed
from gemmascope_fast.quant.trained import Trained, put

LOGIT_ROWS = 16  # rows of 262,144 logits at a time: small enough in fp32 that the allocator reuses the memory


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor, batch: int = 2) -> float:
    """Mean negative log-likelihood per token in nats over ids [n, window]; its exponential is the perplexity."""
    total = 0.0
    for part in ids.split(batch):
        logits = model(part, use_cache=False).logits[:, :-1]
        rows, wanted = logits.flatten(0, 1).split(LOGIT_ROWS), part[:, 1:].flatten().split(LOGIT_ROWS)
        for few, theirs in zip(rows, wanted, strict=True):
            total += torch.nn.functional.cross_entropy(few.float(), theirs, reduction="sum").item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


@torch.no_grad()
def input_means(model: nn.Module, names: list[str], ids: Tensor, batch: int = 2) -> dict[str, Tensor]:
    """Mean input of each named layer over ids, fp32: subtracted before int8 activations are rounded."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().float().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + rows.double().sum(0)
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for part in ids.split(batch):
            model(part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[name] / counts[name]).float() for name in names}


def alone(weight: Tensor, bits: int, group_size: int | None = None) -> Packed:
    """A flat copy of the codes of `quantize_alone`."""
    return Packed.of(quantize_alone(weight, bits, group_size), "matquant").materialize(bits)


@dataclass(frozen=True)
class Case:
    """One figure of the comparison."""

    scope: str = "ffn"
    group_size: int | None = None
    method: str = "minmax"
    bits: int = 8
    slicing: str = "prefix"  # prefix, matquant, matquant-extra, alone
    activations: str = "exact"

    @property
    def group(self) -> str:
        return "channel" if self.group_size is None else f"group{self.group_size}"

    def key(self) -> str:
        return f"{self.scope}/{self.group}/{self.method}/{self.slicing}/int{self.bits}/{self.activations}"


class Results:
    """Figures by key in a JSON file, written after each one: an interrupted comparison continues."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.figures: dict[str, Any] = {}
        if self.path.exists():
            try:
                self.figures = dict(json.loads(self.path.read_text("utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: expected JSON of figures by name: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self.figures

    def claim(self, key: str, about: dict[str, Any], first: bool = False) -> None:
        """Record under `key` what the figures belong to; ValueError if they belong to something else. first: existing
        figures without this key may belong to something else."""
        if key in self.figures or (self.figures and not first):
            identity.check(self.path, self.figures.get(key, {}), about)
        else:
            self.put(key, about)

    def put(self, key: str, figure: Any) -> None:
        self.figures[key] = figure
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.figures, indent=1, sort_keys=True), "utf-8")


@contextmanager
def quantised(model: nn.Module, scope: str, **options: Any) -> Iterator[nn.Module]:
    """Within the block the model's layers of `scope` are quantised; after it they are linear layers again."""
    before = targets(model, scope, options.get("head", False))
    codes = options.get("codes")
    with gained(model, codes.gains if isinstance(codes, Trained) else {}), restored(model, before):
        yield quantize_(model, scope, **options)


def measure_case(
    model: nn.Module, case: Case, ids: Tensor, means: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """The figures of one case, for a model whose layers are quantised (not yet, if "alone" and untrained)."""
    if case.slicing == "alone" and not layers(model):
        before = targets(model, case.scope)
        with restored(model, before):
            for name, linear in before.items():
                packed = alone(linear.weight, case.bits, case.group_size)
                mean = None if means is None else means.get(name)
                layer = MatryoshkaLinear(packed, linear.bias, activations=case.activations, mean=mean)
                put(model, name, layer)
            return _figures(model, ids)
    extra = case.slicing == "matquant-extra"
    set_bits(model, case.bits, "prefix" if case.slicing == "prefix" else "matquant", extra)
    for layer in layers(model).values():
        layer.activations = case.activations
    return _figures(model, ids, case.slicing == "alone")


def _figures(model: nn.Module, ids: Tensor, flat: bool = False) -> dict[str, float]:
    """flat: a code with only one width is stored at that width, whatever planes it has here."""
    loss = mean_loss(model, ids)
    size = nbytes(model)
    if flat:
        size = sum(layer.packed.materialize(layer.bits, layer.mode).nbytes() for layer in layers(model).values())
    weights = sum(layer.in_features * layer.out_features for layer in layers(model).values())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_weight": 8 * size / weights}


def full(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """The unquantised model's figures: loss, number of predicted tokens, and the dtype used for the whole run."""
    return {
        "loss": mean_loss(model, ids),
        "tokens": int(ids.numel() - ids.shape[0]),
        "arithmetic": _arithmetic(model),
    }


def _arithmetic(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def compare(
    model: nn.Module,
    ids: Tensor,
    cases: list[Case],
    results: Results,
    means: Mapping[str, Tensor] | None = None,
    codes: Mapping[str, Codes] | Trained | None = None,
    progress: Callable[[list[Any]], Any] = iter,
) -> dict[str, Any]:
    """Measure the cases that `results` lacks; all must have one scope, group size and method."""
    if "full" not in results:
        results.put("full", full(model, ids))
    begun = results.figures["full"].get("arithmetic", _arithmetic(model))  # older files have none
    if begun != _arithmetic(model):
        raise ValueError(f"{results.path}: expected a table started in {_arithmetic(model)}, got one in {begun}")
    todo = [case for case in cases if case.key() not in results]
    # a code trained for one width is used like any other
    alone_now = [c for c in todo if c.slicing == "alone"] if codes is None else []
    for case in progress(alone_now):
        results.put(case.key(), measure_case(model, case, ids, means))
    sliced = [c for c in todo if c not in alone_now]
    if sliced:
        first = replace(sliced[0])
        options = {"group_size": first.group_size, "means": means, "codes": codes, "skip_experts": True}
        with quantised(model, first.scope, **options) as served:
            for case in progress(sliced):
                results.put(case.key(), measure_case(served, case, ids))
    return results.figures
