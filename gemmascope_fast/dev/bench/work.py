"""The least that an encode or a whole SAE must move and compute, by the route that serves."""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.dev.bench.engine import Work
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import pays


def uses_screen(sae: JumpReLUSAE, x: Tensor) -> bool:
    """Whether `screen=None` takes the certified screen for this many tokens."""
    return pays(x, sae.W_enc)


def full_work(sae: JumpReLUSAE, x: Tensor) -> Work:
    cost = ops.encode.cost(x, sae.W_enc)
    return Work(cost.bytes, cost.flops, "fp32")


def screened_work(sae: JumpReLUSAE, x: Tensor) -> Work:
    """The least the certified screen can do: every weight's first digit once, and the fp32 rows of what fires."""
    latents = sae.encode_sparse(x)
    rows = len(torch.unique(latents.col_indices))
    return Work(
        sae.W_enc.numel() + 4 * rows * sae.d_in + x.numel() * x.element_size(),
        2 * len(x) * sae.W_enc.numel(),
        "int8",
    )


def encode_work(sae: JumpReLUSAE, x: Tensor) -> Work:
    """Of the route that `screen=None` takes."""
    return screened_work(sae, x) if uses_screen(sae, x) else full_work(sae, x)


def sae_work(sae: JumpReLUSAE, x: Tensor, latents: SparseLatents) -> Work:
    """x → x̂ by this package: the encode, the decoder's rows of what fires, and x̂."""
    encode, rows = encode_work(sae, x), len(torch.unique(latents.col_indices))
    return Work(encode.bytes + 4 * rows * sae.d_in + 4 * x.numel(), encode.flops, encode.arithmetic)


def dense_sae_work(sae: JumpReLUSAE, T: int, size: int = 4, arithmetic: str | None = "fp32") -> Work:
    """x → x̂ by dense products of `size` bytes a number."""
    weights, flow = 2 * sae.W_enc.numel(), 2 * T * (sae.d_in + sae.d_sae)
    return Work(size * (weights + flow), 2 * T * weights, arithmetic)
