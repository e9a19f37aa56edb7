"""What an SAE's decoder says of its features: neighbours, and the tokens that each speaks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # features at once: with 262,144 tokens a block of logits takes 268 MB


class Lens(NamedTuple):
    """Logit lens: int64 and float32 [F, n], the tokens that a feature raises most, and those it lowers most."""

    raised: Tensor
    raised_by: Tensor
    lowered: Tensor
    lowered_by: Tensor


def neighbours(W_dec: Tensor, n: int = 8) -> tuple[Tensor, Tensor]:
    """(features int64 [F, n], cosines float32 [F, n]): the nearest decoder rows of each feature, itself left out."""
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    n = min(n, rows.shape[0] - 1)
    found, cosines = [], []
    for start in range(0, rows.shape[0], 1024):
        near = rows[start : start + 1024] @ rows.t()
        near[torch.arange(near.shape[0]), torch.arange(near.shape[0]) + start] = -torch.inf
        values, indices = near.topk(n, dim=1)
        found.append(indices)
        cosines.append(values)
    return torch.cat(found), torch.cat(cosines)


def logit_lens(model: Any, W_dec: Tensor, n: int = 10, progress: Callable[[int], None] = lambda _n: None) -> Lens:
    """Each decoder row through the final norm's gain and the unembedding; logits relative to their mean over tokens.

    progress is told of features done.  Raises ValueError where the model has no unembedding of this width.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != W_dec.shape[1]:
        raise ValueError(f"logit lens: expected an unembedding of width {W_dec.shape[1]} in {type(model).__name__}")
    norm = getattr(model.get_decoder(), "norm", None)
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        weight = head.weight.detach().float()
        # a root-mean-square norm gives its gain for a vector of ones, whatever way it is stored
        ones = torch.ones(1, W_dec.shape[1], dtype=head.weight.dtype, device=head.weight.device)
        gain = torch.ones(W_dec.shape[1]) if norm is None else norm(ones)[0].float()
        mean = weight.mean(0)
        for start in range(0, W_dec.shape[0], BLOCK):
            rows = W_dec[start : start + BLOCK].detach().float().to(weight.device) * gain
            logits = rows @ weight.t()
            off = (rows @ mean)[:, None]
            up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
            parts.append((up.indices, up.values - off, down.indices, down.values - off))
            progress(rows.shape[0])
    return Lens(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
