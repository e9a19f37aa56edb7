"""SAEs of embeddings. Gemma scales embeddings after the table lookup; Gemma Scope's SAEs read unscaled ones."""

from __future__ import annotations

from gemmascope_fast.sae.config import SAEConfig
from gemmascope_fast.sae.jumprelu import JumpReLUSAE


def scaled_embedding_sae(sae: JumpReLUSAE, scale: float | None = None) -> JumpReLUSAE:
    """An embedding SAE for embeddings that were multiplied by `scale` (Gemma: √d, the default).

    W_enc is divided by `scale`, W_dec and b_dec are multiplied by it (SAELens does not scale b_dec).
    `attach` does not need this function: it gives the SAE of an `embed` site the unscaled embeddings.
    """
    scale = sae.cfg.d_in**0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    cfg = SAEConfig(sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out, None, None, sae.cfg.metadata)
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    weights |= {"W_enc": weights["W_enc"] / scale, "W_dec": weights["W_dec"] * scale, "b_dec": weights["b_dec"] * scale}
    return JumpReLUSAE(**weights, cfg=cfg)
