"""One text and its variants: how stable features and labels are, and how well the share of agreeing variants predicts
a correct label."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemmascope_fast.analysis.extraction.sources import json_lines, string
from gemmascope_fast.analysis.extraction.windows import padded
from gemmascope_fast.attach.tokens import device_of, opening, room
from gemmascope_fast.errors import require


@dataclass(frozen=True)
class Variant:
    """A text of a group with equal meaning.  kind: how it was changed; label: the group's true label, if known."""

    group: str
    text: str
    kind: str
    label: str | None


def load_variants(path: str | Path) -> list[Variant]:
    """Read JSON lines of group, text and optionally kind and label.  ValueError naming the line of a record that is
    invalid or contradicts its group's label."""
    found, labels = [], dict[str, str]()
    for number, value in json_lines(Path(path)):
        where = f"{path}, line {number}"
        group, text = str(value.get("group", "")), string(value, "text", where)
        if not group or not text.strip():
            raise ValueError(f"{where}: expected a group and a text, got {value.get('group')!r}, {text!r:.40}")
        label = None if value.get("label") is None else str(value["label"])
        if label is not None and labels.setdefault(group, label) != label:
            raise ValueError(f"{where}: group {group!r} has label {labels[group]!r} before, {label!r} here")
        found.append(Variant(group, text, str(value.get("kind", "variant")), label))
    if not found:
        raise ValueError(f"{path}: expected at least one text")
    return found


def groups_of(variants: Sequence[Variant]) -> dict[str, list[int]]:
    """Indices of the variants of each group, in order of appearance."""
    found: dict[str, list[int]] = {}
    for i, variant in enumerate(variants):
        found.setdefault(variant.group, []).append(i)
    return found


def stability(fired: Sequence[set[int]], groups: dict[str, list[int]]) -> dict[str, Any]:
    """jaccard: mean over pairs of variants within a group of |both| / |either| (features that fired; 1 if neither has
    any), by group and over groups; across: the same over pairs of first variants of different groups."""

    def likeness(a: set[int], b: set[int]) -> float:
        return len(a & b) / len(a | b) if a | b else 1.0

    by_group = {}
    for name, own in groups.items():
        pairs = [likeness(fired[i], fired[j]) for n, i in enumerate(own) for j in own[n + 1 :]]
        by_group[name] = float(np.mean(pairs)) if pairs else float("nan")
    first = [own[0] for own in groups.values()]
    others = [likeness(fired[i], fired[j]) for n, i in enumerate(first) for j in first[n + 1 :]]
    within = [v for v in by_group.values() if not np.isnan(v)]
    return {
        "jaccard": float(np.mean(within)) if within else float("nan"),
        "across": float(np.mean(others)) if others else float("nan"),
        "by_group": by_group,
    }


def label_scores(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[str], template: str,
    progress: Callable[[int], None] = lambda _n: None, at_once: int = 8,
) -> np.ndarray:  # fmt: skip
    """fp64 [texts, labels]: log p(label's tokens | prompt).

    template: the prompt, with {text}; a label follows it after a space.  ValueError if {text} is missing, or a prompt
    with its label is longer than the model's window.
    """
    if "{text}" not in template:
        raise ValueError(f"--template: expected a question with {{text}}, got {template!r}")
    head = opening(tokenizer)
    answers = [tokenizer(" " + label, add_special_tokens=False)["input_ids"] for label in labels]
    prompts = [
        [*head, *tokenizer(template.replace("{text}", t), add_special_tokens=False, verbose=False)["input_ids"]]
        for t in texts
    ]
    most = room(model, tokenizer)
    for number, prompt in enumerate(prompts, 1):
        own = len(prompt) - len(head) + max(map(len, answers))
        if most is not None and own > most:
            raise ValueError(f"text {number}: expected at most {most} tokens with prompt and label, got {own}")
    scores = np.empty((len(texts), len(labels)))
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    order = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(texts), at_once):
        part = order[start : start + at_once]
        # logits only where a label is read: the output head is most of a small model's weights
        first = len(prompts[part[0]]) - 1 if keeps else 0
        for j, answer in enumerate(answers):
            ids, mask = padded([[*prompts[i], *answer] for i in part], tokenizer.pad_token_id or 0, device_of(model))
            more = {"logits_to_keep": torch.arange(first, ids.shape[1], device=ids.device)} if keeps else {}
            with torch.inference_mode():
                logits = model(ids, attention_mask=mask, use_cache=False, **more).logits
            for row, i in zip(logits, part, strict=True):
                begin = len(prompts[i]) - 1 - first
                own_rows = row[begin : begin + len(answer)].float().cpu().log_softmax(-1)
                scores[i, j] = float(own_rows[torch.arange(len(answer)), torch.tensor(answer)].sum())
        progress(len(part))
    return scores


