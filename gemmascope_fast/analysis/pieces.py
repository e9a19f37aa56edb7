"""Converts tokens to text that can be shown piece by piece, in any script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

LOST = "\ufffd"  # result of decoding bytes that are not a whole character


class Span(NamedTuple):
    """A piece of text that can be shown separately, and the indices of its tokens."""

    text: str
    tokens: list[int]


class Pieces:
    """Decodes token by token, for one tokenizer.

    A token may contain part of a character's bytes, or a vowel sign that belongs to the letter in the token before
    (Devanagari). Such tokens share one span, because separately they could not be displayed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # put before everything that is decoded, because tokenizers drop a space at the beginning
        (*_, self._anchor) = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._start = tokenizer.decode([self._anchor])
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The text of one token; the replacement character if it is part of a character."""
        if token_id not in self._known:
            self._known[token_id] = self._decode([token_id])
        return self._known[token_id]

    def _decode(self, ids: Sequence[int]) -> str:
        whole = self.tokenizer.decode([self._anchor, *ids], clean_up_tokenization_spaces=False)
        return whole[len(self._start) :]

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """The text of consecutive tokens, cut only between grapheme clusters."""
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
    """Merge neighbours that share a grapheme cluster."""
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
