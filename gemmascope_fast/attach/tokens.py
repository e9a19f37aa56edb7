"""The special tokens that a text is read with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def opening(tokenizer: Any) -> list[int]:
    """Special tokens at the beginning of a text for a language model: only BOS; empty if there is none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """(special tokens at the beginning of a window, those at its end): only BOS, or for encoders CLS and SEP; None if
    there are none."""
    if tokenizer.bos_token_id is not None or getattr(tokenizer, "cls_token_id", None) is None:
        return tokenizer.bos_token_id, None
    return tokenizer.cls_token_id, tokenizer.sep_token_id


def framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that every job puts before a text, and those after it: BOS, or for encoders CLS and SEP."""
    first, last = ends(tokenizer)
    return [first] if first is not None else [], [last] if last is not None else []


def content_of(tokenizer: Any) -> str | Callable[..., Tensor]:
    """`tokens` of attach for texts within `framing`.  An encoder's configuration does not name its CLS and SEP, so the
    tokenizer's special tokens are left out there."""
    if not framing(tokenizer)[1]:
        return "content"
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    return lambda ids, rows: rows.valid & ~torch.isin(ids, special)


def device_of(model: Any) -> torch.device:
    """The device of the model's first weights, to which its token ids must be moved."""
    return next(model.parameters()).device


def uncached(model: Any) -> dict[str, bool]:
    """The argument that switches the cache off, of which one forward has no use; some encoders have none."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def room(model: Any, tokenizer: Any) -> int | None:
    """How many content tokens the model reads at once, besides those of `framing`; None if its configuration sets no
    limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit) - sum(map(len, framing(tokenizer)))
