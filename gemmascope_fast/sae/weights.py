"""Checks of an SAE's weights, and detection of changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gemmascope_fast.backends import same_bytes
from gemmascope_fast.ops._library import expect_tensor


class EncoderWeights(NamedTuple):
    """What an encode reads: W_enc [d_in, d_sae], b_enc [d_sae] and threshold [d_sae]."""

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor


Fingerprint = tuple[Any, ...]


def fingerprint(*tensors: Tensor) -> Fingerprint:
    """What can show an edit without reading the data. Each tensor's identity comes first."""
    return tuple(
        (id(t), t.data_ptr(), t.dtype, t.device, t.shape, t.stride(), None if t.is_inference() else t._version)
        for t in tensors
    )


class WeightWatch:
    """Detects changes of the encoder's weights.

    Without reading data it detects another tensor, storage, dtype, device, shape or strides, and every edit that
    raises PyTorch's version counter.  Other edits (`p.data.mul_()`, numpy aliases, fused optimizers, inference
    tensors) are detected in b_enc and threshold, which are compared with copies (`vectors_changed`). In W_enc they
    cannot be detected.
    """

    def __init__(self) -> None:
        self.changes = 0  # number of changes seen; an address alone does not show one, as new weights may reuse it
        self._seen: Fingerprint | None = None
        self._storages: tuple[StorageWeakRef, ...] = ()  # to notice that storage was freed and its address reused
        self._vectors: tuple[Tensor, Tensor] | None = None

    def changed(self, weights: EncoderWeights) -> bool:
        """Whether these differ from the weights last noted, as far as can be told without reading them."""
        return self._seen != fingerprint(*weights) or any(s.expired() for s in self._storages)

    def note(self, weights: EncoderWeights) -> None:
        """Remember these weights as the current ones."""
        self._seen = fingerprint(*weights)
        self._storages = tuple(StorageWeakRef(t.untyped_storage()) for t in weights)
        self._vectors = None
        self.changes += 1

    def keep_vectors(self, weights: EncoderWeights) -> None:
        """Keep copies of b_enc and threshold for `vectors_changed`."""
        self._vectors = weights.b_enc.detach().clone(), weights.threshold.detach().clone()

    def vectors_changed(self, weights: EncoderWeights) -> bool:
        """Whether b_enc or threshold differ in any byte from the copies; False if there are no copies.

        On CPU it takes 4 µs at 4,096 features and 9 µs at 16,384, under 1 % of the time of encoding one token.
        """
        if self._vectors is None:
            return False
        return not all(
            same_bytes(now, then) for now, then in zip((weights.b_enc, weights.threshold), self._vectors, strict=True)
        )


def check_weights(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> None:
    """Raise ValueError or TypeError unless the weights are floating tensors of one dtype and device with matching
    shapes
    and finite thresholds."""
    named = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
    for name, tensor in named.items():
        expect_tensor(name, tensor)
        want_dim = 2 if name.startswith("W") else 1
        if tensor.dim() != want_dim:
            raise ValueError(f"{name}: expected {want_dim} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != W_enc.dtype or tensor.device != W_enc.device:
            raise ValueError(
                f"{name}: expected {W_enc.dtype} on {W_enc.device}, like W_enc, got {tensor.dtype} on {tensor.device}"
            )
    d_sae = W_enc.shape[1]
    if W_dec.shape[0] != d_sae:
        raise ValueError(f"W_dec: expected [d_sae = {d_sae}, d_out], got {tuple(W_dec.shape)}")
    for name, size in (("b_enc", d_sae), ("threshold", d_sae), ("b_dec", W_dec.shape[1])):
        if named[name].shape != (size,):
            raise ValueError(f"{name}: expected [{size}], got {tuple(named[name].shape)}")
    check_threshold(threshold)


def check_encoder(weights: EncoderWeights, d_in: int, d_sae: int) -> None:
    """Raise ValueError if the encoder's weights no longer have the SAE's shapes, or a threshold is not finite."""
    for name, tensor, shape in zip(weights._fields, weights, ((d_in, d_sae), (d_sae,), (d_sae,)), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {tuple(tensor.shape)} (the tensor was replaced)")
    check_threshold(weights.threshold)


def check_threshold(threshold: Tensor) -> None:
    """Raise ValueError if a threshold is not finite."""
    if threshold.is_meta:
        return
    bad = (~torch.isfinite(threshold.detach())).nonzero()
    if bad.numel():
        raise ValueError(
            f"threshold: expected finite values, got {threshold[bad[0, 0]].item()} at feature {int(bad[0, 0])}"
        )
