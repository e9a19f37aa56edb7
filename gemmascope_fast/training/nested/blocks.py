"""MatQuant training, block by block: only one block of the model has gradients in memory at a time.

Each width r is a student with its own stream: the activations given by its slice of the earlier blocks.  A block is
fitted so that every student's output approaches the teacher's (the unquantised model on its own activations),

    Σ_r λ_r · mean over dimensions of ( E(out_r − teacher)² / Var(teacher) )  +  co-distillation 8 → 4 → 2,

where all slices are of one code, with straight-through rounding.  "omniquant" learns how far each group's range is
clipped and, where a block allows it, channel scales (weights are frozen); "qat" learns the weights too.  Widths trained
alone (`bits=(2,)`) are the single-width baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.atomic import make_folder, replacing
from gemmascope_fast.ops.codes import Codes
from gemmascope_fast.quant.model import targets
from gemmascope_fast.quant.trained import Trained
from gemmascope_fast.training import arithmetic
from gemmascope_fast.training.nested.equivalent import Scales, find
from gemmascope_fast.training.nested.recipe import ALONE, NestedWeight, Recipe, begin_work, trainable


class _Stop(Exception):
    """Stops a forward pass early."""


def decoder_blocks(model: nn.Module, names: list[str]) -> tuple[str, nn.ModuleList]:
    """The list of blocks that contains the named layers.  ValueError if no list contains all of them."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(name.startswith(f"{path}.") for name in names):
            return path, module
    raise ValueError("scope: expected layers that are all in one list of blocks; the output head is not trained")


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
    """Run one fp32 block with `arithmetic.products`, on an fp32 residual stream."""
    with arithmetic.autocast(hidden.device):
        out = block(hidden, **arguments)
    return (out[0] if isinstance(out, tuple) else out).float()


@torch.no_grad()
def propagate(block: nn.Module, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
    return torch.cat([call(block, part, arguments) for part in stream.split(4)])


@dataclass
class Streams:
    """State of a run: the next block and its input activations, the teacher's and each student's."""

    index: int
    teacher: Tensor
    students: dict[int, Tensor]

    def save(self, path: Path) -> None:
        save_state({"index": self.index, "teacher": self.teacher, "students": self.students}, path)


def train(
    model: nn.Module,
    ids: Tensor,
    recipe: Recipe,
    scope: str = "ffn",
    work: str | Path | None = None,
    progress: Callable[..., Any] | None = None,
    model_id: str | None = None,
) -> Trained:
    """Codes and norm gains, trained on the token windows ids [n, window].  The model is not changed.

    work: a folder for finished blocks and the streams after them; an interrupted run continues after the last
    one.  A folder belongs to one model and one text (`nested.begin_work`), with any recipes.  model_id: the model's
    identity, if the caller knows it.
    """
    names = list(targets(model, scope))
    path, blocks = decoder_blocks(model, names)
    folder = None
    if work is not None:
        folder, model_id = begin_work(work, model, ids, model_id)
        folder /= recipe.key(ids, scope, model_id)
        make_folder(folder)
    first, arguments = capture(model, blocks, ids)
    kept = None if folder is None else folder / "streams.pt"
    if kept is not None and kept.exists():
        at = Streams(**load_state(kept))
    else:
        at = Streams(0, first, dict.fromkeys(recipe.bits, first))
    found = Trained({}, {})
    for index in range(at.index):
        assert folder is not None
        _take(found, load_trained(folder / f"block{index}.pt"), f"{path}.{index}.")
    order = range(at.index, len(blocks))
    for index in progress(order, desc=recipe.method, initial=at.index, total=len(blocks)) if progress else order:
        prefix = f"{path}.{index}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        trained = _block(blocks[index], inside, arguments[index], at, recipe)
        if folder is not None and kept is not None:
            save_trained(trained, folder / f"block{index}.pt")
            at.save(kept)
        _take(found, trained, prefix)
    return found


def _block(block: nn.Module, names: list[str], arguments: dict[str, Any], at: Streams, recipe: Recipe) -> Trained:
    """Fit one block and run the streams through it."""
    dtype = next(block.parameters()).dtype
    block.float()
    try:
        target = propagate(block, at.teacher, arguments)
        fed = {bits: torch.lerp(own, at.teacher, recipe.feed) for bits, own in at.students.items()}
        trained = fit_block(block, names, arguments, fed, target, recipe, dtype)
        del fed
        for bits in recipe.bits:
            with served(block, trained, bits, recipe.mode):
                at.students[bits] = propagate(block, at.students[bits], arguments)
        at.teacher, at.index = target, at.index + 1
    finally:
        block.to(dtype)
    return trained


def _take(found: Trained, trained: Trained, prefix: str) -> None:
    found.codes.update({prefix + name: code for name, code in trained.codes.items()})
    found.gains.update({prefix + name: gain for name, gain in trained.gains.items()})


def save_trained(trained: Trained, path: Path) -> None:
    codes = {n: {k: getattr(c, k) for k in c.__dataclass_fields__} for n, c in trained.codes.items()}
    save_state({"codes": codes, "gains": trained.gains}, path)


def load_trained(path: Path) -> Trained:
    held = load_state(path)
    return Trained({n: Codes(**c) for n, c in held["codes"].items()}, held["gains"])


def save_state(value: Any, path: Path) -> None:
    """torch.save, atomically; the bytes do not depend on the file's name."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            # after a failed write, torch only reports that the file ends at the wrong place
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_state(path: Path) -> Any:
    """Read the result of `save_state`.  CheckpointError if the file is damaged."""
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, BadZipFile) as error:
        raise CheckpointError(f"{path}: not a state that can be resumed: {error}; delete it to start again") from error


class served:
    """Within the block the named layers' weights are a slice of their codes, and the norms have the trained gains."""

    def __init__(self, block: nn.Module, trained: Trained, bits: int, mode: str) -> None:
        self.block, self.trained, self.bits = block, trained, bits
        self.mode = "matquant" if mode == ALONE else mode

    def __enter__(self) -> None:
        new = {name: code.dequantize(self.bits, self.mode) for name, code in self.trained.codes.items()}
        self.before = {}
        for name, value in (new | self.trained.gains).items():
            weight = self.block.get_submodule(name).weight
            self.before[name] = weight.data
            weight.data = value.to(weight.data)  # type: ignore[union-attr,operator,arg-type]

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
    gain_dtype: torch.dtype = torch.float32,
) -> Trained:
    """Train one block's codes; its linear layers are restored afterwards.  gain_dtype: that of the model's norms."""
    nested = {name: NestedWeight(block.get_submodule(name), recipe) for name in names}  # type: ignore[arg-type]
    norms, gated = find(block, names, streams[recipe.bits[0]][:1], arguments) if recipe.equivalent else ({}, [])
    scales = Scales(block, nested, norms, gated)
    with trainable(block, nested):
        optimise(block, nested, scales, arguments, streams, target, recipe)
    gains = scales.fold(block, gain_dtype)
    return Trained({name: module.codes() for name, module in nested.items()}, gains)


