"""The kinds of coder that are stored in one file of weights."""

from __future__ import annotations

from typing import Any

from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemmascope_fast.sae.topk import TopKSAE

KINDS: dict[str, Any] = {c.kind: c for c in (JumpReLUSAE, TopKSAE, JumpReLUTranscoder, JumpReLUSkipTranscoder)}
