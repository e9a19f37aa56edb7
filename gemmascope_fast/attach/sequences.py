"""From rows in call order to one list of rows per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Generation, Group
from gemmascope_fast.errors import AttachError


class _Table:
    """Of one group, by [sequence, column]: the row that saw it last (-1: none), its id, whether it is valid."""

    def __init__(self, group: Group) -> None:
        columns = max((c.start + c.length for c in group.calls), default=0)
        shape = (group.rows, columns)
        self.row = np.full(shape, -1, dtype=np.int64)
        self.id = np.full(shape, -1, dtype=np.int64)
        self.valid = np.zeros(shape, dtype=bool)
        for call in group.calls:
            at = slice(call.start, call.start + call.length)
            tokens = call.tokens()
            self.row[:, at] = call.offset + np.arange(call.n_rows).reshape(call.batch, call.length)
            self.id[:, at] = tokens.token_id.numpy()
            self.valid[:, at] = tokens.valid.numpy()


def rows_of(groups: Sequence[Group], output: Any = None) -> list[Tensor]:
    """Row numbers (int64) per sequence, padding dropped.  AttachError where that cannot be told."""
    if output is not None:
        groups = [_matching(groups, output)]
    found: list[Tensor] = []
    for group in groups:
        final, beams = _final(group, output)
        if beams is not None:
            assert final is not None
            found += _of_beams(group, final, beams)
        else:
            found += _of_group(group, final)
    return found


def after_eos(generation: Generation) -> Tensor | None:
    """bool [B, L] of a finished generation: True for what stands after a sequence's own EOS; None if unknown."""
    final, prompt = generation.final, generation.prompt
    if final is None or prompt is None or generation.embeds or not generation.eos:
        return None
    ended = torch.isin(final, torch.tensor(generation.eos))
    ended[:, :prompt] = False
    return (ended.cumsum(1) - ended.long()) > 0


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
    """(the returned sequences, the beam indices) of a group; AttachError for a beam search without indices."""
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
                " output_scores=True and give its output, which then has beam_indices"
            )
        return generation.final, beams
    return generation.final, None


def _of_group(group: Group, final: Tensor | None) -> list[Tensor]:
    table = _Table(group)
    keep = table.valid.copy()
    generation = group.generation
    if final is not None and generation is not None:
        shift = group.prompt if generation.embeds else 0
        last = min(shift + final.shape[1] - 1, keep.shape[1])
        keep[:, last:] = False
        after = after_eos(generation)
        if after is not None:
            keep[:, :last] &= ~after[:, :last].numpy()
        known = keep[:, shift:last] & (table.id[:, shift:last] >= 0)
        if (table.id[:, shift:last] != final[:, : last - shift].numpy())[known].any():
            raise AttachError("sequences: the tokens last seen are not those that generate returned")
    return [_picked(table, keep[b], table.row[b], group) for b in range(group.rows)]


def _of_beams(group: Group, final: Tensor, beams: Tensor) -> list[Tensor]:
    """beam_indices[r, i] is the running row whose logits gave sequence r its i-th new token."""
    table, found = _Table(group), []
    prompt = group.prompt
    for r in range(final.shape[0]):
        steps = beams[r][beams[r] >= 0].numpy()
        if not steps.size:
            found.append(torch.empty(0, dtype=torch.int64))
            continue
        columns = np.arange(prompt - 1 + steps.size)
        source = np.concatenate([np.full(prompt - 1, steps[0]), steps])
        found.append(_picked(table, table.valid[source, columns], table.row[source, columns], group))
    return found


def _picked(table: _Table, keep: np.ndarray, row: np.ndarray, group: Group) -> Tensor:
    chosen = row[keep]
    first = int(keep.argmax()) if keep.any() else 0
    if group.first and first >= group.first:
        raise AttachError(f"sequences: the first {group.first} columns were in the cache before this run saw the model")
    return torch.from_numpy(chosen.astype(np.int64))
