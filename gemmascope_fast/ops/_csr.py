"""Helpers for compressed sparse rows as torch tensors, shared by the references."""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._transforms import refuse_samples


def row_indices(crow_indices: Tensor) -> Tensor:
    """Row of each stored entry: int64 [nnz], from offsets [N+1]."""
    counts = crow_indices.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)


def from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(crow_indices int64 [N+1], col_indices int32 [nnz]) of the true entries of a [N, F] mask."""
    refuse_samples(mask, "sparse latents")
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    crow[1:] = mask.sum(dim=1).cumsum(0)
    return crow, mask.nonzero()[:, 1].to(torch.int32)


def check_csr(crow_indices: Tensor, col_indices: Tensor, features: int) -> None:
    """The same checks as in the native kernels, for the references."""
    if crow_indices.dtype != torch.int64:
        raise TypeError(f"crow_indices: expected int64, got {crow_indices.dtype}")
    if col_indices.dtype != torch.int32:
        raise TypeError(f"col_indices: expected int32, got {col_indices.dtype}")
    nnz = col_indices.numel()
    if crow_indices.dim() != 1 or crow_indices.numel() < 1:
        raise ValueError(f"crow_indices: expected a vector [N+1], got {tuple(crow_indices.shape)}")
    if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != nnz or bool((crow_indices.diff() < 0).any()):
        raise ValueError(f"crow_indices: expected offsets from 0 to {nnz} that never fall")
    check_columns(col_indices, features)


def check_columns(col_indices: Tensor, features: int) -> None:
    """Raise IndexError naming the first column [nnz] outside [0, features)."""
    wrong = (col_indices < 0) | (col_indices >= features)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"col_indices: expected values in [0, {features}), got {int(col_indices[at])} at position {at}"
        )
