"""SAEBench's custom SAEs with this package's ops, and this package's SAEs as custom SAEs (tested with sae-bench 0.6).

SAEBench needs from an SAE: W_enc, W_dec, b_enc, b_dec, `cfg`, `device`, `dtype`, `to`, dense `encode` and `decode`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sae_bench.custom_saes import batch_topk_sae, jumprelu_sae, relu_sae, topk_sae
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor, nn

from gemmascope_fast.dropin import core as shared
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE


class Accelerated(BaseSAE):
    """Base of the subclasses; `encode_sparse` and `prepare` are additions to SAEBench's interface."""

    subtracts_b_dec = True

    @property
    def core(self) -> JumpReLUSAE:
        """This package's module over the same parameters."""
        held = self.__dict__.setdefault("_core", shared.Core())
        by_threshold = not hasattr(self, "k") or self.use_threshold
        return held.of(self, None if by_threshold else int(self.k), not self.subtracts_b_dec)

    def prepare(self, force: bool = False, **options: Any) -> Accelerated:
        """Like `gsf.JumpReLUSAE.prepare`."""
        self.core.prepare(force, **options)
        return self

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """The result of `encode`, as SparseLatents [..., d_sae]."""
        return self.core.encode_sparse(x - self.b_dec if self.subtracts_b_dec else x)

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_sparse(x).to_dense()

    def decode(self, feature_acts: Tensor | SparseLatents) -> Tensor:
        return shared.decode(self.core, feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode_sparse(x))


class AcceleratedJumpReluSAE(Accelerated, jumprelu_sae.JumpReluSAE):
    subtracts_b_dec = False


class AcceleratedReluSAE(Accelerated, relu_sae.ReluSAE):
    pass


class _Global(Accelerated):
    """Top-k, or one threshold for all features: a buffer, which is expanded to a vector for the core."""

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        core = self.core
        if self.use_threshold:
            value = float(self.threshold)
            if value < 0:
                raise ValueError(f"threshold: expected a threshold that was set, at least 0, got {value}")
            held = self.__dict__.get("_vector")
            if held is None or core.threshold is not held or value != self.__dict__["_value"]:
                held = nn.Parameter(torch.full_like(core.b_enc, value), requires_grad=False)
                self.__dict__["_value"], self.__dict__["_vector"], core.threshold = value, held, held
        return core.encode_sparse(x - self.b_dec)


class AcceleratedTopKSAE(_Global, topk_sae.TopKSAE):
    pass


class AcceleratedBatchTopKSAE(_Global, batch_topk_sae.BatchTopKSAE):
    pass


CLASSES: dict[type, type] = {
    jumprelu_sae.JumpReluSAE: AcceleratedJumpReluSAE,
    relu_sae.ReluSAE: AcceleratedReluSAE,
    topk_sae.TopKSAE: AcceleratedTopKSAE,
    batch_topk_sae.BatchTopKSAE: AcceleratedBatchTopKSAE,
}


def accelerate(target: Any, inplace: bool | None) -> Any:
    """See `gemmascope_fast.dropin.accelerate`."""
    if isinstance(target, Accelerated):
        return target
    fast = CLASSES.get(type(target))
    if fast is None:
        names = ", ".join(cls.__name__ for cls in CLASSES)
        raise TypeError(f"target: expected one of SAEBench's {names}, got {type(target).__name__}")
    made = target if inplace else copy.deepcopy(target)
    made.__class__ = fast
    return made


def custom_sae(sae: JumpReLUSAE, model_name: str, layer: int, hook_name: str | None = None) -> Any:
    """Convert one of this package's SAEs for SAEBench; the weights are shared.

    Raises TypeError for anything but a JumpReLU SAE.
    """
    if sae.kind != "sae":
        raise TypeError(f"sae: expected a JumpReLU SAE, got {type(sae).__name__}")
    with torch.device("meta"):
        made = jumprelu_sae.JumpReluSAE(
            sae.d_in, sae.d_sae, model_name, layer, torch.device("meta"), sae.dtype, hook_name
        )
    for name in shared.SHARED:
        setattr(made, name, getattr(sae, name))
    made.device, made.cfg.architecture = sae.device, "jumprelu"
    made.__class__ = AcceleratedJumpReluSAE
    return made
