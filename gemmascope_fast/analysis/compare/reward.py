"""Which features a reward model's score depends on: attributes each answer's reward to the features that fire in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from gemmascope_fast.analysis.compare.pooled import of_rows
from gemmascope_fast.analysis.extraction.texts import Answer, columns, encoded
from gemmascope_fast.attach import attach
from gemmascope_fast.attach.tokens import device_of, framing
from gemmascope_fast.checkpoints.hub import from_hub_or_cache


def load_reward_model(name: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) for --reward: a sequence classifier with one output, in eval mode."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if name == "demo":
        raise ValueError("--reward: expected --model, a sequence classifier; the demo model is not one")
    with from_hub_or_cache(name) as local:
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, **local).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, **local)
    if model.config.num_labels != 1:
        raise ValueError(f"--reward {name}: expected a model with one output, got {model.config.num_labels}")
    return model.requires_grad_(False), tokenizer


def attributed(
    model: Any, tokenizer: Any, sites: Mapping[Any, Any], texts: Iterable[str | Answer], *, window: int = 1023,
    progress: Callable[[int], None] = lambda _n: None,
) -> tuple[Any, np.ndarray]:  # fmt: skip
    """(csr_array [texts, d_sae] of gradient · activation for the reward, summed over the text's own tokens; rewards
    [texts]).  The reward of an `Answer` is that of prompt and answer.

    The SAE's error is constant, as in `run.attribution`.  ValueError for a text longer than the window, because the
    reward would be that of a different text.
    """
    ((key, sae),) = sites.items()
    head, tail = framing(tokenizer)
    rows, rewards = [], []
    for number, text in enumerate(texts, 1):
        prompt, own = encoded(tokenizer, text)
        if not own or len(prompt) + len(own) > window:
            raise ValueError(f"text {number}: expected 1 to {window} tokens (--window), got {len(prompt) + len(own)}")
        ids = [*head, *prompt, *own, *tail]
        end = len(ids) - len(tail)
        chosen = columns([(end - len(own), end)], len(ids))
        with torch.enable_grad(), attach(model, sites, mode="splice+error", tokens=chosen) as run:
            reward = model(torch.tensor([ids], device=device_of(model))).logits[0, 0]
            found = run.attribution(reward)[key].cpu()
        features, at = np.unique(found.col_indices.numpy().astype(np.int64), return_inverse=True)
        total = np.zeros(len(features))
        np.add.at(total, at, found.values.double().numpy())
        rows.append((features, total))
        rewards.append(float(reward.detach()))
        progress(1)
    return of_rows(rows, sae.cfg.d_sae), np.array(rewards)


def ranked(chosen: Any, rejected: Any, rewards: tuple[np.ndarray, np.ndarray], k: int = 10) -> list[dict[str, Any]]:
    """For each pair: both rewards, and the k features whose contributions differ most, largest difference first.

    chosen, rejected: csr_array [pairs, d_sae] from `attributed`, and the rewards of each.
    """
    found = []
    for pair, (own, other) in enumerate(zip(*rewards, strict=True)):
        difference = (chosen[[pair]] - rejected[[pair]]).tocoo()
        order = np.lexsort((difference.col, -np.abs(difference.data)))[:k]
        features = [
            {"feature": int(difference.col[i]), "difference": float(difference.data[i])}
            for i in order
            if difference.data[i]
        ]
        found.append({"pair": pair + 1, "chosen": float(own), "rejected": float(other), "features": features})
    return found


ARTEFACT = 0.5  # share of a feature's contribution that stays under another prompt, from which it follows an artefact


def contexts_of(found: Mapping[str, tuple[Any, Any, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """What becomes of the rewards' margin, and of each feature's share in it, where the context of the answers changes.

    found: for each of `pairs.CONTEXTS` (chosen, rejected: csr_array [pairs, d_sae] from `attributed`, and the rewards
    of each).  Gives, for each context, the mean margin (chosen - rejected), the share of pairs in which chosen has the
    larger reward, and `attributed`, the part of the margin that features carry.  features: each feature's mean
    contribution to the margin in each context, largest under its own prompt first.  groups: the features whose
    contribution stays (by `ARTEFACT` or more) under another prompt, and the others, with what each group carries under
    the own prompt.  The idea of rewards under other prompts is that of RRM (robust reward models).
    """
    means = {name: np.asarray((a - b).mean(0)).ravel() for name, (a, b, _, _) in found.items()}
    own, other = means["own"], means["other"]
    used = np.nonzero(own)[0]
    used = used[np.argsort(-np.abs(own[used]), kind="stable")]
    # the sign counts: a contribution that turns round under another prompt depends on the prompt
    stays = other[used] / own[used] >= ARTEFACT
    return {
        "contexts": {
            name: {
                "margin": float((of_a - of_b).mean()),
                "accuracy": float((of_a > of_b).mean()),
                "attributed": float(means[name].sum()),
            }
            for name, (_, _, of_a, of_b) in found.items()
        },
        "groups": {
            name: {"features": int(part.sum()), "carries": float(own[used[part]].sum())}
            for name, part in (("stays under another prompt", stays), ("depends on the prompt", ~stays))
        },
        "features": [
            {"feature": int(f), **{name: float(mean[f]) for name, mean in means.items()}, "stays": bool(kept)}
            for f, kept in zip(used, stays, strict=True)
        ],
    }
