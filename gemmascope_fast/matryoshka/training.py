"""MatQuant training, block by block: one block of the model in memory with gradients at a time.

Each width r is a student with a stream of its own: the activations that its slice of the blocks before gives.  A block
is fitted so that every student's output comes to the teacher's (the unquantised model on its own activations),

    Σ_r λ_r · mean over dimensions of ( E(out_r − teacher)² / Var(teacher) )  +  co-distillation 8 → 2,

with the slices of one code, straight through their rounding.  "omniquant" learns how far each group's range is clipped
(weights frozen); "qat" learns the weights too.  Widths trained alone (`bits=(2,)`) are the single-width baselines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.matryoshka.codes import (
    Codes,
    check_bits,
    check_group_size,
    check_mode,
    group_range,
    offset,
    quantize,
)
from gemmascope_fast.matryoshka.model import targets

METHODS = ("omniquant", "qat")
PUBLISHED = {8: 0.1, 4: 0.1, 2: 1.0}  # λ of Matryoshka Quantization


@dataclass(frozen=True)
class Recipe:
    """What one training run does.  `weights` λ by width; widths without one take 1."""

    method: str = "omniquant"
    group_size: int | None = None
    bits: tuple[int, ...] = (8, 4, 2)
    mode: str = "prefix"
    weights: dict[int, float] = field(default_factory=lambda: dict(PUBLISHED))
    distill: float = 0.1  # of the widest slice's output as a second teacher of the narrowest
    epochs: int = 2
    batch: int = 4  # windows
    clip_rate: float = 1e-2
    weight_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        check_group_size(self.group_size)
        check_mode(self.mode)
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ValueError(f"bits: expected widths from wide to narrow, each once, got {self.bits}")
        for bits in self.bits:
            check_bits(bits)

    def key(self, ids: Tensor, scope: str) -> str:
        """Names the run: what is trained, how and on which text."""
        text = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([asdict(self), text, scope], sort_keys=True).encode()).hexdigest()[:16]


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` forwards, the gradient of `value` backwards."""
    return value + (rounded - value).detach()


class NestedWeight(nn.Module):
    """A linear layer whose weight is the slice to `bits` of its own nested code, differentiable."""

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float().clone(), requires_grad=recipe.method == "qat")
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.group_size, self.mode, self.bits = recipe.group_size, recipe.mode, recipe.bits[0]
        low, _ = group_range(self.weight.detach(), self.group_size)
        # as in OmniQuant: sigmoid(4) = 0.98 of the range to begin with
        self.clip_low = nn.Parameter(torch.full_like(low, 4.0))
        self.clip_high = nn.Parameter(torch.full_like(low, 4.0))

    def limits(self) -> tuple[Tensor, Tensor]:
        low, high = group_range(self.weight.detach(), self.group_size)
        return low * self.clip_low.sigmoid(), high * self.clip_high.sigmoid()

    def spread(self, value: Tensor) -> Tensor:
        if self.group_size is None:
            return value
        return value.repeat_interleave(self.group_size, 1)[:, : self.weight.shape[1]]

    def sliced(self) -> Tensor:
        low, high = self.limits()
        alpha = ((high - low) / 255).clamp(min=torch.finfo(torch.float16).tiny)
        zero = (-low / alpha).clamp(0, 255)
        zero = through(zero, zero.round())
        a, z = self.spread(alpha), self.spread(zero)
        position = self.weight / a + z
        q = through(position, position.round()).clamp(0, 255)
        if self.bits < 8:
            step = 1 << (8 - self.bits)
            if self.mode == "prefix":
                q = through(q, (q / step).floor() * step + offset(self.bits, "prefix"))
            else:
                q = through(q, (q / step + 0.5).floor().clamp(max=(1 << self.bits) - 1) * step)
        return a * (q - z)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.sliced(), self.bias)

    @torch.no_grad()
    def codes(self) -> Codes:
        low, high = self.limits()
        return quantize(self.weight, self.group_size, low=low, high=high)


class _Stop(Exception):
    """Ends a forward pass early."""


