"""One sparse row of features per text, for any number of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemmascope_fast.analysis.extraction.texts import read_texts
from gemmascope_fast.ops.latents import SparseLatents

POOLS = ("mean", "max", "rate")


def pool(latents: SparseLatents, how: str) -> tuple[np.ndarray, np.ndarray]:
    """(features int64 ascending, values fp64) over a text's tokens: the mean activation (0 where it does not fire), the
    maximum, or the share of tokens on which the feature fires."""
    if how not in POOLS:
        raise ValueError(f"--pool: expected one of {', '.join(POOLS)}, got {how!r}")
    features, at = np.unique(latents.col_indices.numpy().astype(np.int64), return_inverse=True)
    values = latents.values.double().numpy()
    out = np.zeros(len(features))
    if how == "max":
        np.maximum.at(out, at, values)
    else:
        np.add.at(out, at, values if how == "mean" else (values != 0).astype(float))
        out /= max(latents.n_rows, 1)
    return features, out


def pooled(
    model: Any, tokenizer: Any, sites: Mapping[Any, Any], texts: Iterable[str], how: str = "mean", **options: Any
) -> tuple[Any, np.ndarray]:
    """(scipy.sparse.csr_array [texts, d_sae], tokens of each text).  Memory: one entry per text and feature that fired.

    sites: one key and its SAE.  options: those of `read_texts`.  ValueError for a text without content tokens.
    """
    ((key, sae),) = sites.items()
    found, tokens = [], []
    for number, (ids, rows) in enumerate(read_texts(model, tokenizer, sites, texts, **options), 1):
        if not rows or not rows[key].n_rows:
            raise ValueError(f"text {number}: expected at least one token besides the special ones")
        found.append(pool(rows[key], how))
        tokens.append(len(ids))
    return of_rows(found, sae.cfg.d_sae), np.array(tokens)


def of_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], d_sae: int) -> Any:
    """scipy.sparse.csr_array [rows, d_sae] of the features and values of each row."""
    from scipy.sparse import csr_array

    features, values = (np.concatenate([np.empty(0), *(row[i] for row in rows)]) for i in (0, 1))
    offsets = np.cumsum([0, *(len(row[0]) for row in rows)])
    return csr_array((values, features.astype(np.int64), offsets), shape=(len(rows), d_sae))
