"""A bank in suite `modules`: x → x̂ by one of its SAEs after another, as the layers of a model ask for them."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.bank import Bank
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import Case, forget_copies, sae_copies
from gemmascope_fast.dev.bench.checks import Truth
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Verdict, Work, WrongAnswer
from gemmascope_fast.dev.bench.work import dense_sae_work, full_work, sae_work

LEAST = 2  # of fewer SAEs none would have to leave for another


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
