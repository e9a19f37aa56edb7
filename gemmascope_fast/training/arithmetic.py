"""The floating-point type for training and measuring a model: bf16 if the machine multiplies it natively, else fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def products(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16, or float32 on a CPU for which oneDNN has no bf16 products, or if torch was built without oneDNN.

    There torch widens every operand and does not use oneDNN: 1,024 tokens through 2048 × 640 took 146 ms, against 29 in
    fp32 (two cores of Zen 3), and a step of QAT, 33 s in fp32, did not finish in eight minutes.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has else torch.float32


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """Matrix products within the block use `products(device)`; weights must be fp32, or of that type."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=products(device) is torch.bfloat16)


@contextmanager
def widened(model: nn.Module, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within the block the model is fp32 if its products are; after it, each tensor has its original type."""
    if products(device) is torch.bfloat16:
        yield
        return
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    before = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
