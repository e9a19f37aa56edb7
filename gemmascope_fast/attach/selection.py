"""Which rows of a call are read and changed: `tokens` of `attach`, and positions of edits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.errors import AttachError

# <start_of_turn>; a chat begins <bos><start_of_turn>user\n, which Gemma Scope's instruction-tuned SAEs leave out
_START_OF_TURN = {"gemma": 106, "gemma2": 106, "gemma3": 105, "gemma3_text": 105}
CHAT_PREFIX = 4

Selection = str | Tensor | Callable[..., Tensor]


def check_selection(tokens: Any) -> None:
    """Raise TypeError or ValueError for what cannot select rows."""
    if isinstance(tokens, str):
        if tokens not in ("all", "content"):
            raise ValueError(f"tokens: expected 'all', 'content', a bool tensor or a callable, got {tokens!r}")
    elif isinstance(tokens, Tensor):
        if tokens.dtype != torch.bool or tokens.dim() not in (1, 2):
            raise TypeError(f"tokens: expected a bool tensor [S] or [B, S], got {tokens.dtype} {tuple(tokens.shape)}")
    elif not callable(tokens):
        raise TypeError(f"tokens: expected 'all', 'content', a bool tensor or a callable, got {type(tokens).__name__}")


class Selector:
    """Rows of each call, as a bool tensor [B * S] on the CPU, or None for all of them."""

    def __init__(self, tokens: Selection, model: nn.Module) -> None:
        check_selection(tokens)
        self.tokens = tokens
        self.special, self.bos, self.turn = _special_ids(model)
        self.wants_rows = callable(tokens) and not isinstance(tokens, Tensor) and _takes_two(tokens)

    def __call__(self, call: Call) -> Tensor | None:
        if isinstance(self.tokens, str):
            return None if self.tokens == "all" else self._content(call).reshape(-1)
        if isinstance(self.tokens, Tensor):
            return by_mask(self.tokens, call, "tokens").reshape(-1)
        rows = call.tokens()
        chosen = self.tokens(rows.token_id, rows) if self.wants_rows else self.tokens(rows.token_id)
        return checked(chosen, call, "tokens").reshape(-1)

    def _content(self, call: Call) -> Tensor:
        if call.ids is None:
            raise AttachError("tokens: 'content' needs input_ids; the model was called with inputs_embeds alone")
        chosen = ~torch.isin(call.ids, self.special)
        if call.valid is not None:
            chosen &= call.valid
        if self.turn is not None:
            chosen &= ~self._chat_prefix(call)
        return chosen

    def _chat_prefix(self, call: Call) -> Tensor:
        """The first four valid tokens of a sequence that begins <bos><start_of_turn>, however it was chunked."""
        group = call.group
        found = torch.zeros(call.batch, call.length, dtype=torch.bool)
        if group.heads is None:
            group.heads = [[] for _ in range(call.batch)]
        if call.start <= group.first:
            group.heads = [[] for _ in range(call.batch)]
        if all(len(head) >= CHAT_PREFIX for head in group.heads):
            return found
        assert call.ids is not None
        for row, head in enumerate(group.heads):
            for column in range(call.length):
                if len(head) >= CHAT_PREFIX:
                    break
                if call.valid is not None and not bool(call.valid[row, column]):
                    continue
                head.append(int(call.ids[row, column]))
                found[row, column] = len(head) >= 2 and head[0] in self.bos and head[1] == self.turn
        return found


def by_mask(mask: Tensor, call: Call, name: str) -> Tensor:
    """bool [B, S] from a mask [columns] or [B, columns] of whole sequences.

    It must cover a sequence's first call; columns decoded beyond its end are not selected.
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
    """What a callable returned, as bool [B, S]."""
    shape = (call.batch, call.length)
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.numel() != call.n_rows:
        got = f"{chosen.dtype} {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise AttachError(f"{name}: expected the callable to give a bool tensor {shape}, got {got}")
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
    """(ids of BOS, EOS and PAD, ids of BOS alone, id that opens a chat turn) from the model's configurations."""
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
