"""QAT end to end: trains the weights of all quantised layers at once on next tokens, with straight-through rounding.

The loss of a step, over the widths r of the recipe from wide to narrow,

    Σ_r λ_r · CE(slice r, next token)  +  distill · KL(wider ‖ slice r),

where "wider" is the unquantised model for the widest slice, and else the next wider slice (distillation 8 → 4 → 2).

The output head of Gemma 3 270M has 262,144 rows; using all of them takes five sixths of a step.  Tokens of the
training text (5,358 in 99,000) are summed exactly, the others by a new sample in every step (`Vocabulary`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import cos, log, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.quant.model import gained, targets
from gemmascope_fast.quant.trained import Trained
from gemmascope_fast.training import arithmetic
from gemmascope_fast.training.nested.blocks import batches, load_state, parameter_groups, save_state
from gemmascope_fast.training.nested.recipe import NestedWeight, Recipe, begin_work, trainable

SAMPLED = 8192  # number of sampled tokens that represent those not in the training text
WARM = 0.1  # share of the steps in which learning rates rise


def finetune(
    model: nn.Module,
    ids: Tensor,
    recipe: Recipe,
    scope: str = "ffn",
    *,
    steps: int,
    start: Trained | None = None,
    work: str | Path | None = None,
    save_every: int = 20,
    progress: Callable[..., Any] | None = None,
    model_id: str | None = None,
) -> Trained:
    """Codes trained for `steps` steps of recipe.batch windows of ids [n, window].  The model is not changed.

    start: where training begins, e.g. the block-by-block result; default: the model's own weights.  work: a folder in
    which the state is saved every `save_every` steps; an interrupted run continues from there.  work, model_id: see
    `training.train`.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    names = list(targets(model, scope))
    nested = {name: NestedWeight(model.get_submodule(name), recipe) for name in names}  # type: ignore[arg-type]
    gains = {} if start is None else start.gains
    if start is not None:
        for name, module in nested.items():
            module.begin_at(start.codes[name])
    optimiser = torch.optim.Adam(parameter_groups(nested, None, recipe))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    vocabulary, used = model.get_output_embeddings().weight.shape[0], ids.unique()  # type: ignore[operator,union-attr]
    kept = None
    if work is not None:
        folder, model_id = begin_work(work, model, ids, model_id)
        begun = None if start is None else start.identity()
        kept = folder / f"qat-{recipe.key(ids, scope, model_id, steps, begun)}.pt"
    done = _load(kept, nested, optimiser, schedule)
    at = order(ids.shape[0], recipe.batch)
    for _ in range(done):
        next(at)
    bar = range(done, steps)
    with arithmetic.widened(model, ids.device):
        for step in progress(bar, desc="qat", initial=done, total=steps) if progress else bar:
            rows = next(at)
            with torch.no_grad():
                teacher = _hidden(model, ids[rows])
            optimiser.zero_grad(set_to_none=True)
            with trainable(model, nested), gained(model, gains):
                _step(model, nested, ids[rows], teacher, recipe, Vocabulary.draw(used, vocabulary, step))
            torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
            optimiser.step()
            schedule.step()
            if kept is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                _save(kept, step + 1, nested, optimiser, schedule)
    return Trained({name: module.codes() for name, module in nested.items()}, gains)


def rate(step: int, steps: int) -> float:
    """Learning rate at a step, as a share of the maximum: a linear rise, then a half-cosine fall."""
    warm = max(1, round(WARM * steps))
    return (step + 1) / warm if step < warm else (1 + cos(pi * (step - warm) / max(1, steps - warm))) / 2


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the output head used in one step.

    columns int64 [n]: token ids, those of the text first; log_weight fp32 [n]: the logarithm of how many tokens each
    represents, added to its logit (sampled softmax, Jean et al. 2015: the estimate of the partition function is
    unbiased); place int64 [vocabulary]: a token's index in columns, -1 if it is not there.
    """

    columns: Tensor
    log_weight: Tensor
    place: Tensor

    @classmethod
    def draw(cls, used: Tensor, size: int, seed: int, sampled: int = SAMPLED) -> Vocabulary:
        """All tokens in `used` and `sampled` others below `size`; all of the others if there are fewer."""
        others = torch.ones(size, dtype=torch.bool)
        others[used] = False
        rest = others.nonzero()[:, 0]
        chosen = rest[torch.randperm(rest.numel(), generator=torch.Generator().manual_seed(seed))[:sampled]]
        columns = torch.cat([used, chosen])
        log_weight = torch.zeros(columns.numel())
        log_weight[used.numel() :] = log(rest.numel() / max(1, chosen.numel())) if rest.numel() else 0.0
        place = torch.full((size,), -1)
        place[columns] = torch.arange(columns.numel())
        return cls(columns, log_weight, place)


def _step(
    model: nn.Module,
    nested: dict[str, NestedWeight],
    ids: Tensor,
    teacher: Tensor,
    recipe: Recipe,
    vocabulary: Vocabulary,
) -> None:
    """Gradients of one batch; only one width's graph in memory at a time."""
    wider = teacher
    for bits in recipe.bits:
        for module in nested.values():
            module.bits = bits
        hidden = _hidden(model, ids)
        loss = head_loss(model, hidden, wider, ids, recipe.weights.get(bits, 1.0), recipe.distill, vocabulary)
        loss.backward()  # type: ignore[no-untyped-call]
        wider = hidden.detach()


def order(count: int, size: int) -> Iterator[Tensor]:
    """Endless batches of window numbers, shuffled again in every pass."""
    epoch = 0
    while True:
        yield from batches(count, size, epoch)
        epoch += 1


def _hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """The input of the output head, fp32 [n, window, d], using `arithmetic.products`."""
    with arithmetic.autocast(ids.device):
        return model.get_decoder()(ids, use_cache=False).last_hidden_state.float()  # type: ignore[operator]


def head_loss(
    model: nn.Module,
    hidden: Tensor,
    wider: Tensor,
    ids: Tensor,
    weight: float,
    distill: float,
    vocabulary: Vocabulary,
) -> Tensor:
    """Mean over predicted tokens of weight · CE + distill · KL, for hidden and wider [n, window, d]."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    cap = getattr(model.config, "final_logit_softcapping", None)
    rows = head.weight[vocabulary.columns]
    bias = None if head.bias is None else head.bias[vocabulary.columns]

    def log_probabilities(state: Tensor) -> Tensor:
        with arithmetic.autocast(state.device):
            raw = nn.functional.linear(state[:, :-1].flatten(0, 1), rows, bias).float()
        raw = raw if cap is None else cap * torch.tanh(raw / cap)
        return (raw + vocabulary.log_weight).log_softmax(-1)

    own = log_probabilities(hidden)
    loss = weight * nn.functional.nll_loss(own, vocabulary.place[ids[:, 1:].flatten()])
    if distill:
        with torch.no_grad():
            other = log_probabilities(wider)
        loss = loss + distill * nn.functional.kl_div(own, other, reduction="batchmean", log_target=True)
    return loss


def _save(path: Path, step: int, nested: dict[str, NestedWeight], optimiser: Any, schedule: Any) -> None:
    state = {
        "step": step,
        "nested": {name: module.state_dict() for name, module in nested.items()},
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
    }
    save_state(state, path)


def _load(path: Path | None, nested: dict[str, NestedWeight], optimiser: Any, schedule: Any) -> int:
    """Number of finished steps; restores the state of an interrupted run."""
    if path is None or not path.exists():
        return 0
    state = load_state(path)
    for name, module in nested.items():
        module.load_state_dict(state["nested"][name])
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])
