"""Cases and peers of every benchmark: Gemma Scope's shapes with calibrated synthetic SAEs.

`make_sae` and `make_activations` (gemmascope_fast.testing) give the spectrum, the mean and the massive dimension of
a Gemma residual stream and an L0 of about 76.  A timing for few tokens goes round enough copies of the weights to
exceed four times the last-level cache, so that it reads memory and not cache.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast import JumpReLUSAE, SparseLatents
from gemmascope_fast.testing import make_activations, make_sae

L3_BYTES = int(os.environ.get("GSF_BENCH_L3", "33554432"))
FEW_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One shape.  `tokens` are the numbers of tokens timed."""

    name: str
    d_in: int
    d_sae: int
    l0: float
    tokens: tuple[int, ...] = (1, 16, 256)

    @functools.cached_property
    def sae(self) -> JumpReLUSAE:
        return make_sae(0, self.d_in, self.d_sae, self.l0).requires_grad_(False)

    def x(self, tokens: int) -> Tensor:
        return make_activations(7, tokens, self.d_in)


SMALL = Case("640x4096", 640, 4096, 73)
GEMMA_SCOPE = Case("2304x16384", 2304, 16384, 76)
WIDE = Case("2304x65536", 2304, 65536, 80, (1, 16))
BROAD = Case("3584x16384", 3584, 16384, 76)
CASES = {c.name: c for c in (SMALL, GEMMA_SCOPE, WIDE, BROAD)}
# what `make bench` times; GSF_BENCH_CASES=640x4096,2304x65536 names others
CHOSEN = os.environ.get("GSF_BENCH_CASES", "640x4096,2304x16384").split(",")
RUNS = [(CASES[name], tokens) for name in CHOSEN for tokens in CASES[name].tokens]
IDS = [f"{case.name}-T{tokens}" for case, tokens in RUNS]


def copies(
    sae: JumpReLUSAE,
    count: int | None = None,
    dtype: torch.dtype = torch.float32,
    bytes_each: int | None = None,
    prepare: bool = True,
) -> list[JumpReLUSAE]:
    """Equal SAEs in `dtype`; unless told how many, so many that `bytes_each` (default: their 8-bit encoder rows)
    together exceed four times the last-level cache."""
    if count is None:
        count = -(-4 * L3_BYTES // (bytes_each or sae.W_enc.numel()))
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    made = []
    for _ in range(count):
        copy = JumpReLUSAE(*(getattr(sae, n).detach().to(dtype, copy=True) for n in names)).requires_grad_(False)
        made.append(copy.prepare() if prepare else copy)
    return made


def rotated(sae: JumpReLUSAE, tokens: int, dtype: torch.dtype = torch.float32) -> Callable[[], JumpReLUSAE]:
    """Each call gives the next of several equal SAEs; where tokens are few, enough of them to exceed the cache."""
    return itertools.cycle(copies(sae, 1 if tokens > FEW_TOKENS else None, dtype)).__next__


# ---- peers: the same tensors, in the same process ---------------------------------------------------


def eager_encode(sae: JumpReLUSAE, x: Tensor) -> Tensor:
    """Dense JumpReLU as one writes it in PyTorch."""
    z = torch.addmm(sae.b_enc, x, sae.W_enc)
    return torch.relu(z) * (z > sae.threshold)


def eager_decode(sae: JumpReLUSAE, latents: Tensor) -> Tensor:
    return torch.addmm(sae.b_dec, latents, sae.W_dec)


def eager_sae(sae: JumpReLUSAE, x: Tensor) -> Tensor:
    return eager_decode(sae, eager_encode(sae, x))


def compiled_sae() -> Callable[[JumpReLUSAE, Tensor], Tensor]:
    """The dense SAE under torch.compile (inductor)."""
    torch._dynamo.reset()
    return torch.compile(eager_sae, dynamic=False)


def embedding_bag_decode(sae: JumpReLUSAE, latents: SparseLatents) -> Tensor:
    """torch's own sparse decode: a weighted sum of rows, then the bias.  The fastest of torch's for this."""
    bags = torch.nn.functional.embedding_bag(
        latents.col_indices,
        sae.W_dec,
        latents.crow_indices.to(torch.int32),
        mode="sum",
        per_sample_weights=latents.values,
        include_last_offset=True,
    )
    return bags + sae.b_dec
