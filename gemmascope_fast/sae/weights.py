"""What the weights of an SAE must be, and how the encoder's rows are laid out."""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._library import expect_tensor


def as_rows(W_enc: Tensor) -> Tensor:
    """The same [d_in, d_sae] values as the transposed view of contiguous [d_sae, d_in] storage."""
    rows = W_enc.t()
    return W_enc if rows.is_contiguous() else rows.contiguous().t()


def check_weights(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor) -> None:
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


def check_threshold(threshold: Tensor) -> None:
    """Raise ValueError where a threshold is not finite."""
    if threshold.is_meta:
        return
    bad = (~torch.isfinite(threshold.detach())).nonzero()
    if bad.numel():
        raise ValueError(
            f"threshold: expected finite values, got {threshold[bad[0, 0]].item()} at feature {int(bad[0, 0])}"
        )
