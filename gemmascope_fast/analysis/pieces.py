"""Tokens as text that can be shown piece by piece, in any script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

LOST = "\ufffd"  # what decoding gives for bytes that are no whole character


class Span(NamedTuple):
    """A stretch of text that can be shown on its own, and the tokens (by index) that it comes from."""

    text: str
    tokens: list[int]


class Pieces:
    """Decoding token by token, for one tokenizer.

    A token may hold part of a character's bytes, or a vowel sign that belongs to the letter of the token before
    (Devanagari): such tokens share one span, for drawn apart they would be neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # in front of everything that is decoded: tokenizers drop a space at the beginning
        (*_, self._anchor) = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._start = tokenizer.decode([self._anchor])
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The text of one token; the replacement character where it holds part of one."""
        if token_id not in self._known:
            self._known[token_id] = self._decode([token_id])
        return self._known[token_id]

    def _decode(self, ids: Sequence[int]) -> str:
        whole = self.tokenizer.decode([self._anchor, *ids], clean_up_tokenization_spaces=False)
        return whole[len(self._start) :]

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """The text of consecutive tokens, cut where it may be cut: between grapheme clusters."""
        whole: list[Span] = []
        at = 0
        while at < len(ids):
            end = at + 1
            text = self(ids[at])
            # a character has at most four bytes, and a token at least one
            while LOST in text and end < min(len(ids), at + 4):
                end += 1
                longer = self._decode(ids[at:end])
                if LOST not in longer:
                    text = longer
                    break
            else:
                end, text = at + 1, self(ids[at])
            whole.append(Span(text, list(range(at, end))))
            at = end
        return _by_cluster(whole)


def _by_cluster(spans: Sequence[Span]) -> list[Span]:
    """Neighbours that share a grapheme cluster become one."""
    import regex

    text = "".join(span.text for span in spans)
    ends = {match.end() for match in regex.finditer(r"\X", text)}
    found: list[Span] = []
    at, is_open = 0, False
    for span in spans:
        at += len(span.text)
        if is_open:
            found[-1] = Span(found[-1].text + span.text, found[-1].tokens + span.tokens)
        else:
            found.append(span)
        is_open = bool(span.text) and at not in ends
    return found
