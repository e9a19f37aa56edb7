"""Compares two models on the same text: aligns tokens by their characters, and matches features that fire together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gemmascope_fast.analysis.compare.sets import times_fired
from gemmascope_fast.analysis.extraction.texts import read_texts
from gemmascope_fast.ops.latents import SparseLatents

BLOCK = 1024  # features of one side at a time: 1024 × 16,384 counts take 134 MB


def token_ends(tokenizer: Any, text: str) -> np.ndarray:
    """int64 [tokens]: the character after each token (without special tokens).  ValueError for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__}: expected a fast tokenizer, which gives token positions")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return np.array([end for _, end in found], np.int64)


def common_spans(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(span of each token of a, span of each of b, count): the smallest spans whose ends are token ends on both sides.

    a, b: ends of tokens in characters.  Tokens after the last common end (remaining white space, bytes of one
    character) belong to the last span.
    """
    ends = np.intersect1d(a, b)
    if not len(ends):
        return np.zeros(len(a), np.int64), np.zeros(len(b), np.int64), 1 if len(a) or len(b) else 0
    return (
        np.searchsorted(ends, a).clip(max=len(ends) - 1),
        np.searchsorted(ends, b).clip(max=len(ends) - 1),
        len(ends),
    )


def by_span(latents: SparseLatents, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(span, feature, value): the largest value of each feature in each span, from latents of the tokens that `spans`
    refers to."""
    rows = spans[latents.row_indices().numpy()]
    features = latents.col_indices.numpy().astype(np.int64)
    key = rows * latents.d_sae + features
    own, at = np.unique(key, return_inverse=True)
    values = np.full(len(own), -np.inf)
    np.maximum.at(values, at, latents.values.double().numpy())
    return own // latents.d_sae, own % latents.d_sae, values


class Side:
    """One model's features on the common spans, collected text by text."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def matrix(self, spans: int) -> Any:
        """scipy.sparse.csc_array fp64 [spans, d_sae]."""
        from scipy.sparse import coo_array

        # a text without tokens on this side adds nothing
        empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        rows, columns, values = (np.concatenate(p) for p in zip(empty, *self.parts, strict=True))
        return coo_array((values, (rows, columns)), shape=(spans, self.d_sae)).tocsc()


def gather(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any], texts: Sequence[str], **options: Any) -> tuple[Any, Any]:
    """csc_array [spans, d_sae] of both sides, over all texts.  a, b: (model, tokenizer, sites with one SAE).

    ValueError for a text that contains a special token, because its rows could not be identified.
    """
    sides = [Side(next(iter(sites.values())).cfg.d_sae) for _, _, sites in (a, b)]
    read = [read_texts(model, tokenizer, sites, texts, **options) for model, tokenizer, sites in (a, b)]
    total = 0
    for text, *found in zip(texts, *read, strict=True):
        ends = [token_ends(tokenizer, text) for _, tokenizer, _ in (a, b)]
        *spans, count = common_spans(*ends)
        for side, own, (_, _, sites), (ids, rows) in zip(sides, spans, (a, b), found, strict=True):
            if not rows:
                continue
            latents = rows[next(iter(sites))]
            if latents.n_rows != len(ids):
                raise ValueError(f"text {text!r:.40}: expected no special tokens within the text")
            at, feature, value = by_span(latents, own)
            side.parts.append((at + total, feature, value))
        total += count
    if not total:
        raise ValueError("--text: expected at least one token")
    return sides[0].matrix(total), sides[1].matrix(total)


def phi(a: Any, b: Any) -> Iterable[tuple[int, np.ndarray]]:
    """(first feature, correlations [block, F_b]) of whether features fire, from csc_array [spans, F]:
    (n·ab - a·b) / sqrt(a(n - a)·b(n - b)); 0 if one of them never or always fires."""
    n = a.shape[0]
    on_a, on_b = (a != 0).astype(np.float64), (b != 0).astype(np.float64)
    count_a, count_b = on_a.sum(0), on_b.sum(0)
    for start in range(0, a.shape[1], BLOCK):
        own = count_a[start : start + BLOCK, None]
        both = (on_a[:, start : start + BLOCK].T @ on_b).toarray()
        scale = np.sqrt(own * (n - own) * (count_b * (n - count_b)))
        yield start, np.divide(n * both - own * count_b, scale, out=np.zeros_like(both), where=scale > 0)


def matched_features(a: Any, b: Any) -> dict[str, np.ndarray]:
    """For each feature of a: the feature of b with the most similar firing, their correlation, and the reverse.

    match, correlation [F_a]; back, back_correlation [F_b] (-1 and 0 if nothing correlates); own [min(F_a, F_b)], the
    correlation with the feature of the same index.
    """
    fa, fb = a.shape[1], b.shape[1]
    match, best = np.full(fa, -1), np.zeros(fa)
    back, back_best = np.full(fb, -1), np.zeros(fb)
    same = []
    for start, block in phi(a, b):
        own = slice(start, start + block.shape[0])
        match[own], best[own] = block.argmax(1), block.max(1)
        same.append(np.diagonal(block, start))
        column, highest = block.argmax(0), block.max(0)
        better = highest > back_best
        back[better], back_best[better] = column[better] + start, highest[better]
    match[best <= 0], best[best <= 0] = -1, 0
    found = {"match": match, "correlation": best, "back": back, "back_correlation": back_best}
    return found | {"own": np.concatenate(same)}


LEAST = 3  # minimum number of spans: on one or two spans, many features agree by chance


def matches(a: Any, b: Any, *, least: int = LEAST) -> list[dict[str, Any]]:
    """For each feature of a that fires on at least `least` spans, the feature of b with the most similar firing, if
    there is any; most similar first."""
    found = matched_features(a, b)
    fired_a, fired_b = times_fired(a), times_fired(b)
    records = [
        {"feature": f, "match": m, "fired_a": int(fired_a[f]), "fired_b": int(fired_b[m]),
         "match_correlation": float(found["correlation"][f])}
        for f, m in enumerate(found["match"].tolist())
        if m >= 0 and fired_a[f] >= least
    ]  # fmt: skip
    return sorted(records, key=lambda r: (-r["match_correlation"], -r["fired_a"], r["feature"]))


def changes(a: Any, b: Any, *, same: float = 0.5, least: int = LEAST) -> list[dict[str, Any]]:
    """How each feature changed that fires on at least `least` spans on either side, if both sides use one SAE.

    kept: correlates with itself by `same` or more; moved: another feature of b does so instead; lost, gained: neither,
    and it fires at least twice as often in a or in b; changed: neither, and about as often.  Most changed first.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected one SAE on both sides, got {a.shape[1]} and {b.shape[1]} features")
    found = matched_features(a, b)
    own = found["own"]
    fired = [times_fired(x) for x in (a, b)]
    records = []
    for f in np.nonzero(np.maximum(*fired) >= least)[0].tolist():
        na, nb = int(fired[0][f]), int(fired[1][f])
        if own[f] >= same:
            what = "kept"
        elif found["correlation"][f] >= same:
            what = "moved"
        else:
            what = "lost" if na >= 2 * nb else "gained" if nb >= 2 * na else "changed"
        records.append(
            {"feature": f, "what": what, "fired_a": na, "fired_b": nb, "correlation": float(own[f]),
             "match": int(found["match"][f]), "match_correlation": float(found["correlation"][f])}
        )  # fmt: skip
    return sorted(records, key=lambda r: (r["correlation"], -r["fired_a"] - r["fired_b"], r["feature"]))
