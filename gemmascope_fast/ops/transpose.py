"""Op `csr_transpose`: a stable counting sort of (row, column) pairs by column.

Backward passes use it to read gradients feature by feature, so no kernel needs float atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import check_csr, row_indices
from gemmascope_fast.ops._library import Cost, register

SCHEMA = (
    "csr_transpose(Tensor crow_indices, Tensor col_indices, int columns)"
    " -> (Tensor ccol_indices, Tensor row_indices, Tensor order)"
)


def csr_transpose_reference(crow_indices: Tensor, col_indices: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns offsets int64 [columns+1], rows int32 [nnz] ascending within a column, and order int64 [nnz]: entry i of
    the transpose is entry order[i] of the original."""
    if columns < 0:
        raise ValueError(f"columns: expected 0 or more, got {columns}")
    check_csr(crow_indices, col_indices, columns)
    col = col_indices.long()
    ccol = torch.zeros(columns + 1, dtype=torch.int64, device=col.device)
    ccol[1:] = torch.bincount(col, minlength=columns).cumsum(0)
    order = torch.sort(col, stable=True).indices
    return ccol, row_indices(crow_indices)[order].to(torch.int32), order


def _fake(crow_indices: Tensor, col_indices: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        crow_indices.new_empty(columns + 1),
        col_indices.new_empty(col_indices.shape),
        crow_indices.new_empty(col_indices.shape),
    )


def _cost(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Cost:
    return Cost(bytes=8 * (crow_indices.numel() + columns) + 20 * col_indices.numel(), flops=0)


csr_transpose = register(SCHEMA, csr_transpose_reference, _fake, _cost)
