"""The SAEs and activations that are timed, for `gemmascope-fast dev bench` and for benchmarks/.

Gemma Scope's shapes have synthetic weights and activations: `make_sae` and `make_activations`
(gemmascope_fast.dev.testing) give the spectrum, the mean and the massive dimension of a Gemma residual stream, and
thresholds at which l0 features fire.  They are kinder to the screen than real ones: with one digit of the activations,
0.3 % of pairs are refined and do not fire, 1.5 to 1.7 % in case `real`.

With few tokens, a timing takes the next of several copies of the weights at each call.  Together they exceed four times
the last-level cache, so that weights are read from memory.  There are fewer copies if half of the memory holds no more:
a virtual machine of few cores may see the last-level cache of a whole processor (300 MiB).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.attach import Activations, attach
from gemmascope_fast.checkpoints.bundled import load_demo
from gemmascope_fast.dev.bench.machine import total_memory
from gemmascope_fast.dev.bench.peers import Dense
from gemmascope_fast.dev.roof import last_level_cache
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.training.text import pydoc_topics

FEW_TOKENS = 16
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


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


class Real(Case):
    """The bundled SAE on activations of Gemma 3 270M, up to 1,024 tokens of a text.  Needs the extra `demo`."""

    @functools.cached_property
    def _loaded(self) -> tuple[JumpReLUSAE, Tensor]:
        model, tokenizer, sae, layer = load_demo()
        ids = tokenizer(pydoc_topics()[-60_000:], return_tensors="pt")["input_ids"][:, : 5 * 256]
        with torch.no_grad(), attach(model, {layer: Activations()}, tokens="all") as run:
            for part in ids.split(256, 1):
                model(part)
        x = (
            run.activations[layer].float().unflatten(0, (-1, 256))[:, 1:]
        )  # the first of a window sees nothing before it
        return sae.requires_grad_(False), x.flatten(0, 1)[:1024].contiguous()

    @property
    def sae(self) -> JumpReLUSAE:  # type: ignore[override]
        return self._loaded[0]

    def x(self, tokens: int) -> Tensor:
        if tokens > len(self._loaded[1]):
            raise ValueError(f"tokens: expected at most {len(self._loaded[1])} of case real, got {tokens}")
        return self._loaded[1][:tokens]


SMALL = Case("640x4096", 640, 4096, 73)
GEMMA_SCOPE = Case("2304x16384", 2304, 16384, 76, (1, 4, 16, 64, 256, 1024))
BROAD = Case("3584x16384", 3584, 16384, 76, (1, 16, 256))
WIDE = Case("2304x65536", 2304, 65536, 80, (1, 16, 256))
REAL = Real("real", 640, 4096, 73, (1, 16, 64, 256, 1024))
CASES = {c.name: c for c in (SMALL, GEMMA_SCOPE, BROAD, WIDE, REAL)}


# What an encoder's weight takes in a copy of an SAE with those of its peers: encoder and decoder in fp32 and the screen
# (10 bytes), the dense layout of the encoder (4), encoder and decoder in bf16 (4).
SAE_COPY_BYTES = 18


def copy_count(weight_bytes: int, tokens: int, held_bytes: int | None = None) -> int:
    """How many copies of weights of that size exceed four times the last-level cache, or half of the memory holds
    where that is fewer, a copy taking `held_bytes` (default: weight_bytes) of it; 1 for many tokens."""
    if tokens > FEW_TOKENS:
        return 1
    wanted, held = -(-4 * last_level_cache() // weight_bytes), total_memory() // 2 // (held_bytes or weight_bytes)
    return max(1, min(wanted, held))


def sae_copies(weights: int, tokens: int) -> int:
    """`copy_count` of SAEs with so many encoder weights, of which the screen reads one byte each."""
    return copy_count(weights, tokens, SAE_COPY_BYTES * weights)


def cache_exceeded(weights: int) -> float:
    """How many times the last-level cache the 8-bit encoder rows of those copies take: less than 4 where memory is
    short."""
    return sae_copies(weights, 1) * weights / last_level_cache()


def copies(sae: JumpReLUSAE, count: int, dtype: torch.dtype = torch.float32, packed: bool = True) -> list[JumpReLUSAE]:
    """Equal SAEs in `dtype`; those in fp32 have their screens if `packed`, 16-bit ones are for dense peers."""
    made = []
    for _ in range(count):
        copy = JumpReLUSAE(*(getattr(sae, n).detach().to(dtype, copy=True) for n in WEIGHTS)).requires_grad_(False)
        made.append(copy.prepare() if packed and dtype == torch.float32 else copy)
    return made


# of one shape, in fp32 and bf16: making and packing them takes seconds
_copies = functools.lru_cache(maxsize=2)(copies)


def rotated(sae: JumpReLUSAE, tokens: int, dtype: torch.dtype = torch.float32) -> Callable[[], JumpReLUSAE]:
    """Each call gives the next of several equal SAEs, in `dtype`.

    Where tokens are few there are enough of them that even their 8-bit encoder rows exceed four times the last-level
    cache, if memory allows (`cache_exceeded`).
    """
    return itertools.cycle(_copies(sae, sae_copies(sae.W_enc.numel(), tokens), dtype)).__next__


def rotated_dense(sae: JumpReLUSAE, tokens: int) -> Callable[[], Dense]:
    """As `rotated` in fp32, laid out for dense products; the decoders are shared with those copies."""
    return itertools.cycle(_dense(sae, sae_copies(sae.W_enc.numel(), tokens))).__next__


@functools.lru_cache(maxsize=1)
def _dense(sae: JumpReLUSAE, count: int) -> list[Dense]:
    return [Dense.of(copy) for copy in _copies(sae, count, torch.float32)]


def forget_copies() -> None:
    """Let go of the copies that `rotated` and `rotated_dense` keep for the next bench of the same shape."""
    _copies.cache_clear()
    _dense.cache_clear()
