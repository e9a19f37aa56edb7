"""Collects what a dashboard shows, in two passes over the shards, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from gemmascope_fast.analysis.extraction.store import Store, StoreError
from gemmascope_fast.files.atomic import replacing, saying_where
from gemmascope_fast.files.identity import digest_of

BINS = 24
SEGMENT = 32  # tokens of a document that count as one place: only the strongest of nearby tokens is shown


@dataclass
class Collected:
    """For each of F features: number of tokens it fired on; sum and maximum of its values; a histogram of BINS equal
    bins from 0 to the maximum; its k strongest contexts, strongest first.

    fired int64 [F], total float64 [F], max float32 [F], histogram int64 [F, BINS]; value float32 [F, k] (-inf if fewer
    fired), document int64 and position int32 [F, k]; ids int32 [F, k, left + 1 + right] (-1 outside the document),
    acts float32 of the same shape: the feature's value on each of these tokens; the token at which it was strongest is
    at index `left`.
    """

    fired: np.ndarray
    total: np.ndarray
    max: np.ndarray
    histogram: np.ndarray
    value: np.ndarray
    document: np.ndarray
    position: np.ndarray
    ids: np.ndarray
    acts: np.ndarray
    left: int

    @classmethod
    def empty(cls, features: int, k: int, left: int, right: int) -> Collected:
        width = left + 1 + right
        return cls(
            fired=np.zeros(features, np.int64),
            total=np.zeros(features),
            max=np.zeros(features, np.float32),
            histogram=np.zeros((features, BINS), np.int64),
            value=np.full((features, k), -np.inf, np.float32),
            document=np.full((features, k), -1, np.int64),
            position=np.zeros((features, k), np.int32),
            ids=np.full((features, k, width), -1, np.int32),
            acts=np.zeros((features, k, width), np.float32),
            left=left,
        )

    def save(self, path: Path, key: str) -> None:
        """Write the file atomically; `load` needs the same key."""
        with saying_where(path), replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.array(key), **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path, key: str) -> Collected | None:
        """Read what `save` wrote with this key; None if the key differs or the file is damaged or missing."""
        try:
            with np.load(path, allow_pickle=False) as found:
                if str(found["key"]) != key:
                    return None
                arrays = {f.name: found[f.name] for f in fields(cls) if f.name != "left"}
                return cls(**arrays, left=int(found["left"]))
        except (OSError, ValueError, KeyError, BadZipFile):
            return None


def collect(
    store: Store,
    *,
    k: int = 20,
    left: int = 24,
    right: int = 12,
    progress: Callable[[], None] = lambda: None,
    cache: Path | None = None,
) -> Collected:
    """Make two passes over the shards (progress is called for each shard in each); `cache`: a file to keep the result.

    left, right: tokens shown before and after the one that fired.  Raises ValueError for invalid sizes, and StoreError
    for latents that are NaN or infinite, because a histogram has no bin for them.
    """
    if k < 1 or left < 0 or right < 0:
        raise ValueError(f"expected k of at least 1 and no negative width, got k {k}, left {left}, right {right}")
    key = f"2 {k} {left} {right} {store.d_sae} {_journal(store)}"
    known = None if cache is None else Collected.load(cache, key)
    if known is not None:
        return known
    found = Collected.empty(store.d_sae, k, left, right)
    for shard in range(len(store.shards)):
        rows = store.read("latents", shard, ["document", "position", "feature", "value"])
        _check_finite(store.path("latents", shard), rows)
        _first_pass(found, rows)
        progress()
    for shard in range(len(store.shards)):
        tokens = store.read("tokens", shard, ["document", "position", "token_id"])
        _second_pass(found, tokens, store.read("latents", shard, ["document", "position", "feature", "value"]))
        progress()
    if cache is not None:
        found.save(cache, key)
    return found


def _journal(store: Store) -> str:
    """Identifies the shards; a text without tokens has none."""
    path = store.folder / "shards.jsonl"
    return digest_of(path) if path.exists() else ""


def _check_finite(path: Path, rows: dict[str, np.ndarray]) -> None:
    wrong = np.nonzero(~np.isfinite(rows["value"]))[0]
    if len(wrong):
        at = {name: column[wrong[0]] for name, column in rows.items()}
        raise StoreError(
            f"{path}: expected finite latents, got {len(wrong)} that are not: {at['value']} for feature"
            f" {at['feature']} in document {at['document']} at position {at['position']}; the model's activations were"
            " not finite there"
        )


def _first_pass(found: Collected, rows: dict[str, np.ndarray]) -> None:
    feature, value = rows["feature"], rows["value"]
    features, k = found.value.shape
    found.fired += np.bincount(feature, minlength=features)
    found.total += np.bincount(feature, weights=value, minlength=features)
    np.maximum.at(found.max, feature, value)
    # ties keep the earlier one; most rows are no longer candidates after the first shards
    strong = value > found.value[feature, -1]
    feature, value = feature[strong], value[strong]
    document, position = rows["document"][strong], rows["position"][strong]
    # the strongest of each place
    place = document * ((1 << 31) // SEGMENT) + position // SEGMENT
    order = np.lexsort((-value, place, feature))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(feature[order]) != 0) | (np.diff(place[order]) != 0)
    order = np.sort(order[new])
    order = order[np.lexsort((-value[order], feature[order]))]
    feature, value, document, position = feature[order], value[order], document[order], position[order]
    own, starts, counts = np.unique(feature, return_index=True, return_counts=True)
    rank = np.arange(len(feature)) - np.repeat(starts, counts)
    kept = rank < k
    at, rank = np.repeat(np.arange(len(own)), counts)[kept], rank[kept]
    fresh = np.full((len(own), k), -np.inf, np.float32)
    fresh[at, rank] = value[kept]
    pick = np.argsort(-np.concatenate([found.value[own], fresh], 1), axis=1, kind="stable")[:, :k]
    for name, chosen in (("value", value), ("document", document), ("position", position)):
        stored = getattr(found, name)
        held = np.full((len(own), k), -np.inf if name == "value" else -1, stored.dtype)
        held[at, rank] = chosen[kept]
        stored[own] = np.take_along_axis(np.concatenate([stored[own], held], 1), pick, axis=1)


def _second_pass(found: Collected, tokens: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> None:
    features, width = found.max.shape[0], found.ids.shape[2]
    feature, value = rows["feature"], rows["value"]
    bins = (value * (BINS / found.max[feature])).astype(np.int64).clip(0, BINS - 1)
    found.histogram += np.bincount(feature * np.int64(BINS) + bins, minlength=features * BINS).reshape(-1, BINS)
    if not len(tokens["document"]):
        return
    first, last = tokens["document"][0], tokens["document"][-1]
    at, rank = np.nonzero((found.document >= first) & (found.document <= last))
    if not len(at):
        return
    document = np.repeat(found.document[at, rank][:, None], width, 1)
    position = found.position[at, rank][:, None] + np.arange(width) - found.left
    row = _rows_of(tokens, document, position)
    here = row >= 0
    f, r, w = (np.broadcast_to(i, here.shape)[here] for i in (at[:, None], rank[:, None], np.arange(width)[None]))
    found.ids[f, r, w] = tokens["token_id"][row[here]]
    own = _rows_of(tokens, rows["document"], rows["position"]) * features + feature  # ascending, as the rows are
    wanted = row[here] * features + f
    slot = np.searchsorted(own, wanted).clip(max=max(len(own) - 1, 0))
    hit = own[slot] == wanted if len(own) else np.zeros(len(wanted), bool)
    found.acts[f[hit], r[hit], w[hit]] = value[slot[hit]]


def _rows_of(tokens: dict[str, np.ndarray], document: np.ndarray, position: np.ndarray) -> np.ndarray:
    """int64 row of each (document, position) in a shard's tokens, whose positions increase by one; -1 if missing."""
    start = np.searchsorted(tokens["document"], document)
    inside = start < len(tokens["document"])
    start = start.clip(max=len(tokens["document"]) - 1)
    row = start + position.astype(np.int64) - tokens["position"][start]
    inside &= (row >= start) & (row < len(tokens["document"])) & (position >= 0)
    row = row.clip(0, len(tokens["document"]) - 1)
    return np.where(inside & (tokens["document"][row] == document), row, -1)
