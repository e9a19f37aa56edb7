"""Detection and steering of every concept with every method, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.analysis.concepts.data import Example, Split
from gemmascope_fast.analysis.concepts.methods import (
    Detector,
    diff_mean,
    largest,
    linear_probe,
    sae_feature,
    text_scores,
)
from gemmascope_fast.analysis.concepts.reft import fit_reft
from gemmascope_fast.analysis.extraction.texts import read_texts
from gemmascope_fast.analysis.extraction.windows import padded
from gemmascope_fast.attach import Activations, Direction, attach
from gemmascope_fast.attach.edits import Add, Edit
from gemmascope_fast.attach.tokens import device_of, opening, room
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder

WINDOW = 1023  # tokens of a text after its BOS
METHODS = ("SAE", "DiffMean", "probe", "ReFT-r1")
Tick = Callable[[], None]


class Concepts:
    """The examples, read once: activations and latents of every text, in memory (for small labelled sets)."""

    def __init__(
        self, model: Any, tokenizer: Any, sae: Coder, layer: int, examples: Sequence[Example],
        progress: Callable[[int], None] = lambda _n: None,
    ) -> None:  # fmt: skip
        """Raises ValueError for a text without content tokens or longer than the model's window, and for a transcoder,
        because it does not read what the other methods read."""
        if "transcoder" in sae.kind:
            raise ValueError(f"--sae: expected an SAE of the residual stream, got a {sae.kind}")
        self.model, self.tokenizer, self.sae, self.layer, self.examples = model, tokenizer, sae, layer, examples
        self.rows: list[Tensor] = []
        self._bases: dict[tuple[int, ...], float] = {}
        texts = [e.text for e in examples]
        window = min(WINDOW, room(model, tokenizer) or WINDOW)
        read = read_texts(model, tokenizer, {(layer, "resid"): Activations()}, texts, window=window)
        for i, (ids, found) in enumerate(read):
            if len(ids) > window:
                # the loss of only its first tokens would be that of a different text
                raise ValueError(f"text {texts[i]!r:.40}: expected at most {window} tokens, got {len(ids)}")
            if not found or not len(found[layer, "resid"]):
                raise ValueError(f"text {texts[i]!r:.40}: expected at least one token that is not special")
            self.rows.append(found[layer, "resid"])
            progress(1)
        with torch.inference_mode():
            self.latents: list[SparseLatents] = [sae.encode_sparse(h.to(sae.device)).cpu() for h in self.rows]

    def fit(
        self, split: Split, methods: Sequence[str], reft: dict[str, Any], tick: Tick = lambda: None
    ) -> list[Detector]:
        """A detector for each method, with its steering strength."""
        positive = torch.cat([self.rows[i] for i in split.train_positive])
        negative = torch.cat([self.rows[i] for i in split.train_negative])
        start = diff_mean(positive, negative)
        makers: dict[str, Callable[[], Detector]] = {
            "SAE": lambda: sae_feature(
                self.sae,
                [self.latents[i] for i in split.train],
                [1] * len(split.train_positive) + [0] * len(split.train_negative),
                start.mean,
            ),
            "DiffMean": lambda: start,
            "probe": lambda: linear_probe(positive, negative),
            "ReFT-r1": lambda: fit_reft(
                self.model, self.tokenizer, _site(self.layer),
                [self.examples[i].text for i in split.train_positive], start, **reft,
            ),
        }  # fmt: skip
        found = []
        for method in methods:
            detector = makers[method]()
            detector.max_act = largest(detector, self.rows, self.latents, split.train_positive)
            found.append(detector)
            tick()
        return found

    def detect(self, detector: Detector, split: Split) -> dict[str, Any]:
        """Scores are maxima over tokens, scaled to [0, 1] over the concept's test texts.

        auc: the concept's test texts against all texts without it; auc_hard: only against its hard negatives (NaN
        if there are none); separation: difference of mean scores.
        """
        from sklearn.metrics import roc_auc_score

        raw = text_scores(detector, self.rows, self.latents, split.test)
        spread = raw.max() - raw.min()
        scores = (raw - raw.min()) / spread if spread > 0 else np.zeros_like(raw)
        p, h = len(split.test_positive), len(split.hard)
        labels = np.arange(len(scores)) < p
        near = np.concatenate([scores[:p], scores[len(scores) - h :]])
        return {
            "auc": float(roc_auc_score(labels, scores)),
            "auc_hard": float(roc_auc_score(np.arange(p + h) < p, near)) if h else float("nan"),
            "separation": float(scores[:p].mean() - scores[p:].mean()),
            "feature": detector.feature,
            "max_act": detector.max_act,
        }

    def steer(
        self, detector: Detector, split: Split, factors: Sequence[float], tick: Tick = lambda: None
    ) -> list[dict]:
        """For each factor: add factor · max_act · direction to every content token and read the test texts.

        gain: decrease of loss in nats per token on the concept's texts minus that on the others; cost: increase of loss
        in nats per token on the others.  No second model is needed: steering to a concept makes its texts likelier.
        """
        own, others = split.test_positive, split.test_negative[: len(split.test_positive)]
        base = [self._base(tuple(chosen)) for chosen in (own, others)]
        found = []
        for factor in factors:
            strength = factor * detector.max_act
            edit = steering_edit(detector, strength)
            changed = self._loss(own, edit) - base[0], self._loss(others, edit) - base[1]
            found.append({"factor": factor, "gain": changed[1] - changed[0], "cost": changed[1]})
            tick()
        return found

    def _base(self, chosen: tuple[int, ...]) -> float:
        """The unsteered loss, computed once for each set of texts."""
        if chosen not in self._bases:
            self._bases[chosen] = self._loss(chosen, ())
        return self._bases[chosen]

    def _loss(self, chosen: Sequence[int], edits: Any) -> float:
        """Mean cross-entropy in nats over the content tokens of the selected texts."""
        head = opening(self.tokenizer)
        texts = [self.examples[i].text for i in chosen]
        rows = [[*head, *self.tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]
        pad = self.tokenizer.pad_token_id
        ids, mask = padded(rows, 0 if pad is None else pad, device_of(self.model))
        site = {(self.layer, "resid"): self.sae}
        with (
            torch.inference_mode(),
            attach(self.model, site, mode="splice+error", edits=edits, tokens="content", keep=False),
        ):
            logits = self.model(ids, attention_mask=mask, use_cache=False).logits
        counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        counts = (counts & ~torch.isin(ids, torch.tensor(sorted(self.tokenizer.all_special_ids), device=ids.device)))[
            :, 1:
        ]
        return float(torch.nn.functional.cross_entropy(logits[:, :-1][counts].float(), ids[:, 1:][counts]))

    def write_on(self, detector: Detector, prompt: str, factor: float, tokens: int = 24) -> str:
        """The model's greedy continuation of a prompt, steered at every position."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(device_of(self.model))
        edit = steering_edit(detector, factor * detector.max_act)
        site = {(self.layer, "resid"): self.sae}
        with attach(self.model, site, mode="splice+error", edits=edit, tokens="all", keep=False):
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def steering_edit(detector: Detector, strength: float) -> Edit:
    """AxBench's addition: of a feature's decoder row, or of a direction."""
    if detector.feature is not None:
        return Add(detector.feature, strength)
    return Direction(detector.write, strength)


def _site(layer: int) -> Any:
    from gemmascope_fast.sae.sites import Site

    return Site("resid", layer)
