"""The special tokens that a text is read with."""

from __future__ import annotations

from typing import Any

import torch


def opening(tokenizer: Any) -> list[int]:
    """Special tokens at the beginning of a text for a language model: only BOS; empty if there is none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def ends(tokenizer: Any) -> tuple[int | None, int | None]:
    """(special tokens at the beginning of a window, those at its end): only BOS, or for encoders CLS and SEP; None if
    there are none."""
    if tokenizer.bos_token_id is not None or getattr(tokenizer, "cls_token_id", None) is None:
        return tokenizer.bos_token_id, None
    return tokenizer.cls_token_id, tokenizer.sep_token_id


def device_of(model: Any) -> torch.device:
    """The device of the model's first weights, to which its token ids must be moved."""
    return next(model.parameters()).device


def room(model: Any, tokenizer: Any) -> int | None:
    """How many content tokens the model reads at once, after those at the beginning; None if its configuration sets no
    limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit) - len(opening(tokenizer))
