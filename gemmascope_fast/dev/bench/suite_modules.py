"""Suite `modules`: whole SAEs, transcoders and banks, encode and decode together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import WEIGHTS, Case, rotated, rotated_dense, sae_copies
from gemmascope_fast.dev.bench.checks import Truth
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Work
from gemmascope_fast.dev.bench.suite_bank import bank_bench
from gemmascope_fast.dev.bench.work import dense_sae_work, encode_work, sae_work
from gemmascope_fast.dev.testing import make_sae
from gemmascope_fast.sae.jumprelu import JumpReLUTranscoder


def modules_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    for case in cases:
        for T in tokens or case.tokens:
            yield Plan("modules", "SAE", T, case.d_in, case.d_sae, functools.partial(sae_bench, case, T))
        most = max(tokens or case.tokens)
        build = functools.partial(transcoder_bench, case, most)
        yield Plan("modules", "transcoder", most, case.d_in, case.d_sae, build)
        for T in dict.fromkeys((min(tokens or case.tokens), most)):
            yield Plan("modules", "bank", T, case.d_in, case.d_sae, functools.partial(bank_bench, case, T))


def sae_bench(case: Case, T: int) -> Bench:
    """x → x̂ against eager PyTorch, torch.compile, SAELens, and the dense encode followed by embedding_bag."""
    sae, x = case.sae, case.x(T)
    truth, latents = Truth(sae, x), sae.encode_sparse(x)
    bench = Bench("modules", "SAE", T, case.d_in, case.d_sae, latents.nnz / T)
    pools: dict[str, Callable[[], Any]] = {
        "ours": rotated(sae, T),
        "fp32": rotated_dense(sae, T),
        "bf16": rotated(sae, T, torch.bfloat16),
    }

    def add(name: str, dtype: str, call: Callable[[Any, Tensor], Tensor], work: Work) -> None:
        def build() -> Candidate:
            of, xs = pools["ours" if name == "ours" else dtype], x if dtype == "fp32" else x.bfloat16()
            own = of()
            verdict = truth.reconstruction(call(own, xs), dtype)
            warm = (lambda: call(own, xs)) if sae_copies(sae.W_enc.numel(), T) > 1 else None
            return Candidate(name, dtype, lambda: call(of(), xs), work, verdict, warm)

        bench.add(name, build)

    dense, half = dense_sae_work(sae, T), dense_sae_work(sae, T, 2, None)
    add("ours", "fp32", lambda s, t: s(t), sae_work(sae, x, latents))
    add("eager fp32", "fp32", peers.eager_sae, dense)
    add("eager bf16", "bf16", peers.eager_sae, half)
    add("F.linear + embedding_bag, bf16", "bf16", peers.bag_sae, half)
    add("torch.compile fp32", "fp32", peers.compiled_sae(), dense)
    add("SAELens fp32", "fp32", _saelens(), dense)
    return bench


def _saelens() -> Callable[[peers.Weights, Tensor], Tensor]:
    """SAELens's module of each SAE, made once."""
    made: dict[int, Any] = {}

    def call(sae: peers.Weights, x: Tensor) -> Tensor:
        if id(sae) not in made:
            made[id(sae)] = peers.saelens_sae(sae)
        return made[id(sae)](x)

    return call


def transcoder_bench(case: Case, T: int) -> Bench:
    """A transcoder: reads d_in, writes another site of the same width."""
    drawn = make_sae(5, case.d_in, case.d_sae, case.l0, d_out=case.d_in)
    weights_of = {name: getattr(drawn, name).detach() for name in WEIGHTS}
    module = JumpReLUTranscoder.from_weights(**weights_of).requires_grad_(False).prepare()
    x = case.x(T)
    truth = Truth(module, x)
    bench = Bench("modules", "transcoder", T, case.d_in, case.d_sae, module.encode_sparse(x).nnz / T)
    wide = peers.Dense.of(module)
    calls: dict[str, tuple[Callable[[], Tensor], Work]] = {
        "ours": (lambda: module(x), encode_work(module, x)),
        "eager fp32": (lambda: peers.eager_sae(wide, x), dense_sae_work(module, T)),
    }
    for name, (call, work) in calls.items():
        bench.candidates.append(Candidate(name, "fp32", call, work, truth.reconstruction(call())))
    return bench
