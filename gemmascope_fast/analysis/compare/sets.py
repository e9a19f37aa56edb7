"""Which features differ between two sets of texts: effect sizes, tests, correction for multiple testing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemmascope_fast.errors import require

BLOCK = 512  # features made dense at a time
SHUFFLES = 20  # of a block at once: 20 x 512 x 1,000 texts are 80 MB
Rows = dict[str, np.ndarray]


def compare_sets(
    a: Any, b: Any, *, least: int = 3, test: str = "rank", permutations: int = 2000, seed: int = 0
) -> dict:
    """All features that are not zero in at least `least` texts of either set, largest difference first.

    a, b: csr_array [texts, d_sae].  test "rank": Mann-Whitney U, two-sided, with the correction for ties;
    "permutation": of the absolute difference of means, over `permutations` shuffles of the labels, or over every split
    where there are fewer (scipy.stats.permutation_test).
    Columns: feature, mean_a, mean_b, d (Cohen's, pooled standard deviation), auc (chance that a text of a exceeds one
    of b, ties half), p, q (Benjamini-Hochberg).  ValueError for a set of fewer than two texts.
    """
    from scipy.stats import false_discovery_control, mannwhitneyu, permutation_test

    if min(a.shape[0], b.shape[0]) < 2:
        raise ValueError(f"expected at least two texts in each set, got {a.shape[0]} and {b.shape[0]}")
    if test not in ("rank", "permutation"):
        raise ValueError(f"--test: expected 'rank' or 'permutation', got {test!r}")
    fired = np.maximum(times_fired(a), times_fired(b))
    features = np.nonzero(fired >= least)[0]
    parts: dict[str, list[np.ndarray]] = {k: [] for k in ("mean_a", "mean_b", "d", "auc", "p")}
    for start in range(0, len(features), BLOCK):
        own = features[start : start + BLOCK]
        x, y = a[:, own].toarray(), b[:, own].toarray()
        result = mannwhitneyu(x, y, axis=0, method="asymptotic")
        parts["auc"].append(result.statistic / (len(x) * len(y)))
        if test == "permutation":
            result = permutation_test(
                (x, y), _distance, vectorized=True, n_resamples=permutations, alternative="greater", axis=0,
                batch=SHUFFLES, random_state=np.random.default_rng(seed),
            )  # fmt: skip
        parts["p"].append(result.pvalue)
        parts["mean_a"].append(x.mean(0))
        parts["mean_b"].append(y.mean(0))
        parts["d"].append(cohen_d(x, y))
    found = {name: np.concatenate([np.empty(0), *each]) for name, each in parts.items()}
    # a feature that is the same in every text has no p: it does not differ
    found["p"] = np.nan_to_num(found["p"], nan=1.0)
    found["q"] = false_discovery_control(found["p"]) if len(features) else found["p"]
    order = np.lexsort((features, -np.abs(found["d"]), found["p"]))
    return {"feature": features[order]} | {name: each[order] for name, each in found.items()}


def cohen_d(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Difference of column means divided by the pooled standard deviation; 0 if nothing varies."""
    n, m = len(x), len(y)
    variance = ((n - 1) * x.var(0, ddof=1) + (m - 1) * y.var(0, ddof=1)) / (n + m - 2)
    return np.divide(x.mean(0) - y.mean(0), np.sqrt(variance), out=np.zeros(x.shape[1]), where=variance > 0)


def times_fired(x: Any) -> np.ndarray:
    """In how many rows of a scipy.sparse array [texts, d_sae] each feature is not zero."""
    return np.asarray((x != 0).sum(0)).ravel()


