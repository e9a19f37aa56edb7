"""Finds which sequences a call continues: those of its generation, or those in its KV cache.

A cache carries a mark that names its sequences, so a copy of a cache is recognised too.  Between two calls a cache may
be cropped, reordered, or lose and repeat sequences.  Cropping shows in its length. For the rest, the ledger stores a
few numbers of the last columns' keys, or of recurrent states (`prints`), and looks up each row of the next call in
them.  If a cache gives neither, such as a quantised one, its rows are assumed to keep their order.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gemmascope_fast.attach import masks
from gemmascope_fast.attach.calls import Call, Generation, Group, Parent, cache_length, cache_of
from gemmascope_fast.errors import AttachError

_MARKS = "_gemmascope_fast_marks"
COLUMNS, DIMENSIONS = 64, 4  # of the stored keys: 1 KB a sequence; the last layer's keys depend on all earlier tokens


@dataclass(frozen=True)
class Mark:
    """What a cache contains, for one ledger.  calls: None for the cache itself; for a copy, the number of calls made
    when it was copied, with its `prints` at that time."""

    group: Group
    calls: int | None = None
    prints: tuple[int, Tensor] | None = None

    def copied(self) -> Mark:
        return self if self.calls is not None else Mark(self.group, len(self.group.calls), self.group.prints)


class _Marks:
    """What a cache contains, by ledger.  A copy of the cache gets its own marks, which later calls do not change."""

    def __init__(self, cache: Any = None) -> None:
        self.owner = None if cache is None else weakref.ref(cache)
        self.of: WeakKeyDictionary[Ledger, Mark] = WeakKeyDictionary()

    def __deepcopy__(self, memo: Any) -> _Marks:
        made = _Marks()
        for ledger, mark in self.of.items():
            made.of[ledger] = mark.copied()
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # not saved with the cache


class Ledger:
    """Finds the group that a call continues.  References to caches are weak, so they do not keep a cache in memory."""

    def __init__(self, keep: bool = True) -> None:
        self.groups: list[Group] = []
        self.keep = keep  # False: a group is forgotten with its cache or generation
        self.sequences = 0

    def group(self, cache: Any, generation: Generation | None, start: int | None, batch: int, length: int) -> Group:
        """The group of a call of `batch` rows that begins at column `start` (None: unknown, it continues)."""
        if generation is not None and generation.group is not None and generation.group[0] is self:
            own = generation.group[1]
            if own.rows != batch:
                raise AttachError(f"a call of {batch} sequences continues a generation of {own.rows}")
            return own
        mark = None if start == 0 else self._mark(cache)  # a cache that was emptied has other sequences
        parent = None if mark is None else _parent(mark, cache, start, batch)
        if mark is not None and parent is not None:
            here = mark.calls is None
            same = parent.rows == tuple(range(mark.group.rows))
            if here and same and generation is None and mark.group.generation is None:
                return mark.group
        return self._new(batch, start or 0, generation, length, parent)

    def _new(self, batch: int, start: int, generation: Generation | None, length: int, parent: Parent | None) -> Group:
        prompt = generation.prompt if generation is not None and generation.prompt is not None else start + length
        group = Group(self.sequences, batch, generation, start, start, prompt, parent=parent)
        if parent is not None:
            known = parent.group
            group.end = start or known.end
            if known.heads is not None:
                group.heads = [list(known.heads[row]) for row in parent.rows]
            if generation is None:
                group.first, group.prompt = known.first, known.prompt
        self.sequences += batch
        if self.keep:
            self.groups.append(group)
        if generation is not None:
            generation.group = (self, group)
        return group

    def committed(self, call: Call, cache: Any) -> None:
        """Called after the call, when the cache in its output has the call's columns."""
        group = call.group
        group.end = call.start + call.length
        if self.keep:
            group.calls.append(call)
        if cache is None or isinstance(cache, tuple):
            return
        self._remember(cache, group)
        if group.generation is None:
            group.prints = _prints(cache, group.end)
            group.told = cache_length(cache) == group.end

    def generated(self, generation: Generation) -> None:
        """Called after a generation: its cache may belong to the user, who may continue it."""
        group = generation.group[1] if generation.group is not None and generation.group[0] is self else None
        cache = None if group is None or group.cache is None else group.cache()
        length = None if cache is None else cache_length(cache)
        if group is not None and length:
            group.prints = _prints(cache, length)

    def _mark(self, cache: Any) -> Mark | None:
        marks = getattr(cache, "__dict__", {}).get(_MARKS)
        if not isinstance(marks, _Marks) or (mark := marks.of.get(self)) is None:
            return None
        return mark if marks.owner is not None and marks.owner() is cache else mark.copied()

    def _remember(self, cache: Any, group: Group) -> None:
        known = getattr(cache, "__dict__", None)
        if known is None:
            return  # such a cache cannot be followed: a later call that continues it has columns that were not seen
        marks = known.get(_MARKS)
        if not isinstance(marks, _Marks) or marks.owner is None or marks.owner() is not cache:
            old, marks = marks, _Marks(cache)
            for ledger, known_mark in old.of.items() if isinstance(old, _Marks) else ():
                marks.of[ledger] = known_mark.copied()
            known[_MARKS] = marks
        mark = marks.of.get(self)
        if mark is None or mark.group is not group or mark.calls is not None:
            if mark is not None and mark.calls is None and group.parent is not None:
                mark.group.continued = group.parent.group is mark.group
            marks.of[self] = Mark(group)
            group.cache = weakref.ref(cache)

    def rolled_back_to(self, group: Group) -> int | None:
        """Number of columns in a group's cache, if it was cropped since the last call; None if it was not cropped, was
        emptied for other sequences, or if that is unknown."""
        cache = None if group.cache is None or not group.told else group.cache()
        mark = None if cache is None else self._mark(cache)
        if mark is None or mark.group is not group or mark.calls is not None:
            return None
        length = cache_length(cache)
        return length if length is not None and 0 < length < group.end else None