def decoder_blocks(model: nn.Module, names: list[str]) -> tuple[str, nn.ModuleList]:
    """The list of blocks that holds the named layers.  ValueError where none holds them all."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(name.startswith(f"{path}.") for name in names):
            return path, module
    raise ValueError("scope: expected layers that all lie in one list of blocks; the output head is not trained")


@torch.no_grad()
def capture(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """(input of the first block, fp32 [n, window, d]; each block's other arguments for a batch of one window)."""
    arguments: list[dict[str, Any]] = [{} for _ in blocks]
    inputs: list[Tensor] = []

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index == 0:
                inputs.append((args[0] if args else kwargs["hidden_states"]).float())
                if len(inputs) > 1:
                    raise _Stop
            arguments[index] = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            if index == len(blocks) - 1:
                raise _Stop

        return hook

    handles = [b.register_forward_pre_hook(keep(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for window in [ids[:1], *ids.split(16)]:
            try:
                model(window, use_cache=False)
            except _Stop:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(inputs[1:]), arguments


def call(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """One block in bf16 arithmetic on an fp32 residual stream."""
    with torch.autocast("cpu", torch.bfloat16):
        out = block(hidden, **arguments)
    return (out[0] if isinstance(out, tuple) else out).float()


@torch.no_grad()
def propagate(block: nn.Module, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
    return torch.cat([call(block, part, arguments) for part in stream.split(4)])


def train(
    model: nn.Module,
    ids: Tensor,
    recipe: Recipe,
    scope: str = "ffn",
    work: str | Path | None = None,
    progress: Callable[..., Any] | None = None,
) -> dict[str, Codes]:
    """Codes by module path, trained on the token windows ids [n, window].  The model is left as it was.

    work: a folder where each finished block is kept; a run that was interrupted goes on after it.
    """
    names = list(targets(model, scope))
    path, blocks = decoder_blocks(model, names)
    folder = None if work is None else Path(work) / recipe.key(ids, scope)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    first, arguments = capture(model, blocks, ids)
    streams = dict.fromkeys(recipe.bits, first)
    teacher = first
    codes: dict[str, Codes] = {}
    order = range(len(blocks))
    for index in progress(order, desc=recipe.method) if progress else order:
        block = blocks[index]
        dtype = next(block.parameters()).dtype
        block.float()
        prefix = f"{path}.{index}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        target = propagate(block, teacher, arguments[index])
        kept = None if folder is None else folder / f"block{index}.pt"
        if kept is not None and kept.exists():
            found = {n: Codes(**c) for n, c in torch.load(kept, weights_only=True).items()}
        else:
            found = fit_block(block, inside, arguments[index], streams, target, recipe)
            if kept is not None:
                plain = {n: {k: getattr(c, k) for k in c.__dataclass_fields__} for n, c in found.items()}
                torch.save(plain, kept.with_suffix(".tmp"))
                os.replace(kept.with_suffix(".tmp"), kept)
        for bits in recipe.bits:
            with served(block, found, bits, recipe.mode):
                streams[bits] = propagate(block, streams[bits], arguments[index])
        teacher = target
        codes |= {prefix + name: code for name, code in found.items()}
        block.to(dtype)
    return codes


class served:
    """Within the block the named layers' weights are a slice of their codes."""

    def __init__(self, block: nn.Module, codes: dict[str, Codes], bits: int, mode: str) -> None:
        self.block, self.codes, self.bits, self.mode = block, codes, bits, mode

    def __enter__(self) -> None:
        self.before = {name: self.block.get_submodule(name).weight.data for name in self.codes}
        for name, code in self.codes.items():
            weight = self.block.get_submodule(name).weight
            weight.data = code.dequantize(self.bits, self.mode).to(weight.data)  # type: ignore[union-attr,operator,arg-type]

    def __exit__(self, *_: object) -> None:
        for name, data in self.before.items():
            self.block.get_submodule(name).weight.data = data  # type: ignore[union-attr,assignment]


def fit_block(
    block: nn.Module,
    names: list[str],
    arguments: dict[str, Any],
    streams: dict[int, Tensor],
    target: Tensor,
    recipe: Recipe,
) -> dict[str, Codes]:
    """Train one block's codes; its linear layers are put back afterwards."""
    linears = {name: block.get_submodule(name) for name in names}
    nested = {name: NestedWeight(linear, recipe) for name, linear in linears.items()}  # type: ignore[arg-type]
    others = [p for p in block.parameters() if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    for name, module in nested.items():
        _put(block, name, module)
    try:
        _optimise(block, nested, arguments, streams, target, recipe)
    finally:
        for name, linear in linears.items():
            _put(block, name, linear)
        for parameter in others:
            parameter.requires_grad_(True)
    return {name: module.codes() for name, module in nested.items()}


def _optimise(
    block: nn.Module,
    nested: dict[str, NestedWeight],
    arguments: dict[str, Any],
    streams: dict[int, Tensor],
    target: Tensor,
    recipe: Recipe,
) -> None:
    clips = [p for m in nested.values() for p in (m.clip_low, m.clip_high)]
    groups: list[dict[str, Any]] = [{"params": clips, "lr": recipe.clip_rate}]
    if recipe.method == "qat":
        groups.append({"params": [m.weight for m in nested.values()], "lr": recipe.weight_rate})
    optimiser = torch.optim.Adam(groups)
    variance = target.flatten(0, 1).var(0).clamp(min=1e-12)
    total = recipe.epochs * len(list(batches(target.shape[0], recipe.batch, 0)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    for epoch in range(recipe.epochs):
        for rows in batches(target.shape[0], recipe.batch, epoch):
            optimiser.zero_grad(set_to_none=True)
            widest: Tensor | None = None
            for bits in recipe.bits:  # one width's graph at a time
                for module in nested.values():
                    module.bits = bits
                out = call(block, streams[bits][rows], arguments)
                loss = recipe.weights.get(bits, 1.0) * error(out, target[rows], variance)
                if widest is not None and bits == recipe.bits[-1] and recipe.distill:
                    loss = loss + recipe.distill * error(out, widest, variance)
                loss.backward()  # type: ignore[no-untyped-call]
                widest = out.detach() if widest is None else widest
            optimiser.step()
            schedule.step()


def error(out: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Squared error in units of each dimension's variance; the first token (BOS, an outlier) is left out."""
    return ((out - target)[:, 1:].square() / variance).mean()


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """A shuffled pass over `count` windows."""
    return iter(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).split(size))


def _put(parent: nn.Module, name: str, module: nn.Module) -> None:
    path, _, child = name.rpartition(".")
    setattr(parent.get_submodule(path), child, module)
