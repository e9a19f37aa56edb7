"""Suite `topk`: the encode of top-k SAEs, screened and not, against eager PyTorch and other libraries' own code."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import Case, copies, sae_copies
from gemmascope_fast.dev.bench.checks import CHECKED_TOKENS, UNIT
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Verdict, Work, WrongAnswer
from gemmascope_fast.dev.testing import dot_bound, pre_activations64
from gemmascope_fast.ops.encode import kappa
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.topk import TopKSAE

KS = (50, 100)


def topk_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    for case in cases:
        for k in KS:
            for T in tokens or case.tokens:
                build = functools.partial(topk_bench, case, k, T)
                yield Plan("topk", f"top-{k} encode", T, case.d_in, case.d_sae, build)


class Ranking:
    """fp64 pre-activations of the first tokens of x: which pairs are certainly among the k greatest, and which not."""

    def __init__(self, sae: TopKSAE, x: Tensor) -> None:
        self.x = x[:CHECKED_TOKENS]
        self.z = pre_activations64(self.x, sae)
        self.bound = dot_bound(self.x, sae.W_enc, sae.b_enc)
        self.size = self.bound / kappa(sae.d_in)
        self.k = sae.k

    def verdict(self, found: SparseLatents | Tensor, dtype: str, ours: bool = False) -> Verdict:
        """Raises WrongAnswer where a pair is chosen, left out or valued otherwise than rounding explains."""
        dense = (found.to_dense() if isinstance(found, SparseLatents) else found)[: len(self.x)].double()
        error = self.bound if ours else 16 * self.bound  # any order of summation: 16 lanes make the bound 16 smaller
        if dtype != "fp32":
            error = 1.01 * 4 * UNIT[dtype] * self.size + self.bound
        stored = dense != 0
        off = float((torch.where(stored, (dense - self.z).abs(), 0.0) / error).max())
        if off > 1:
            raise WrongAnswer(f"a latent's error is {off:.2g} times what {dtype} arithmetic allows")
        least = (self.z - error).clamp(min=0).topk(self.k).values[:, -1:]  # k pairs are certainly at least this
        most = (self.z + error).topk(self.k).values[:, -1:]  # and no more than k - 1 certainly above this
        wrong = stored & (self.z + error < least) | ~stored & (self.z - error > most)
        if bool(wrong.any()):
            raise WrongAnswer(f"{int(wrong.sum())} pairs are chosen otherwise than {dtype} arithmetic allows")
        exact = torch.zeros_like(stored).scatter_(1, self.z.topk(self.k).indices, True) & (self.z > 0)
        return Verdict(float((dense - self.z)[stored].abs().max()), bool((exact == stored).all()))


def _topk(own: JumpReLUSAE, k: int) -> TopKSAE:
    """A top-k SAE over the weights of a JumpReLU SAE, with its screen."""
    weights = {name: getattr(own, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    made = TopKSAE(**weights, threshold=torch.zeros(own.d_sae), k=k).requires_grad_(False)
    made.prepare()
    return made


def topk_bench(case: Case, k: int, T: int) -> Bench:
    x, count = case.x(T), sae_copies(case.sae.W_enc.numel(), T)
    pool = [_topk(own, k) for own in copies(case.sae, count, packed=False)]  # with few tokens each call takes the next
    sae, following = pool[0], itertools.cycle(pool).__next__
    ranking = Ranking(sae, x)
    bench = Bench("topk", f"top-{k} encode", T, case.d_in, case.d_sae, float(k))
    cost = ops.encode_topk.cost(x, sae.W_enc)
    screened = Work(sae.W_enc.numel() + 4 * k * case.d_in + x.nbytes, cost.flops, "int8")

    def add(name: str, dtype: str, call: Callable[[], Any], work: Work, ours: bool = False) -> None:
        def build() -> Candidate:
            return Candidate(name, dtype, call, work, ranking.verdict(call(), dtype, ours))

        bench.add(name, build)

    wide = itertools.cycle([peers.Dense.of(own) for own in pool]).__next__
    narrow = itertools.cycle([(own.W_enc.bfloat16(), own.b_enc.bfloat16()) for own in pool]).__next__
    dense = Work(4 * (sae.W_enc.numel() + T * (case.d_in + case.d_sae)), cost.flops)
    half = Work(dense.bytes // 2, cost.flops, None)
    x16 = x.bfloat16()

    def eager() -> Tensor:
        own = wide()
        return peers.eager_topk(x, own.W_enc, own.b_enc, k)

    add("ours", "fp32", lambda: following().encode_sparse(x), screened, True)
    add(
        "ours, no screen",
        "fp32",
        lambda: following().encode_sparse(x, screen=False),
        Work(cost.bytes, cost.flops),
        True,
    )
    add("eager fp32", "fp32", eager, dense)
    add("eager bf16", "bf16", lambda: peers.eager_topk(x16, *narrow(), k), half)
    return bench
