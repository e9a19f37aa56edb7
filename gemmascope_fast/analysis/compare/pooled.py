"""One sparse row of features per text, for any number of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    from scipy.sparse import csr_array

    ((key, sae),) = sites.items()
    indices, values, counts, tokens = [], [], [0], []
    for number, (ids, rows) in enumerate(read_texts(model, tokenizer, sites, texts, **options), 1):
        if not rows or not rows[key].n_rows:
            raise ValueError(f"text {number}: expected at least one token that is not special")
        features, each = pool(rows[key], how)
        indices.append(features)
        values.append(each)
        counts.append(counts[-1] + len(features))
        tokens.append(len(ids))
    empty = np.empty(0)
    data = (np.concatenate([empty, *values]), np.concatenate([empty, *indices]).astype(np.int64), np.array(counts))
    return csr_array(data, shape=(len(tokens), sae.cfg.d_sae)), np.array(tokens)