def _distance(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(x.mean(axis=axis) - y.mean(axis=axis))


# ---- pairs ------------------------------------------------------------------------------------------


def covariates(text: str) -> np.ndarray:
    """Covariates that a preference may depend on besides content: log of characters, line breaks, list items, markdown
    marks, code blocks; for each text."""
    lines = text.split("\n")
    items = sum(bool(re.match(r"\s*(?:[-*•]|\d+[.)])\s", line)) for line in lines)
    marks = len(re.findall(r"\*\*|^#{1,6}\s|`", text, flags=re.MULTILINE))
    return np.array([np.log1p(len(text)), len(lines) - 1, items, marks, text.count("```") // 2], float)


def compare_pairs(chosen: Any, rejected: Any, z: np.ndarray | None, *, least: int = 3) -> Rows:
    """Features of preferred versus rejected answers to the same prompts, before and after covariates.

    chosen, rejected: csr_array [pairs, d_sae]; z [pairs, c]: differences of the covariates, None for none.  With
    y = chosen - rejected, `before` is mean(y) / sd(y), p_before the t test of mean 0. `after` is the intercept of y on
    z by least squares (the difference that remains at equal length and format) divided by the same sd(y), p_after its
    t test.  Columns of z that are constant or depend on others are left out.  q: Benjamini-Hochberg.
    """
    from scipy.stats import false_discovery_control, t

    n = chosen.shape[0]
    design = np.ones((n, 1)) if z is None else np.concatenate([np.ones((n, 1)), z], 1)
    kept = [0]
    for column in range(1, design.shape[1]):
        if np.linalg.matrix_rank(design[:, [*kept, column]]) == len(kept) + 1:
            kept.append(column)
    design = design[:, kept]
    if n < len(kept) + 2:
        raise ValueError(f"pairs: expected at least {len(kept) + 2} for {len(kept) - 1} covariates, got {n}")
    inverse = np.linalg.inv(design.T @ design)
    features = np.nonzero(np.maximum(times_fired(chosen), times_fired(rejected)) >= least)[0]
    parts: dict[str, list[np.ndarray]] = {k: [] for k in ("difference", "before", "p_before", "after", "p_after")}
    for start in range(0, len(features), BLOCK):
        own = features[start : start + BLOCK]
        y = chosen[:, own].toarray() - rejected[:, own].toarray()
        sd = y.std(0, ddof=1)
        beta = inverse @ design.T @ y
        left = ((y - design @ beta) ** 2).sum(0) / (n - len(kept))
        parts["difference"].append(y.mean(0))
        parts["before"].append(_ratio(y.mean(0), sd))
        parts["p_before"].append(2 * t.sf(np.abs(_ratio(y.mean(0), sd / np.sqrt(n))), n - 1))
        parts["after"].append(_ratio(beta[0], sd))
        parts["p_after"].append(2 * t.sf(np.abs(_ratio(beta[0], np.sqrt(left * inverse[0, 0]))), n - len(kept)))
    found = {name: np.concatenate([np.empty(0), *each]) for name, each in parts.items()}
    for when in ("before", "after"):
        found[f"q_{when}"] = false_discovery_control(found[f"p_{when}"]) if len(features) else found[f"p_{when}"]
    order = np.lexsort((features, -np.abs(found["after"]), found["p_after"]))
    return {"feature": features[order]} | {name: each[order] for name, each in found.items()}


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.divide(x, y, out=np.zeros_like(x), where=y > 0)


# ---- depth ------------------------------------------------------------------------------------------


def separability(
    x: np.ndarray, labels: Sequence[bool], folds: int = 5, seed: int = 0, *, paired: bool = False
) -> float:
    """ROC AUC of a difference-of-means direction between two sets of texts [n, d], each text scored by the folds it is
    not in: the mean over folds, weighted by their pairs of texts.  Dimensions are weighted by their inverse variance
    within the sets, of the fold's training texts.  The smaller set has at least one text in every fold, so there are
    at most as many folds as it has texts.

    paired: the n-th text of one set and the n-th of the other are alike (two answers to one prompt) and share a fold:
    a partner in the training texts, under the other label, would turn the score round.
    """
    require("sklearn", "analysis", "separability")
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    y = np.asarray(labels, bool)
    sizes = int(y.sum()), int((~y).sum())
    if paired and sizes[0] != sizes[1]:
        raise ValueError(f"paired: expected sets of one size, got {sizes[0]} and {sizes[1]} texts")
    if min(sizes) < 2:
        raise ValueError(f"expected at least two texts in each set, got {sizes[0]} and {sizes[1]}")
    kind = StratifiedGroupKFold if paired else StratifiedKFold
    splits = kind(max(2, min(folds, *sizes)), shuffle=True, random_state=seed)
    partners = np.where(y, np.cumsum(y), np.cumsum(~y)) if paired else None
    found, pairs = [], []
    for train, test in splits.split(x, y, partners):
        own, others = x[train[y[train]]], x[train[~y[train]]]
        within = (own.var(0) * len(own) + others.var(0) * len(others)) / len(train)
        difference = own.mean(0) - others.mean(0)
        # a dimension that never varies within the sets separates them or gives no information
        w = difference / np.maximum(within, 1e-6 * max(float(within.mean()), 1e-12))
        found.append(roc_auc_score(y[test], x[test] @ w))
        pairs.append(int(y[test].sum()) * int((~y[test]).sum()))
    return float(np.average(found, weights=pairs))
