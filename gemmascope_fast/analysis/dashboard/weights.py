"""What an SAE's decoder shows about its features: neighbours, and the tokens that each promotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmascope_fast.attach.transformers.structure import Structure
from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae.sites import Site

BLOCK = 256  # features at a time: with 262,144 tokens a block of logits takes 268 MB


class Lens(NamedTuple):
    """Logit lens: int64 and float32 [F, n], the tokens whose logits a feature raises most, and those it lowers most."""

    raised: Tensor
    raised_by: Tensor
    lowered: Tensor
    lowered_by: Tensor


def neighbours(W_dec: Tensor, n: int = 8) -> tuple[Tensor, Tensor]:
    """(features int64 [F, n], cosines float32 [F, n]): the nearest decoder rows of each feature, except itself."""
    rows = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)
    n = min(n, rows.shape[0] - 1)
    found, cosines = [], []
    for start in range(0, rows.shape[0], 1024):
        near = rows[start : start + 1024] @ rows.t()
        near[torch.arange(near.shape[0]), torch.arange(near.shape[0]) + start] = -torch.inf
        values, indices = near.topk(n, dim=1)
        found.append(indices)
        cosines.append(values)
    return torch.cat(found).cpu(), torch.cat(cosines).cpu()


# Names of the norm before the unembedding in transformers' models.
FINAL_NORMS = (
    "norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f", "ln_out", "out_norm", "layer_norm",
    "layernorm", "embedding_norm", "LayerNorm",
)  # fmt: skip
STREAM = ("resid", "mlp", "attn_out", "embed")  # kinds of sites whose values are added to the residual stream


def writes_to_stream(model: Any, site: Site) -> bool:
    """Whether a site's values are added to the residual stream; its width alone does not show that."""
    if site.kind != "path":
        return site.kind in STREAM
    try:
        return any(other.kind in STREAM for other in Structure(model).aliases(site))
    except AttachError:
        return False


def logit_lens(
    model: Any,
    W_dec: Tensor,
    n: int = 10,
    progress: Callable[[int], None] = lambda _n: None,
    *,
    site: Site | None = None,
) -> Lens:
    """Multiply each decoder row by the final norm's gain and the unembedding; logits are relative to their mean.

    A LayerNorm also subtracts the mean of the row first.  site: where the rows are written, if known; only the residual
    stream has logits.  progress is called with the number of features done.  Raises ValueError for another site, and if
    the model has no unembedding of this width or no known norm before it.
    """
    if site is not None and not writes_to_stream(model, site):
        raise ValueError(f"logit lens: expected a site that adds to the residual stream, got {site.hook_name}")
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != W_dec.shape[1]:
        raise ValueError(f"logit lens: expected an unembedding of width {W_dec.shape[1]} in {type(model).__name__}")
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        weight = head.weight.detach().float()
        gain, centred = _gain(model, head.weight)
        mean = weight.mean(0)
        for start in range(0, W_dec.shape[0], BLOCK):
            rows = W_dec[start : start + BLOCK].detach().float().to(weight.device)
            rows = (rows - rows.mean(1, keepdim=True) if centred else rows) * gain
            logits = rows @ weight.t()
            off = (rows @ mean)[:, None]
            up, down = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
            parts.append((up.indices, up.values - off, down.indices, down.values - off))
            progress(rows.shape[0])
    return Lens(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _gain(model: Any, like: Tensor) -> tuple[Tensor, bool]:
    """(gain fp32 [d], whether it subtracts the mean) of the norm before the unembedding."""
    decoder = model.get_decoder()
    found = [getattr(decoder, name, None) for name in FINAL_NORMS]
    norm = next((module for module in found if isinstance(module, torch.nn.Module)), None)
    if norm is None:
        raise ValueError(
            f"logit lens: expected a norm before the unembedding in {type(decoder).__name__}, named one of"
            f" {', '.join(FINAL_NORMS)}"
        )
    if type(norm) is torch.nn.LayerNorm:
        weight = torch.ones(like.shape[1], device=like.device) if norm.weight is None else norm.weight
        return weight.detach().float(), True
    # by its result for a vector of ones: a root-mean-square norm gives its gain, a norm that subtracts the mean
    # 0
    ones = torch.ones(1, like.shape[1], dtype=like.dtype, device=like.device)
    bias = norm(torch.zeros_like(ones))[0].float()
    flat = norm(ones)[0].float() - bias
    signs = ones.clone()
    signs[:, 1::2] = -1
    other = norm(signs)[0].float() - bias
    if flat.abs().max() > 1e-3 * other.abs().max():
        return flat, False
    signs = signs.float() - signs.float().mean()
    return other / (signs / signs.square().mean().sqrt())[0], True
