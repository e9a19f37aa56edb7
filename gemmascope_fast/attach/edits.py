"""Interventions on latents: small objects that can be combined, passed to `attach` as `edits`.

An edit is stored as what it adds to the latents (its delta), only for the features that it names.  So editing three
features decodes three rows of W_dec, whatever else fires, and an edit that changes nothing changes no activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.selection import by_mask, checked
from gemmascope_fast.errors import AttachError

Positions = str | Tensor | Callable[..., Tensor]


class EditError(AttachError, ValueError):
    """Edits that are invalid, contradict each other or do not fit their site."""


class FeatureIndexError(AttachError, IndexError):
    """An edit of a feature that the SAE does not have."""


@dataclass(eq=False, kw_only=True)
class Edit:
    """Base class of all edits.

    positions: "all", "prompt", "generated" (columns fed back by generate, or after a sequence's first call), a bool
    mask [S] or [B, S] over columns, or a function from token ids [B, S] to bool [B, S].
    sequences: None for every sequence of the batch, a bool tensor [B], or row numbers; may be changed between
    calls.  With beams or several returned sequences, all rows of one input use its entry.
    on: False switches the edit off; may be changed between calls.
    site: the key of its SAE, if several are attached.
    """

    positions: Positions = "all"
    sequences: Any = None
    on: bool = True
    site: Any = None

    def check(self) -> None:
        """Raise an error if the selection is invalid."""
        p = self.positions
        if isinstance(p, str):
            if p not in ("all", "prompt", "generated"):
                raise EditError(f"positions: expected 'all', 'prompt', 'generated', a mask or a callable, got {p!r}")
        elif isinstance(p, Tensor):
            if p.dtype != torch.bool or p.dim() not in (1, 2):
                raise EditError(f"positions: expected a bool mask [S] or [B, S], got {p.dtype} {tuple(p.shape)}")
        elif not callable(p):
            raise EditError(f"positions: expected a name, a mask or a callable, got {type(p).__name__}")

    @property
    def everywhere(self) -> bool:
        """Whether it applies to every row of every call."""
        return self.on and self.sequences is None and isinstance(self.positions, str) and self.positions == "all"

    def rows(self, call: Call) -> Tensor | None:
        """bool [B * S], the rows of the call that it applies to; None for all."""
        if not self.on:
            return torch.zeros(call.n_rows, dtype=torch.bool)
        chosen = self._columns(call)
        if self.sequences is not None:
            rows = self._batch(call)[:, None].expand(call.batch, call.length)
            chosen = rows if chosen is None else chosen & rows
        return None if chosen is None else chosen.reshape(-1)

    def _columns(self, call: Call) -> Tensor | None:
        if isinstance(self.positions, Tensor):
            return by_mask(self.positions, call, "positions")
        if callable(self.positions):
            return checked(self.positions(call.tokens().token_id), call, "positions")
        if self.positions == "all":
            return None
        columns = torch.arange(call.start, call.start + call.length)
        generated = columns >= call.group.prompt
        return (generated if self.positions == "generated" else ~generated).expand(call.batch, call.length)

    def _batch(self, call: Call) -> Tensor:
        given = torch.as_tensor(self.sequences).cpu()
        if given.dtype != torch.bool:
            ids = given.to(torch.int64).reshape(-1)
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= call.batch):
                raise EditError(f"sequences: expected rows in [0, {call.batch}), got {ids.tolist()}")
            return torch.zeros(call.batch, dtype=torch.bool).index_fill(0, ids, True)
        if given.dim() != 1 or given.numel() == 0 or call.batch % given.numel():
            raise EditError(f"sequences: expected a bool [{call.batch}], got {tuple(given.shape)}")
        return given.repeat_interleave(call.batch // given.numel())


@dataclass(eq=False)
class FeatureEdit(Edit):
    """An edit of named features. `delta` computes the new total of what is added."""

    feature: int | Sequence[int]
    features: tuple[int, ...] = field(init=False, repr=False)
    NUMBER: ClassVar[str] = "value"  # the field with its number, if it has one

    def __post_init__(self) -> None:
        self.features = _features(self.feature)

    @property
    def amount(self) -> float:
        return getattr(self, self.NUMBER) if self.NUMBER else 0.0

    @staticmethod
    def delta(old: Tensor, delta: Tensor, amount: Tensor) -> Tensor:
        """Current latents and what earlier edits add (old, delta), each [n, k] for k features → what is added now.

        amount [k]: each feature's number, so that several edits of one kind run as one operation.
        """
        raise NotImplementedError


@dataclass(eq=False)
class Clamp(FeatureEdit):
    """Sets the feature to `value`, whether or not it fired."""

    value: float

    @staticmethod
    def delta(old: Tensor, delta: Tensor, amount: Tensor) -> Tensor:
        return amount - old


@dataclass(eq=False)
class Ablate(FeatureEdit):
    """Sets features to zero."""

    NUMBER: ClassVar[str] = ""

    @staticmethod
    def delta(old: Tensor, delta: Tensor, amount: Tensor) -> Tensor:
        return -old


@dataclass(eq=False)
class Scale(FeatureEdit):
    """Multiplies the feature by `factor`."""

    factor: float

    NUMBER: ClassVar[str] = "factor"

    @staticmethod
    def delta(old: Tensor, delta: Tensor, amount: Tensor) -> Tensor:
        return torch.where(amount == 1, delta, (old + delta) * amount - old)


@dataclass(eq=False)
class Add(FeatureEdit):
    """Adds strength · W_dec[feature] to the activation, whatever the feature's value (the addition in AxBench)."""

    strength: float

    NUMBER: ClassVar[str] = "strength"

    @staticmethod
    def delta(old: Tensor, delta: Tensor, amount: Tensor) -> Tensor:
        return delta + amount


@dataclass(eq=False)
class MinClamp(FeatureEdit):
    """Raises the feature to `value` if it is lower."""

    value: float

    @staticmethod
    def delta(old: Tensor, delta: Tensor, amount: Tensor) -> Tensor:
        return torch.where(old + delta < amount, amount - old, delta)


@dataclass(eq=False)
class Mask(Edit):
    """Keeps only these features and sets all others to zero."""

    features: Sequence[int] | Tensor

    def __post_init__(self) -> None:
        given = self.features
        if isinstance(given, Tensor) and given.dtype == torch.bool:
            given = given.nonzero()[:, 0]
        self.features = _features(given.tolist() if isinstance(given, Tensor) else given)


@dataclass(eq=False)
class Direction(Edit):
    """Adds strength · vector to the activation: DiffMean, ReFT-r1 or any probe.  vector [d], any floating dtype."""

    vector: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or self.vector.dim() != 1 or not self.vector.is_floating_point():
            raise EditError(f"vector: expected a floating vector [d], got {_shape(self.vector)}")


def check_edits(edits: Sequence[Edit], d_sae: int | None, d_out: int | None) -> None:
    """Raise an error if edits of one site do not fit it (d_sae None: there is no SAE) or contradict each other."""
    for edit in edits:
        edit.check()
        for name in ("value", "factor", "strength"):
            number = getattr(edit, name, 0.0)
            if not isinstance(number, (int, float)) or not math.isfinite(number):
                raise EditError(f"{name}: expected a finite number, got {number!r} in {edit}")
        if isinstance(edit, Direction):
            if d_out is not None and edit.vector.numel() != d_out:
                raise EditError(f"vector: expected [{d_out}], got {_shape(edit.vector)}")
            continue
        if d_sae is None:
            raise EditError(f"{type(edit).__name__} needs an SAE at its site; only Direction does not")
        outside = [f for f in edit.features if f >= d_sae]  # type: ignore[attr-defined]
        if outside:
            raise FeatureIndexError(f"feature: expected one in [0, {d_sae}), got {outside[0]} in {edit}")
    for i, one in enumerate(edits):
        for other in edits[i + 1 :]:
            if _overlap(one, other):
                _check_pair(one, other)


def _check_pair(one: Edit, other: Edit) -> None:
    """Raise EditError if two edits of the same rows cannot both apply."""
    for mask, edit in ((one, other), (other, one)):
        if isinstance(mask, Mask) and isinstance(edit, (Clamp, Add, MinClamp, Scale)):
            dropped = set(edit.features) - set(mask.features)  # type: ignore[arg-type]
            if dropped:
                raise EditError(f"{edit} contradicts a Mask that drops feature {min(dropped)}")
    if not isinstance(one, FeatureEdit) or not isinstance(other, FeatureEdit):
        return
    shared = set(one.features) & set(other.features)
    (low, high), (low2, high2) = _range(one), _range(other)
    if shared and max(low, low2) > min(high, high2):
        raise EditError(f"{one} and {other} contradict each other on feature {min(shared)}")


def _range(edit: FeatureEdit) -> tuple[float, float]:
    """The range of values that a feature has after an edit."""
    if isinstance(edit, Clamp):
        return edit.value, edit.value
    if isinstance(edit, Ablate):
        return 0.0, 0.0
    return (edit.value if isinstance(edit, MinClamp) else -math.inf), math.inf


def _overlap(one: Edit, other: Edit) -> bool:
    """Whether two edits may apply to the same row, as far as known before the model runs."""
    if {str(one.positions), str(other.positions)} == {"prompt", "generated"}:
        return False
    p, q = one.positions, other.positions
    if isinstance(p, Tensor) and isinstance(q, Tensor) and p.shape == q.shape and not bool((p & q).any()):
        return False
    if one.sequences is None or other.sequences is None:
        return True
    rows = [torch.as_tensor(e.sequences).cpu() for e in (one, other)]
    if any(r.dtype == torch.bool for r in rows) and not all(r.dtype == torch.bool for r in rows):
        return True
    if rows[0].dtype == torch.bool:
        return rows[0].shape != rows[1].shape or bool((rows[0] & rows[1]).any())
    return bool(torch.isin(rows[0], rows[1]).any())


def _features(given: Any) -> tuple[int, ...]:
    ids = [given] if isinstance(given, int) else given
    if isinstance(ids, Tensor):
        ids = ids.reshape(-1).tolist()
    try:
        found = tuple(int(f) for f in ids)
    except (TypeError, ValueError) as error:
        raise EditError(f"feature: expected a feature or several, got {given!r}") from error
    if any(f < 0 for f in found) or any(isinstance(f, (bool, float)) for f in ids):
        raise FeatureIndexError(f"feature: expected features from 0 on, got {given!r}")
    return found


def _shape(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# What `attach` takes; a mapping is keyed as its SAEs.
Edits = Edit | Sequence[Edit] | Mapping[Any, "Edit | Sequence[Edit]"]
