"""Suite `modules`: whole SAEs, transcoders and banks, encode and decode together."""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.bank import Bank
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import WEIGHTS, Case, forget_copies, rotated, rotated_dense, sae_copies
from gemmascope_fast.dev.bench.checks import Truth
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Verdict, Work, WrongAnswer
from gemmascope_fast.dev.bench.work import dense_sae_work, encode_work, full_work, sae_work
from gemmascope_fast.dev.testing import make_sae
from gemmascope_fast.sae.jumprelu import JumpReLUTranscoder

LEAST = 2  # SAEs of a bank: of fewer none would have to leave for another


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
    add("torch.compile fp32", "fp32", peers.compiled(peers.eager_sae), dense)
    saelens = functools.cache(peers.saelens_sae)
    add("SAELens fp32", "fp32", lambda s, t: saelens(s)(t), dense)
    return bench


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


def bank_bench(case: Case, T: int) -> Bench:
    """Banks of equal SAEs, each call by the next one, against eager PyTorch on the very weights, which stay in memory.

    "ours": a budget for all, so that a use costs a lease and the SAE; as many as `sae_copies` says, at least two.
    "ours, budget of one": two in turn, so that every use reads its SAE anew, out of the page cache where that holds the
    file.  The SAEs are links to one file; each has weights of its own once it is read.
    """
    forget_copies()  # the memory that copies may take is for these
    sae, x = case.sae, case.x(T)
    truth, latents = Truth(sae, x), sae.encode_sparse(x)
    bench = Bench("modules", "bank", T, case.d_in, case.d_sae, latents.nnz / T)
    folder = Path(tempfile.mkdtemp(prefix="gemmascope-fast-bench-"))
    weakref.finalize(bench, shutil.rmtree, folder)
    save(sae, folder / "layer_0.safetensors")
    count = max(LEAST, sae_copies(sae.W_enc.numel(), T))
    for layer in range(1, count):
        (folder / f"layer_{layer}.safetensors").symlink_to("layer_0.safetensors")
    several = sae_copies(sae.W_enc.numel(), T) > 1
    want = sae(x)

    resident = Bank(folder)
    # without a screen: packing one costs more than the single use before the SAE leaves
    budget = sum(p.nbytes for p in sae.parameters())
    one_by_one = Bank(folder, device_bytes=budget, screen=False).select(*list(resident)[:LEAST])

    def ours(bank: Bank) -> Verdict:
        """Every SAE of the bank gives fp64's support and the bytes of the SAE that was saved."""
        for name, part in bank.items():
            if not torch.equal(part(x), want):
                raise WrongAnswer(f"{name} of the bank differs from the SAE by itself")
        # the last one, which is still there
        return truth.ours(part.encode_sparse(x))._replace(max_error=truth.reconstruction(want).max_error)

    def in_turn(of: list[Any], call: Callable[[Any, Tensor], Tensor]) -> Callable[[], Tensor]:
        following = itertools.cycle(of).__next__
        return lambda: call(following(), x)

    def all_resident() -> Candidate:
        verdict, parts = ours(resident), list(resident.values())
        if resident.stats.loads != count:
            raise AssertionError(f"bank: {count} SAEs in a budget for all were read {resident.stats.loads} times")
        warm = (lambda: parts[0](x)) if several else None
        return Candidate("ours", "fp32", in_turn(parts, lambda s, t: s(t)), sae_work(sae, x, latents), verdict, warm)

    def read_anew() -> Candidate:
        verdict, file = ours(one_by_one), (folder / "layer_0.safetensors").stat().st_size
        if one_by_one.stats.loads != LEAST:
            raise AssertionError(f"bank: a budget of one SAE read {one_by_one.stats.loads} for {LEAST} uses")
        moved = Work(2 * file + full_work(sae, x).bytes, full_work(sae, x).flops, None)  # read, written, used
        call = in_turn(list(one_by_one.values()), lambda s, t: s(t))
        return Candidate("ours, budget of one", "fp32", call, moved, verdict)

    def eager() -> Candidate:
        wide = []
        for name in resident:
            with resident.use(name) as module:
                wide.append(peers.Dense.of(module))
        verdict = truth.reconstruction(peers.eager_sae(wide[0], x))
        warm = (lambda: peers.eager_sae(wide[0], x)) if several else None
        return Candidate("eager fp32", "fp32", in_turn(wide, peers.eager_sae), dense_sae_work(sae, T), verdict, warm)

    for name, build in (("ours", all_resident), ("ours, budget of one", read_anew), ("eager fp32", eager)):
        bench.add(name, build)
    return bench