def parameter_groups(nested: dict[str, NestedWeight], scales: nn.Module | None, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters for Adam, each kind with its learning rate."""
    clips = [p for m in nested.values() for p in (m.clip_low, m.clip_high)]
    groups: list[dict[str, Any]] = [{"params": clips, "lr": recipe.clip_rate}]
    if scales is not None and any(True for _ in scales.parameters()):
        groups.append({"params": list(scales.parameters()), "lr": recipe.scale_rate})
    if recipe.method == "qat":
        groups.append({"params": [m.weight for m in nested.values()], "lr": recipe.weight_rate})
    return groups


def optimise(
    block: nn.Module,
    nested: dict[str, NestedWeight],
    scales: nn.Module,
    arguments: dict[str, Any],
    streams: dict[int, Tensor],
    target: Tensor,
    recipe: Recipe,
) -> None:
    """Run Adam on one block, with all widths in each step."""
    optimiser = torch.optim.Adam(parameter_groups(nested, scales, recipe))
    variance = target.flatten(0, 1).var(0).clamp(min=1e-12)
    total = recipe.epochs * len(list(batches(target.shape[0], recipe.batch, 0)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    for epoch in range(recipe.epochs):
        for rows in batches(target.shape[0], recipe.batch, epoch):
            optimiser.zero_grad(set_to_none=True)
            wider: Tensor | None = None
            for bits in recipe.bits:  # only one width's graph in memory at a time
                for module in nested.values():
                    module.bits = bits
                out = call(block, streams[bits][rows], arguments)
                loss = recipe.weights.get(bits, 1.0) * error(out, target[rows], variance)
                if wider is not None and recipe.distill:
                    loss = loss + recipe.distill * error(out, wider, variance)
                loss.backward()  # type: ignore[no-untyped-call]
                wider = out.detach()
            optimiser.step()
            schedule.step()


def error(out: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Squared error in units of each dimension's variance; the first token (BOS, an outlier) is excluded."""
    return ((out - target)[:, 1:].square() / variance).mean()


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """A shuffled pass over `count` windows."""
    return iter(torch.randperm(count, generator=torch.Generator().manual_seed(seed)).split(size))