def classify(model: Any, tokenizer: Any, texts: Sequence[str], *args: Any, **options: Any) -> np.ndarray:
    """int64 [texts]: the label with the highest probability; same arguments as `label_scores`."""
    return label_scores(model, tokenizer, texts, *args, **options).argmax(1)


@dataclass
class Votes:
    """predicted int64 [models, variants]; kind int64 [variants], index into `kinds`; group int64 [variants], index into
    `names`; gold int64 [groups], -1 if unknown."""

    predicted: np.ndarray
    kind: np.ndarray
    group: np.ndarray
    gold: np.ndarray
    labels: int
    kinds: list[str]
    names: list[str]

    @property
    def size(self) -> int:
        """Number of weights: one per kind and one per model."""
        return len(self.kinds) + len(self.predicted)

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """[groups, labels]: the weighted share of votes for each label.  weights [kinds + models], each at least 0; the
        weight of a vote is (its kind's) · (its model's)."""
        each = weights[len(self.kinds) :, None] * weights[self.kind][None]
        out = np.zeros((len(self.names), self.labels))
        np.add.at(out, (np.broadcast_to(self.group, each.shape), self.predicted), each)
        total = out.sum(1, keepdims=True)
        return np.divide(out, total, out=np.full_like(out, 1 / self.labels), where=total > 0)


def reliability(shares: np.ndarray, gold: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """accuracy; brier: mean over groups of Σ over labels (share - 1[label is true])²; ece = Σ over bins of confidence
    (bin's share · |accuracy - mean confidence|); the bins that hold anything: confidence, accuracy, count."""
    require("sklearn", "analysis", "variants")
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    confidence, right = shares.max(1), shares.argmax(1) == gold
    curve = calibration_curve(right.astype(int), confidence, n_bins=bins, pos_label=1)
    # scikit-learn's bins, whose upper ends are theirs
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence))
    found = [
        {"confidence": float(mean), "accuracy": float(share), "count": int(count)}
        for share, mean, count in zip(*curve, counts[counts > 0], strict=True)
    ]
    ece = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in found) / len(gold)
    brier = brier_score_loss(gold, shares, labels=np.arange(shares.shape[1]), scale_by_half=False)
    return {"accuracy": float(right.mean()), "brier": float(brier), "ece": float(ece), "bins": found}


def fit_weights(votes: Votes, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weights in [0, 1] with the lowest Brier score on the groups `train`, by differential evolution; equal weights are
    among the first candidates, so the result is never worse than equal weights there."""
    from scipy.optimize import differential_evolution

    truth = np.eye(votes.labels)[votes.gold[train]]

    def loss(weights: np.ndarray) -> float:
        # scikit-learn's Brier score takes milliseconds a call, and thousands are made
        return float(((votes.shares(weights)[train] - truth) ** 2).sum(1).mean())

    start = np.full(votes.size, 1.0)
    result = differential_evolution(
        loss, [(0.0, 1.0)] * votes.size, x0=start, seed=seed, maxiter=200, tol=1e-8, polish=False
    )
    return result.x


def calibrate(votes: Votes, seed: int = 0) -> dict[str, Any]:
    """Fit weights on half of the labelled groups; measure these and equal weights on the other half.

    ValueError for fewer than four labelled groups.
    """
    known = np.nonzero(votes.gold >= 0)[0]
    if len(known) < 4:
        raise ValueError(f"expected at least four groups with a label, got {len(known)}")
    order = np.random.default_rng(seed).permutation(known)
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    weights = fit_weights(votes, train, seed)
    names = [*votes.kinds, *(f"model {m}" for m in range(len(votes.predicted)))]
    return {
        "train_groups": len(train),
        "test_groups": len(test),
        "weights": dict(zip(names, weights.tolist(), strict=True)),
        "equal": reliability(votes.shares(np.ones(votes.size))[test], votes.gold[test]),
        "weighted": reliability(votes.shares(weights)[test], votes.gold[test]),
    }
