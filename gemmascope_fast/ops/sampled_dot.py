"""Op `sampled_dot`: dot products of selected (token, feature) pairs, x[n] · rows[f] (+ bias[f]), for a CSR pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import check_csr, row_indices
from gemmascope_fast.ops._library import Cost, register

SCHEMA = "sampled_dot(Tensor x, Tensor rows, Tensor? bias, Tensor crow_indices, Tensor col_indices) -> Tensor"


def sampled_dot_reference(
    x: Tensor, rows: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor
) -> Tensor:
    """x [N, d], rows [F, d], bias [F] or None, pattern [N, F] → fp32 [nnz]."""
    check_sampled_dot(x, rows, bias, crow_indices, col_indices)
    col = col_indices.long()
    z = (x[row_indices(crow_indices)].float() * rows[col].float()).sum(-1)
    return z if bias is None else z + bias.float()[col]


def check_sampled_dot(x: Tensor, rows: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor) -> None:
    """What the native kernel checks, for the reference and the GPU."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() != 2 or rows.dim() != 2 or x.shape[1] != rows.shape[1]:
        raise ValueError(f"x: expected [N, d] with rows [F, d], got {tuple(x.shape)} and {tuple(rows.shape)}")
    check_csr(crow_indices, col_indices, rows.shape[0])
    if crow_indices.numel() != x.shape[0] + 1:
        raise ValueError(f"crow_indices: expected {x.shape[0] + 1} offsets, got {crow_indices.numel()}")
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"rows: expected float32, bfloat16 or float16, got {rows.dtype}")
    if bias is not None and bias.shape != rows.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(rows.shape[:1])}, got {tuple(bias.shape)}")


def _fake(x: Tensor, rows: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    return x.new_empty(col_indices.shape[0], dtype=torch.float32)


def _cost(x: Tensor, rows: Tensor, bias: Tensor | None, crow_indices: Tensor, col_indices: Tensor) -> Cost:
    nnz, d = col_indices.numel(), rows.shape[1]
    read = min(nnz, rows.shape[0]) * d * rows.element_size() + x.numel() * x.element_size()
    return Cost(bytes=read + 8 * nnz, flops=2 * nnz * d)


sampled_dot = register(SCHEMA, sampled_dot_reference, _fake, _cost)


def tangent_of_dots(
    x: tuple[Tensor, Tensor | None],
    rows: tuple[Tensor, Tensor | None],
    dbias: Tensor | None,
    crow: Tensor,
    col: Tensor,
) -> Tensor:
    """Tangent of x[n] · rows[f] + bias[f] for each pair, fp32 [nnz]; x and rows are given with their tangents."""
    parts = [] if dbias is None else [dbias.float()[col.long()]]
    if x[1] is not None:
        parts.append(sampled_dot.step(x[1], rows[0], None, crow, col))
    if rows[1] is not None:
        parts.append(sampled_dot.step(x[0], rows[1], None, crow, col))
    return sum(parts[1:], parts[0]) if parts else torch.zeros(col.shape, device=x[0].device)
