"""Four methods to find a direction for a concept (AxBench, Wu et al. 2025, section 3): SAE, DiffMean, probe, ReFT-r1.

Each gives a score per token and a unit vector for steering.  Scores use activations minus the training tokens' mean.
This changes every score by a constant, which affects neither ranking nor min-max, and makes the largest length along
the vector on the concept's texts a useful strength for steering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.ops._exact import outside_autocast
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder


@dataclass
class Detector:
    """score of a token h: (h - mean)·read + bias, or the latent `feature`; steering adds factor · max_act · write.

    read, write, mean [d]; max_act: the largest latent, or length along write, on the concept's training texts.
    """

    method: str
    read: Tensor
    write: Tensor
    mean: Tensor
    bias: float = 0.0
    feature: int | None = None
    max_act: float = 0.0

    def scores(self, h: Tensor, latents: SparseLatents | None = None) -> Tensor:
        """fp32 [n] for tokens h [n, d]; latents of the same tokens if the detector is a feature."""
        if self.feature is not None:
            assert latents is not None
            return latents.features([self.feature])[:, 0].float()
        with outside_autocast(h.device):
            return (h - self.mean) @ self.read + self.bias


def text_scores(
    detector: Detector, rows: Sequence[Tensor], latents: Sequence[SparseLatents], chosen: Sequence[int]
) -> np.ndarray:
    """Maximum over the tokens of each selected text, fp64."""
    return np.array([float(detector.scores(rows[i], latents[i]).max()) for i in chosen])


def largest(
    detector: Detector, rows: Sequence[Tensor], latents: Sequence[SparseLatents], chosen: Sequence[int]
) -> float:
    """The unit of steering strength: the largest latent or (h - mean)·write over the selected texts' tokens.

    It is not the score: a probe's scores are log odds below ten, while activations have lengths of thousands.
    """
    return float(text_scores(replace(detector, read=detector.write, bias=0.0), rows, latents, chosen).max())


def diff_mean(positive: Tensor, negative: Tensor) -> Detector:
    """w = mean(h⁺) - mean(h⁻) over tokens [n, d], to unit length."""
    w = positive.double().mean(0) - negative.double().mean(0)
    unit = (w / w.norm()).float()
    return Detector("DiffMean", unit, unit, torch.cat([positive, negative]).double().mean(0).float())


def linear_probe(positive: Tensor, negative: Tensor, c: float = 1e-2) -> Detector:
    """Logistic regression on tokens, with equal class weights, each dimension scaled to unit variance first.

    c: scikit-learn's inverse strength of the L2 penalty; there are few tokens compared with dimensions.
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([positive, negative]).double()
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-12)
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000)
    model.fit(((x - mean) / scale).numpy(), labels)
    w = torch.from_numpy(model.coef_[0]) / scale
    return Detector("probe", w.float(), (w / w.norm()).float(), mean.float(), float(model.intercept_[0]))


def sae_feature(sae: Coder, latents: Sequence[SparseLatents], labels: Sequence[int], mean: Tensor) -> Detector:
    """The feature whose maximum over a text's tokens ranks the training texts best (ROC AUC; ties: the lower index)."""
    if len(set(labels)) != 2:
        raise ValueError("labels: expected texts of both classes")
    dense = torch.stack([_maximum(part) for part in latents]).double()
    found = auc_columns(dense, torch.tensor(labels, dtype=torch.bool))
    feature = int(found.argmax())
    row = sae.W_dec.detach()[feature].float().cpu()
    return Detector("SAE", row, row, mean, feature=feature)


def _maximum(latents: SparseLatents) -> Tensor:
    """[d_sae]: the largest value of each feature over the rows, 0 if it never fired."""
    out = torch.zeros(latents.d_sae)
    return out.scatter_reduce(0, latents.col_indices.long(), latents.values.float(), "amax")


def auc_columns(scores: Tensor, positive: Tensor) -> Tensor:
    """ROC AUC of every column of [texts, features], ties counting half; positive bool [texts].

    Mann-Whitney's U over the number of pairs: scikit-learn's roc_auc_score takes one column at a time.
    """
    from scipy.stats import mannwhitneyu

    x, y = scores[positive].numpy(), scores[~positive].numpy()
    return torch.from_numpy(mannwhitneyu(x, y, axis=0, method="asymptotic").statistic) / (len(x) * len(y))
