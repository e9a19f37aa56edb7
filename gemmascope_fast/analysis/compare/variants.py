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

from gemmascope_fast.analysis.extraction.sources import json_lines, text
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
        group, own = str(value.get("group", "")), text(value, "text", where)
        if not group or not own:
            raise ValueError(f"{where}: expected a group and a text, got {value.get('group')!r}, {own!r:.40}")
        label = None if value.get("label") is None else str(value["label"])
        if label is not None and labels.setdefault(group, label) != label:
            raise ValueError(f"{where}: group {group!r} has label {labels[group]!r} before, {label!r} here")
        found.append(Variant(group, own, str(value.get("kind", "variant")), label))
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


def chosen_by_classifier(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[str],
    progress: Callable[[int], None] = lambda _n: None, at_once: int = 8,
) -> np.ndarray:  # fmt: skip
    """int64 [texts]: the most likely of `labels` by a sequence classifier, which reads the text without a question.

    ValueError if the classifier's configuration (id2label) does not name one of the labels.
    """
    own = {name: int(number) for number, name in model.config.id2label.items()}
    missing = [label for label in labels if label not in own]
    if missing:
        raise ValueError(f"--labels: the classifier knows {', '.join(own)}, and not {', '.join(missing)}")
    columns = [own[label] for label in labels]
    found = []
    for start in range(0, len(texts), at_once):
        part = list(texts[start : start + at_once])
        inputs = tokenizer(part, return_tensors="pt", padding=True, truncation=False).to(device_of(model))
        with torch.inference_mode():
            found.append(model(**inputs).logits[:, columns].float().argmax(1).cpu().numpy())
        progress(len(part))
    return np.concatenate(found)


def classify(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[str], template: str,
    progress: Callable[[int], None] = lambda _n: None, at_once: int = 8,
) -> np.ndarray:  # fmt: skip
    """int64 [texts]: the most likely label.  A language model is asked by `label_scores`; a sequence classifier, as
    a fine-tuned encoder is, chooses by its own head (`chosen_by_classifier`)."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return chosen_by_classifier(model, tokenizer, texts, labels, progress, at_once)
    return label_scores(model, tokenizer, texts, labels, template, progress, at_once).argmax(1)


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

    def plain(self) -> np.ndarray:
        """[groups, labels]: 1 for the first model's vote on each group's first text, else 0."""
        first = [int(np.nonzero(self.group == g)[0][0]) for g in range(len(self.names))]
        return np.eye(self.labels)[self.predicted[0, first]]

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


TOWARDS_EQUAL = 0.1  # weight of the mean squared distance from equal weights, beside a Brier score between 0 and 2
GROUPS_A_WEIGHT = 5  # labelled groups for each weight, below which fitted weights follow the noise of a few groups
FOLDS = 5


def fit_weights(votes: Votes, train: np.ndarray, seed: int = 0) -> np.ndarray:
    """Weights in [0, 1] by differential evolution, which minimise on the groups `train` the Brier score plus
    `TOWARDS_EQUAL` times their mean squared distance from 1.  Equal weights are among the first candidates."""
    from scipy.optimize import differential_evolution

    truth = np.eye(votes.labels)[votes.gold[train]]

    def loss(weights: np.ndarray) -> float:
        # scikit-learn's Brier score takes milliseconds a call, and thousands are made
        brier = ((votes.shares(weights)[train] - truth) ** 2).sum(1).mean()
        return float(brier + TOWARDS_EQUAL * ((weights - 1) ** 2).mean())

    start = np.full(votes.size, 1.0)
    result = differential_evolution(
        loss, [(0.0, 1.0)] * votes.size, x0=start, seed=seed, maxiter=200, tol=1e-8, polish=False
    )
    return result.x


def few_groups(votes: Votes) -> str | None:
    """Why no weights are fitted: too few labelled groups; None if there are enough."""
    known, needed = int((votes.gold >= 0).sum()), GROUPS_A_WEIGHT * votes.size
    if known >= needed:
        return None
    return (
        f"weights are not fitted: {votes.size} weights (kinds of text and models) need at least {needed} groups with a"
        f" label, and there are {known}"
    )


def calibrate(votes: Votes, seed: int = 0) -> dict[str, Any]:
    """How well confidence predicts a correct label, on all labelled groups.

    plain: the vote of the first model on each group's first text alone.  equal: all votes, equally weighted.  weighted:
    votes weighted by `fit_weights`, each group by weights fitted to the groups of the other folds
    (`FOLDS`-fold cross-validation); weights: those fitted to all labelled groups.  If `few_groups` says that there are
    too few, not_fitted has its sentence, and weighted and weights are missing.  ValueError without labelled groups.
    """
    known = np.nonzero(votes.gold >= 0)[0]
    if not len(known):
        raise ValueError("expected at least one group with a label, got none")
    gold = votes.gold[known]
    found: dict[str, Any] = {
        "groups": len(known),
        "plain": reliability(votes.plain()[known], gold),
        "equal": reliability(votes.shares(np.ones(votes.size))[known], gold),
    }
    reason = few_groups(votes)
    if reason is not None:
        return found | {"not_fitted": reason}
    from sklearn.model_selection import KFold

    held_out = np.empty((len(known), votes.labels))
    for train, test in KFold(FOLDS, shuffle=True, random_state=seed).split(known):
        held_out[test] = votes.shares(fit_weights(votes, known[train], seed))[known[test]]
    names = [*votes.kinds, *(f"model {m}" for m in range(len(votes.predicted)))]
    weights = fit_weights(votes, known, seed).tolist()
    return found | {"weighted": reliability(held_out, gold), "weights": dict(zip(names, weights, strict=True))}


def items(votes: Votes, labels: Sequence[str], models: Sequence[str]) -> list[dict[str, Any]]:
    """For each group its label with the most votes, the confidence (share of equally weighted votes), the true label
    (None if unknown), and every vote: kind of the text, model and label."""
    shares = votes.shares(np.ones(votes.size))
    found = []
    for number, name in enumerate(votes.names):
        cast = [
            {"kind": votes.kinds[votes.kind[i]], "model": model, "label": labels[votes.predicted[m, i]]}
            for i in np.nonzero(votes.group == number)[0]
            for m, model in enumerate(models)
        ]
        gold, best = int(votes.gold[number]), int(shares[number].argmax())
        confidence = float(shares[number, best])
        true = None if gold < 0 else labels[gold]
        found.append(
            {"group": name, "label": labels[best], "confidence": confidence, "true_label": true, "votes": cast}
        )
    return found
