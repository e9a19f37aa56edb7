"""Selects the rows of a call that are read and changed: `tokens` of `attach`, and positions of edits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.masks import documents
from gemmascope_fast.errors import AttachError

# <start_of_turn>; a chat begins <bos><start_of_turn>user\n, which Gemma Scope's instruction-tuned SAEs exclude
_START_OF_TURN = {"gemma": 106, "gemma2": 106, "gemma3": 105, "gemma3_text": 105}
CHAT_PREFIX = 4
FEW = 64  # up to this many rows, comparing as Python numbers takes 2 µs, as tensors 15

Selection = str | Tensor | Callable[..., Tensor]


def check_selection(tokens: Any) -> None:
    """Raise TypeError or ValueError for an argument that cannot select rows."""
    if isinstance(tokens, str):
        if tokens not in ("all", "content"):
            raise ValueError(f"tokens: expected 'all', 'content', a bool tensor or a callable, got {tokens!r}")
    elif isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool or tokens.dim() not in (1, 2):
            raise TypeError(f"tokens: expected a bool tensor [S] or [B, S], got {tokens.dtype} {tuple(tokens.shape)}")
    elif not callable(tokens):
        raise TypeError(f"tokens: expected 'all', 'content', a bool tensor or a callable, got {type(tokens).__name__}")


class Selector:
    """Selected rows of each call, as a bool tensor [B * S] on the CPU, or None for all."""

    def __init__(self, tokens: Selection, model: nn.Module) -> None:
        check_selection(tokens)
        self.tokens = tokens
        self.special, bos, self.turn = _special_ids(model)
        self.bos, self.specials = torch.tensor(bos, dtype=torch.int64), frozenset(self.special.tolist())
        self.wants_rows = callable(tokens) and not isinstance(tokens, Tensor) and _takes_two(tokens)

    def __call__(self, call: Call, given: Mapping[str, Any] | None = None) -> Tensor | None:
        """given: the arguments of the call, by name."""
        chosen = self._chosen(call, given or {})
        return None if chosen is None or bool(chosen.all()) else chosen.reshape(-1)

    def _chosen(self, call: Call, given: Mapping[str, Any]) -> Tensor | None:
        if isinstance(self.tokens, str):
            return None if self.tokens == "all" else self._content(call, given)
        if isinstance(self.tokens, Tensor):
            return by_mask(self.tokens, call, "tokens")
        rows = call.tokens()
        chosen = self.tokens(rows.token_id, rows) if self.wants_rows else self.tokens(rows.token_id)
        return checked(chosen, call, "tokens")

    def _content(self, call: Call, given: Mapping[str, Any]) -> Tensor | None:
        if call.ids is None:
            raise AttachError(
                "tokens: 'content' (the default) needs input_ids to find special tokens, and the model was called with"
                " inputs_embeds only; pass tokens='all', a bool tensor or a callable"
            )
        if call.n_rows <= FEW and call.valid is None and self.specials.isdisjoint(call.ids.reshape(-1).tolist()):
            heads = call.group.heads or ()
            if all(not head or (len(head) == CHAT_PREFIX and head[-1] < call.start) for head in heads):
                return None
        chosen = ~torch.isin(call.ids, self.special)
        if call.valid is not None:
            chosen &= call.valid
        if self.turn is not None:
            chosen &= ~self._chat_prefix(call, given)
        return chosen

    def _chat_prefix(self, call: Call, given: Mapping[str, Any]) -> Tensor:
        """bool [B, S]: the three tokens after each <bos> that begins a chat, however the sequence was split into calls.

        A row may contain several chats, in packed documents.
        """
        assert call.ids is not None
        found = torch.zeros(call.batch, call.length, dtype=torch.bool)
        group = call.group
        if group.heads is None:
            group.heads = [[] for _ in range(call.batch)]
        opens = torch.isin(call.ids, self.bos)
        if call.valid is not None:
            opens &= call.valid
        begins: Tensor | None = None
        for row, (head, any_opens) in enumerate(zip(group.heads, opens.any(1).tolist(), strict=True)):
            head[:] = [column for column in head if column < call.start]  # later columns were removed
            if any_opens or 0 < len(head) < CHAT_PREFIX:
                begins = documents(given, call) if begins is None else begins
                self._follow(call, row, head, opens[row].tolist(), begins[row].tolist(), found[row])
        return found

    def _follow(
        self, call: Call, row: int, head: list[int], opens: list[bool], begins: list[bool], found: Tensor
    ) -> None:
        """Mark a row's prefixes in `found` [S].  head: columns of the most recent prefix, its <bos> first."""
        assert call.ids is not None
        ids = call.ids[row].tolist()
        valid = [True] * call.length if call.valid is None else call.valid[row].tolist()
        at = 0
        while at < call.length:
            if not 0 < len(head) < CHAT_PREFIX:  # no prefix has begun: go to the next <bos>
                if True not in opens[at:]:
                    return
                at = opens.index(True, at)
                head[:] = [call.start + at]
            elif not valid[at]:
                pass
            elif opens[at] or begins[at] or (len(head) == 1 and ids[at] != self.turn):
                head.clear()
                continue
            else:
                head.append(call.start + at)
                found[at] = True
            at += 1


def by_mask(mask: Tensor, call: Call, name: str) -> Tensor:
    """bool [B, S] from a mask [columns] or [B, columns] of whole sequences.

    It must cover a sequence's first call; tokens generated beyond its end are not selected.
    """
    mask = mask.detach().to("cpu")
    full = mask[None].expand(call.batch, -1) if mask.dim() == 1 else mask
    if full.shape[0] != call.batch:
        if call.batch % full.shape[0] or call.group.generation is None:
            raise AttachError(f"{name}: expected a mask of {call.batch} sequences, got {tuple(mask.shape)}")
        full = full.repeat_interleave(call.batch // full.shape[0], dim=0)
    end = call.start + call.length
    if full.shape[1] < end and call.start == call.group.first and call.group.generation is None:
        raise AttachError(f"{name}: expected a mask of at least {end} columns, got {tuple(mask.shape)}")
    chosen = torch.zeros(call.batch, call.length, dtype=torch.bool)
    own = full[:, call.start : end]
    chosen[:, : own.shape[1]] = own
    return chosen


def checked(chosen: Any, call: Call, name: str) -> Tensor:
    """The result of a callable, as bool [B, S]."""
    shape = (call.batch, call.length)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.numel() != call.n_rows:
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise AttachError(f"{name}: expected the callable to return a bool tensor {shape}, got {got}")
    return chosen.detach().to("cpu").reshape(shape)


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return len(required) >= 2


def _special_ids(model: nn.Module) -> tuple[Tensor, tuple[int, ...], int | None]:
    """(ids of BOS, EOS and PAD, ids of BOS only, id that begins a chat turn) from the model's configurations."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[str, set[int]] = {"bos": set(), "eos": set(), "pad": set()}
    for source in (config, text, getattr(model, "generation_config", None)):
        for name, ids in found.items():
            value = getattr(source, f"{name}_token_id", None)
            if value is None:
                continue
            ids.update(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
    special = torch.tensor(sorted(set().union(*found.values())), dtype=torch.int64)
    return special, tuple(found["bos"]), _START_OF_TURN.get(getattr(text, "model_type", ""))
