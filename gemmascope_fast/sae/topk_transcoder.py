"""Transcoders that keep the k greatest pre-activations of a token."""

from __future__ import annotations

from gemmascope_fast.sae.jumprelu import JumpReLUSkipTranscoder
from gemmascope_fast.sae.topk import TopKSAE


class TopKTranscoder(TopKSAE):
    """Reads one site, reconstructs another: x̂ is the output at `cfg.site_out`; latents as `TopKSAE`'s."""

    kind = "topk_transcoder"
    reconstructs_input = False


class TopKSkipTranscoder(TopKTranscoder, JumpReLUSkipTranscoder):
    """A top-k transcoder with an affine skip: x̂ = f @ W_dec + b_dec + x @ W_skip, W_skip [d_in, d_out]."""

    kind = "topk_skip_transcoder"
