"""A linear layer for training, whose weight is a slice of its nested code, and the recipe of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gemmascope_fast.files import identity
from gemmascope_fast.ops.codes import (
    Codes,
    check_bits,
    check_group_size,
    check_mode,
    group_range,
    offset,
    quantize,
    quantize_alone,
)
from gemmascope_fast.quant.trained import put
from gemmascope_fast.training.nested import straight_through

METHODS = ("omniquant", "qat")
ALONE = "alone"  # `mode` of a single-width baseline: its own grid, which spans the range with 2^bits − 1 steps
LEAST = 1e-30  # scale of a group of zeros in training: smaller than for any weights, with a finite inverse
PUBLISHED = {8: 0.1, 4: 0.1, 2: 1.0}  # λ of Matryoshka Quantization


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run.

    bits: the widths trained together, from wide to narrow; one width with mode "alone" is a single-width baseline.
    weights: λ by width, default 1.  distill: weight of each width's output as a second teacher of the next narrower one
    (8 → 4 → 2).  equivalent: also learn channel scales, which do not change the unquantised model's output.  feed:
    share of the teacher's activations in the input that the next block is fitted on.  Adam's rates fall to zero.
    """

    method: str = "omniquant"
    group_size: int | None = None
    bits: tuple[int, ...] = (8, 4, 2)
    mode: str = "prefix"
    weights: dict[int, float] = field(default_factory=lambda: dict(PUBLISHED))
    distill: float = 0.1
    equivalent: bool = True
    feed: float = 0.0
    epochs: int = 2
    batch: int = 4  # windows
    clip_rate: float = 1e-2
    scale_rate: float = 5e-3
    weight_rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        check_group_size(self.group_size)
        if self.mode != ALONE:
            check_mode(self.mode)
        elif len(self.bits) != 1:
            raise ValueError(f"bits: expected one width with mode {ALONE!r}, got {self.bits}")
        if not self.bits or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise ValueError(f"bits: expected widths from wide to narrow, each once, got {self.bits}")
        for bits in self.bits:
            check_bits(bits)
        if not 0 <= self.feed <= 1:
            raise ValueError(f"feed: expected a share from 0 to 1, got {self.feed}")

    def key(self, ids: Tensor, scope: str, *more: object) -> str:
        """Name of the run: what is trained, how and on which text."""
        return identity.of_json([asdict(self), identity.of_tensor(ids, "ids"), scope, *more])[:16]


def begin_work(work: str | Path, model: nn.Module, ids: Tensor, model_id: str | None = None) -> tuple[Path, str]:
    """(the folder, the model's identity). A folder with training state belongs to one model and one text.

    model_id: if the caller knows it.  Raises ValueError that says what differs if the folder belongs to another.
    """
    model_id = identity.of_module(model) if model_id is None else model_id
    about = {
        "model": model_id,
        "arithmetic": str(next(model.parameters()).dtype),
        "text": identity.of_tensor(ids, "ids"),
    }
    identity.claim(Path(work), about)
    return Path(work), model_id


class NestedWeight(nn.Module):
    """A linear layer whose weight is the slice to `bits` of its nested code; differentiable.

    columns, rows: channel scales whose logarithms are learned elsewhere (`equivalent.Scales`). The code is that of
    W · columns / rows, and the input is divided by `columns` unless something before the layer does so.
    """

    columns: nn.Parameter | None
    rows: nn.Parameter | None
    divides_input = False

    def __init__(self, linear: nn.Linear, recipe: Recipe) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().float().clone(), requires_grad=recipe.method == "qat")
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.group_size, self.mode, self.bits = recipe.group_size, recipe.mode, recipe.bits[0]
        self.register_parameter("columns", None)
        self.register_parameter("rows", None)
        low, _ = group_range(self.weight.detach(), self.group_size)
        # as in OmniQuant: begin with sigmoid(4) = 0.98 of the range
        self.clip_low = nn.Parameter(torch.full_like(low, 4.0))
        self.clip_high = nn.Parameter(torch.full_like(low, 4.0))

    def scaled(self) -> Tensor:
        weight: Tensor = self.weight
        if self.columns is not None:
            weight = weight * self.columns.exp()
        if self.rows is not None:
            weight = weight / self.rows.exp()[:, None]
        return weight

    def limits(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # the weights get the gradient of their codes; a scale also moves the range
        low, high = group_range(
            weight.detach() if self.columns is None and self.rows is None else weight, self.group_size
        )
        return low * self.clip_low.sigmoid(), high * self.clip_high.sigmoid()

    def sliced(self) -> Tensor:
        weight = self.scaled()
        low, high = self.limits(weight)
        top = (1 << self.bits) - 1 if self.mode == ALONE else 255
        alpha = ((high - low) / top).clamp(min=LEAST)
        zero = (-low / alpha).clamp(0, top)
        cut = None if self.bits == 8 or self.mode == ALONE else self._cut
        return straight_through.sliced(weight, alpha, zero, self.group_size, top, cut)

    def _cut(self, q: Tensor) -> Tensor:
        step = 1 << (8 - self.bits)
        if self.mode == "prefix":
            return q.div_(step).floor_().mul_(step).add_(offset(self.bits, "prefix"))
        return q.div_(step).add_(0.5).floor_().clamp_(max=(1 << self.bits) - 1).mul_(step)

    def forward(self, x: Tensor) -> Tensor:
        if self.divides_input and self.columns is not None:
            x = x / self.columns.exp().to(x.dtype)
        bias = self.bias
        if bias is not None and self.rows is not None:
            bias = bias / self.rows.exp()
        return nn.functional.linear(x, self.sliced(), bias)

    @torch.no_grad()
    def begin_at(self, codes: Codes) -> None:
        """Start from existing codes: their weights, and a range that reaches their extremes."""
        self.weight.copy_(codes.dequantize())
        low, high = group_range(self.weight, self.group_size)
        ends = -codes.zero_point.float() * codes.scale.float(), (255 - codes.zero_point.float()) * codes.scale.float()
        for clip, least, end in ((self.clip_low, low, ends[0]), (self.clip_high, high, ends[1])):
            # if the weights do not fill the range, use 0.9999 of their own range
            clip.copy_((end / torch.where(least == 0, torch.ones_like(least), least)).clamp(1e-4, 0.9999).logit())

    @torch.no_grad()
    def codes(self) -> Codes:
        weight = self.scaled()
        low, high = self.limits(weight)
        if self.mode == ALONE:
            return quantize_alone(weight, self.bits, self.group_size, low, high)
        return quantize(weight, self.group_size, low=low, high=high)


@contextmanager
def trainable(parent: nn.Module, nested: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block `parent` has these modules at their paths, and only their parameters have gradients."""
    before = {name: parent.get_submodule(name) for name in nested}
    frozen = [p for p in parent.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for name, module in nested.items():
        put(parent, name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            put(parent, name, module)
        for parameter in frozen:
            parameter.requires_grad_(True)
