"""Converts rows in call order to one list of rows per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Call, Generation, Group, Parent
from gemmascope_fast.attach.ledger import Ledger
from gemmascope_fast.errors import AttachError


class _Table:
    """For one group, by [sequence, column]: the last row that had it (-1: none), its id, whether it is valid.

    Columns already in a cache come from the group that it continues, and each call replaces the columns from its first
    one on.
    """

    def __init__(self, group: Group) -> None:
        chain = _lineage(group)
        ends = [call.start + call.length for _, _, calls in chain for call in calls]
        room = max([*ends, *(held.columns for _, held, _ in chain)])
        self.width = 0
        self.row = np.full((chain[0][0].rows, room), -1, dtype=np.int64)
        self.id, self.valid = self.row.copy(), np.ones(self.row.shape, dtype=bool)
        for each, held, calls in chain:
            self._hold(each, held)
            for call in calls:
                self._add(call)
            after = after_eos(each.generation) if each is not group and each.generation is not None else None
            if after is not None:
                width = min(after.shape[1], room)
                self.valid[:, :width] &= ~after[:, :width].numpy()
        self.row, self.id = self.row[:, : self.width], self.id[:, : self.width]
        self.valid = self.valid[:, : self.width]

    def _hold(self, group: Group, held: Parent) -> None:
        """Start with the sequences and columns that the cache had when the group began."""
        rows = list(held.rows)
        self.row, self.id, self.valid = self.row[rows], self.id[rows], self.valid[rows]
        self._go_to(held.columns)
        if group.given is not None:
            width = min(held.columns, group.given.shape[1])
            self.valid[:, :width] = group.given[:, :width].numpy()

    def _go_to(self, column: int) -> None:
        """Columns from this one on were removed; missing ones before it were never seen."""
        if column > self.width:
            self.row[:, self.width : column] = self.id[:, self.width : column] = -1
            self.valid[:, self.width : column] = True
        self.width = column

    def _add(self, call: Call) -> None:
        self._go_to(call.start)
        self.width = call.start + call.length
        at, tokens = slice(call.start, self.width), call.tokens()
        self.row[:, at] = call.offset + np.arange(call.n_rows).reshape(call.batch, call.length)
        self.id[:, at] = tokens.token_id.numpy()
        self.valid[:, at] = tokens.valid.numpy()


def _lineage(group: Group) -> list[tuple[Group, Parent, Sequence[Call]]]:
    """The groups that it continues, first one first, and itself: what the cache had when each began, and its calls."""
    found: list[tuple[Group, Parent, Sequence[Call]]] = []
    calls = len(group.calls)
    while True:
        held = group.parent or Parent(group, 0, tuple(range(group.rows)), group.first)
        found.append((group, held, group.calls[:calls]))
        if group.parent is None:
            return found[::-1]
        group, calls = held.group, held.calls


def rows_of(ledger: Ledger, output: Any = None) -> list[Tensor]:
    """Row numbers (int64) per sequence, without padding.  AttachError if they cannot be determined."""
    if output is None:
        groups = [group for group in ledger.groups if group.calls and not group.continued]
    else:
        groups = [_matching(ledger.groups, output)]
    found: list[Tensor] = []
    for group in groups:
        final, beams = _final(group, output)
        if beams is not None:
            assert final is not None
            found += _of_beams(group, final, beams)
        else:
            columns = ledger.rolled_back_to(group) if group.generation is None else None
            found += _of_group(group, final, columns, output is not None)
    return found


def after_eos(generation: Generation) -> Tensor | None:
    """bool [B, columns] of a finished generation: True for tokens after a sequence's own EOS; None if unknown.

    An EOS in the prompt (chat templates end each turn with one) does not end the sequence.
    """
    final, prompt = generation.final, generation.prompt
    if final is None or prompt is None or not generation.eos:
        return None
    ended = torch.isin(final, torch.tensor(generation.eos))
    ended[:, : max(prompt - generation.offset, 0)] = False
    after = (ended.cumsum(1) - ended.long()) > 0
    return torch.cat([after.new_zeros(after.shape[0], generation.offset), after], 1)


def _matching(groups: Sequence[Group], output: Any) -> Group:
    """The group whose generation returned `output`."""
    sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
    if not isinstance(sequences, Tensor):
        raise AttachError(f"output: expected what generate returned, got {type(output).__name__}")
    known = [g for g in groups if g.generation is not None and g.generation.final is not None]
    for group in known:
        if group.generation.returned() is sequences:  # type: ignore[union-attr]
            return group
    ids = sequences.detach().to("cpu", torch.int64)
    same = [g for g in known if torch.equal(g.generation.final, ids)]  # type: ignore[union-attr,arg-type]
    if len(same) != 1:
        raise AttachError(f"output: {len(same)} generations of this run returned these sequences, expected one")
    return same[0]


def _final(group: Group, output: Any) -> tuple[Tensor | None, Tensor | None]:
    """(the returned sequences, the beam indices) of a group; AttachError for beam search without indices."""
    generation = group.generation
    if generation is None:
        return None, None
    beams = generation.beam_indices
    if beams is None and isinstance(getattr(output, "beam_indices", None), Tensor):
        beams = output.beam_indices.cpu()
    if generation.beams > 1:
        if beams is None or generation.final is None or output is None:
            raise AttachError(
                "sequences: beams change rows between steps; call generate with return_dict_in_generate=True and"
                " output_scores=True and pass its output, which then has beam_indices"
            )
        return generation.final, beams
    return generation.final, None


def _of_group(group: Group, final: Tensor | None, columns: int | None, own: bool) -> list[Tensor]:
    """columns: how many to use, None for all.  own: only those of the sequences that generate returned."""
    table = _Table(group)
    keep = table.valid.copy()
    if columns is not None:
        keep[:, columns:] = False
    generation = group.generation
    if final is not None and generation is not None:
        shift = generation.offset
        last = min(shift + final.shape[1] - 1, keep.shape[1])
        keep[:, last:] = False
        after = after_eos(generation)
        if after is not None:
            keep[:, :last] &= ~after[:, :last].numpy()
        known = keep[:, shift:last] & (table.id[:, shift:last] >= 0)
        if (table.id[:, shift:last] != final[:, : last - shift].numpy())[known].any():
            raise AttachError("sequences: the tokens last seen are not those that generate returned")
        if own and not generation.embeds:
            keep[:, :shift] = False
    return [_picked(group, b, keep[b], table.row[b]) for b in range(group.rows)]


def _of_beams(group: Group, final: Tensor, beams: Tensor) -> list[Tensor]:
    """beam_indices[r, i] is the running row whose logits produced the i-th new token of sequence r."""
    table, found = _Table(group), []
    prompt = group.prompt
    for r in range(final.shape[0]):
        steps = beams[r][beams[r] >= 0].numpy()
        if not steps.size:
            found.append(torch.empty(0, dtype=torch.int64))
            continue
        columns = np.arange(prompt - 1 + steps.size)
        source = np.concatenate([np.full(prompt - 1, steps[0]), steps])
        found.append(_picked(group, r, table.valid[source, columns], table.row[source, columns]))
    return found


def _picked(group: Group, sequence: int, keep: np.ndarray, row: np.ndarray) -> Tensor:
    missing = (keep & (row < 0)).nonzero()[0]
    if missing.size:
        raise AttachError(
            f"sequences: {missing.size} columns were in the cache before this run saw them (or before run.clear):"
            f" positions {_ranges(missing)} of sequence {group.base + sequence}; run.latents has the rows it saw"
        )
    return torch.from_numpy(row[keep].astype(np.int64))


def _ranges(numbers: np.ndarray) -> str:
    """Ascending numbers as text: "0 to 8, 12"."""
    parts = np.split(numbers, (np.diff(numbers) > 1).nonzero()[0] + 1)
    return ", ".join(f"{part[0]} to {part[-1]}" if part.size > 1 else str(part[0]) for part in parts)
