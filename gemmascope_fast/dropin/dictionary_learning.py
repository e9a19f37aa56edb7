"""Converts coders of dictionary_learning to this package's modules (tested with dictionary-learning 0.1)."""

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from gemmascope_fast.checkpoints.gated import jumprelu_of
from gemmascope_fast.dropin.core import converted
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.topk import TopKSAE

KINDS = (AutoEncoder, AutoEncoderNew, JumpReluAutoEncoder, GatedAutoEncoder, AutoEncoderTopK)
KINDS += (BatchTopKSAE, MatryoshkaBatchTopKSAE)  # type: ignore[assignment]


def accelerate(target: Any, inplace: bool | None = None) -> JumpReLUSAE | TopKSAE:
    """Convert to `JumpReLUSAE` or `TopKSAE` with its own weights; a bias that is subtracted before the encoder is
    folded into b_enc.  It computes the coder's `encode(x)` with default arguments.

    A gated SAE is a JumpReLU (`checkpoints/gated.py`).  Raises TypeError for other kinds, ValueError for `inplace`.
    """
    if inplace:
        raise ValueError("inplace: a dictionary_learning coder is converted, not changed, got True")
    if type(target) not in KINDS:
        names = ", ".join(cls.__name__ for cls in KINDS)
        raise TypeError(f"target: expected one of dictionary_learning's {names}, got {type(target).__name__}")
    if isinstance(target, GatedAutoEncoder):
        scale, theta = jumprelu_of(target.gate_bias.detach(), target.mag_bias.detach(), target.r_mag.detach())
        rows = (target.encoder.weight.detach().double() * scale[:, None]).to(target.encoder.weight.dtype)
        b_dec, W_dec = target.decoder_bias, target.decoder.weight.T
        return converted(rows.T, W_dec, target.mag_bias, b_dec, theta.clamp(min=0), subtracts_b_dec=True)
    W_enc, W_dec, b_enc, b_dec, subtracts = _weights(target)
    k = threshold = None
    if isinstance(target, JumpReluAutoEncoder):
        threshold = target.threshold
    elif isinstance(target, AutoEncoderTopK):
        k = int(target.k)
    elif isinstance(target, BatchTopKSAE | MatryoshkaBatchTopKSAE):
        threshold = torch.full_like(b_enc, float(target.threshold))
        if isinstance(target, MatryoshkaBatchTopKSAE):
            # features of groups that are switched off never fire
            threshold[int(target.group_indices[target.active_groups]) :] = torch.finfo(b_enc.dtype).max
    return converted(W_enc, W_dec, b_enc, b_dec, threshold, k=k, subtracts_b_dec=subtracts)


def _weights(coder: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(W_enc [d, F], W_dec [F, d], b_enc, b_dec, whether the encoder reads x - b_dec)."""
    if isinstance(coder, JumpReluAutoEncoder):
        return coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec, bool(coder.apply_b_dec_to_input)
    if isinstance(coder, MatryoshkaBatchTopKSAE):
        return coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec, True
    encoder, decoder = coder.encoder, coder.decoder
    if isinstance(coder, AutoEncoderNew):
        return encoder.weight.T, decoder.weight.T, encoder.bias, decoder.bias, False
    b_dec = coder.bias if isinstance(coder, AutoEncoder) else coder.b_dec
    return encoder.weight.T, decoder.weight.T, encoder.bias, b_dec, True
