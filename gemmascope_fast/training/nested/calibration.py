"""Windows of text for calibrating and measuring: the user's text, Python's help topics, and text the model writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.training.text import pydoc_topics

WINDOW = 256  # BOS and 255 tokens of text


def windows(tokenizer: Any, text: str) -> Tensor:
    """Text → int64 [n, 256]: BOS and 255 tokens each; a remainder at the end is dropped."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    count = ids.numel() // (WINDOW - 1)
    body = ids[: count * (WINDOW - 1)].reshape(count, WINDOW - 1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), body], 1)


def python_topics(tokenizer: Any) -> Tensor:
    """Windows of `pydoc_data.topics`, English text in every Python: calibrate on the first, measure on the last."""
    return windows(tokenizer, pydoc_topics())


@torch.no_grad()
def sampled(
    model: nn.Module,
    bos: int,
    count: int,
    *,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[..., Any] | None = None,
) -> Tensor:
    """int64 [count, 256]: BOS and 255 tokens sampled from the model's own distribution, at temperature 1.

    This gives text of all that the model has learned, without a data set (LLM-QAT, Liu et al. 2023).  The end-of-text
    token is never sampled, so every window is full.
    """
    draw = _Draw(torch.Generator().manual_seed(seed))
    found = []
    starts = range(0, count, batch)
    for start in progress(starts, desc="sampling") if progress else starts:
        begin = torch.full((min(batch, count - start), 1), bos)
        found.append(
            model.generate(  # type: ignore[operator]
                begin,
                attention_mask=torch.ones_like(begin),
                do_sample=False,  # the processor samples
                logits_processor=[draw],
                min_new_tokens=WINDOW - 1,
                max_new_tokens=WINDOW - 1,
            )
        )
    return torch.cat(found)


class _Draw:
    """A logits processor that leaves one token: inverts the distribution with one random number per row.

    `generate` would draw one number per token of the vocabulary: for 64 rows of 262,144, 1.1 s a step; this takes 0.5.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        below = scores.float().softmax(-1).cumsum_(-1)
        at = torch.rand(scores.shape[0], 1, generator=self.generator) * below[:, -1:]
        # the number is less than 1, but its product may round up to the total
        chosen = torch.searchsorted(below, at, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