def _parent(mark: Mark, cache: Any, start: int | None, batch: int) -> Parent | None:
    """What a call of `batch` rows from column `start` on continues; None if the cache contains something else."""
    group = mark.group
    calls = len(group.calls) if mark.calls is None else mark.calls
    prints = group.prints if mark.calls is None else mark.prints
    columns = group.end if start is None else start
    rows = _rows(prints, _prints(cache, columns), batch, group.rows)
    return None if rows is None else Parent(group, calls, rows, columns)


def _rows(
    old: tuple[int, Tensor] | None, new: tuple[int, Tensor] | None, batch: int, before: int
) -> tuple[int, ...] | None:
    """For each row of a cache, the earlier row that it was; None if one of them is not found."""
    same = tuple(range(batch)) if batch == before else None
    if old is None or new is None or new[1].shape[0] != batch:
        return same
    begin = max(old[0], new[0])
    end = min(old[0] + old[1].shape[1], new[0] + new[1].shape[1])
    if begin >= end:
        return same
    was, now = old[1][:, begin - old[0] : end - old[0]], new[1][:, begin - new[0] : end - new[0]]
    if was.device != now.device or was.dtype != now.dtype:
        return same
    if same is not None and torch.equal(was, now):
        return same
    equal = (now[:, None] == was[None]).flatten(2).all(2).to("cpu")  # [rows now, rows then]
    if not bool(equal.any(1).all()):
        return None
    # among several rows with the same history prefer the same index, else the first
    own = torch.arange(batch)
    first = equal.int().argmax(1)
    stays = equal[own, own.clamp(max=before - 1)] & (own < before)
    return tuple(torch.where(stays, own, first).tolist())


def _prints(cache: Any, end: int) -> tuple[int, Tensor] | None:
    """(first column, [B, columns, dimensions]) of the keys of the last columns up to `end`, or of recurrent states,
    from the last layer that has them; None for other kinds of cache."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in reversed(getattr(cache, "layers", None) or ()):
        keys, kind = getattr(layer, "keys", None), type(layer).__name__
        if isinstance(keys, Tensor) and keys.dim() == 4 and "Quant" not in kind:
            if keys.shape[2] > end:  # it has spare room
                keys = keys[:, :, :end]
            kept = keys[:, 0, -COLUMNS:, :DIMENSIONS].detach().clone()
            return end - kept.shape[1], kept
        states = getattr(layer, "recurrent_states", None) or getattr(layer, "conv_states", None)
        state = states.get(0) if keys is None and isinstance(states, Mapping) else None
        if isinstance(state, Tensor):
            return end - 1, state.flatten(1)[:, None, : COLUMNS * DIMENSIONS].detach().clone()
    return None


def open_call(
    ledger: Ledger, index: int, opener: nn.Module, given: Mapping[str, Any], generation: Generation | None
) -> Call:
    """A call, from the arguments of the model's forward.  AttachError if there are neither ids nor embeddings."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    leading = ids if ids is not None else embeds
    if not isinstance(leading, Tensor) or leading.dim() < 2:
        raise AttachError(f"{type(opener).__name__}: expected a call with input_ids or inputs_embeds")
    batch, length = leading.shape[:2]
    cache = cache_of(given)
    start = _start(given, cache, length)
    group = ledger.group(cache, generation, start, batch, length)
    if start is None:
        start = group.end
    call = Call(index, group, batch, length, start, None, None, leading.device, opener)
    if ids is not None:
        there = ids.dtype == torch.int64 and ids.device.type == "cpu"
        call.ids = ids if there else ids.to("cpu", torch.int64)
    mask = given.get("attention_mask")
    call.valid = masks.padding(mask, call)
    if start and ledger.keep and not group.calls:
        group.given = masks.before(mask, call)
    return call


def _start(given: Mapping[str, Any], cache: Any, length: int) -> int | None:
    """The first column of a call; None if only its history can tell."""
    position = given.get("cache_position")
    if isinstance(position, Tensor) and position.numel() == length:
        return int(position[0])
    return cache_length(cache)
