"""Preference pairs: a prompt, the preferred answer and the rejected one, and the same answers in other contexts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemmascope_fast.analysis.extraction.sources import json_lines, text
from gemmascope_fast.analysis.extraction.texts import Answer

# own: under its prompt; other: under another pair's prompt; none: the answer alone; plain: under its prompt, without
# lists, headings and markdown; equal length: under its prompt, both answers cut to the words of the shorter one
CONTEXTS = ("own", "other", "none", "plain", "equal length")
Texts = list[str | Answer]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; prompt None if the file has none."""

    prompt: str | None
    chosen: str
    rejected: str


def load_pairs(path: Path) -> list[Pair]:
    """Read JSON lines of chosen, rejected and optionally prompt.  ValueError naming the line of an invalid record, or
    for fewer than three pairs."""
    found = []
    for number, value in json_lines(path):
        where = f"{path}, line {number}"
        chosen, rejected = (text(value, name, where) for name in ("chosen", "rejected"))
        if not chosen or not rejected:
            raise ValueError(f"{where}: expected two answers, got an empty one")
        prompt = None if value.get("prompt") is None else text(value, "prompt", where)
        found.append(Pair(prompt or None, chosen, rejected))
    if len(found) < 3:
        raise ValueError(f"--pairs {path}: expected at least three pairs, got {len(found)}")
    return found


def answers(pairs: Sequence[Pair], context: str | None = None) -> tuple[Texts, Texts]:
    """(preferred answers, rejected ones) as the model reads them.

    context: one of `CONTEXTS`; None: under the prompt where a pair has one.  ValueError for a context that needs
    prompts which the pairs do not have.
    """
    if context is not None and context not in CONTEXTS:
        raise ValueError(f"context: expected one of {', '.join(CONTEXTS)}, got {context!r}")
    prompts: list[str | None] = [pair.prompt for pair in pairs]
    if context == "none":
        prompts = [None] * len(pairs)
    elif context is not None and None in prompts:
        raise ValueError(f"--contexts: expected a prompt in every pair, got none in pair {prompts.index(None) + 1}")
    if context == "other":
        prompts = _others([pair.prompt or "" for pair in pairs])
    both = [(pair.chosen, pair.rejected) for pair in pairs]
    if context == "plain":
        both = [(without_format(a), without_format(b)) for a, b in both]
    if context == "equal length":
        both = [_cut(a, b) for a, b in both]
    return tuple([_under(p, pair[side]) for p, pair in zip(prompts, both, strict=True)] for side in (0, 1))  # type: ignore[return-value]


def _under(prompt: str | None, answer: str) -> str | Answer:
    return answer if prompt is None else Answer(prompt, answer)


def _others(prompts: Sequence[str]) -> list[str | None]:
    """For each prompt the next one that differs."""
    if len(set(prompts)) < 2:
        raise ValueError("--contexts: expected pairs with different prompts, got one prompt in all of them")
    n = len(prompts)
    return [next(prompts[(i + k) % n] for k in range(1, n) if prompts[(i + k) % n] != p) for i, p in enumerate(prompts)]


def without_format(answer: str) -> str:
    """The words of an answer in one paragraph: no list marks, headings, emphasis, code fences or line breaks."""
    lines = [line for line in answer.split("\n") if not line.lstrip().startswith("```")]
    bare = [re.sub(r"^\s*(?:[-*•]|\d+[.)]|#{1,6})\s+", "", line) for line in lines]
    return " ".join(re.sub(r"\*\*|`", "", " ".join(bare)).split())


def _cut(a: str, b: str) -> tuple[str, str]:
    """Both answers, the longer one cut after as many words as the shorter one has."""
    words = min(len(a.split()), len(b.split()))
    return _first_words(a, words), _first_words(b, words)


def _first_words(answer: str, count: int) -> str:
    ends = [match.end() for match in re.finditer(r"\S+", answer)]
    return answer[: ends[count - 1]]
