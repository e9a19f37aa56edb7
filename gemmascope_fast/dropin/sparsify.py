"""Converts EleutherAI's sparsify coders to this package's modules (tested with eai-sparsify 1.3)."""

from __future__ import annotations

from typing import Any

from sparsify import SparseCoder

from gemmascope_fast.dropin.core import converted
from gemmascope_fast.sae.topk import TopKSAE


def accelerate(target: Any, inplace: bool | None = None) -> TopKSAE:
    """Convert a top-k SparseCoder to `TopKSAE` with its own weights. It gives the same k latents of a token, without
    those that are zero; x - b_dec is folded into b_enc unless the coder is a transcoder.

    Raises TypeError for another class, ValueError for `inplace`, another activation, an SAE with a skip, or no decoder.
    """
    if inplace:
        raise ValueError("inplace: a sparsify coder is converted, not changed, got True")
    if not isinstance(target, SparseCoder):
        raise TypeError(f"target: expected sparsify's SparseCoder, got {type(target).__name__}")
    cfg = target.cfg
    if cfg.activation != "topk":
        raise ValueError(f"target: expected activation 'topk', got {cfg.activation!r}")
    if target.W_dec is None:
        raise ValueError("target: expected a decoder, got none")
    if target.W_skip is not None and not cfg.transcode:
        raise ValueError("target: expected an SAE without a skip, got one with a W_skip")
    return converted(
        target.encoder.weight.T,
        target.W_dec,
        target.encoder.bias,
        target.b_dec,
        k=cfg.k,
        subtracts_b_dec=not cfg.transcode,
        transcodes=bool(cfg.transcode),
        W_skip=None if target.W_skip is None else target.W_skip.T,
    )
