"""The whole SAE, encode and decode, compared with eager PyTorch and torch.compile.  Verified before timing."""

import pytest
import torch
from cases import IDS, RUNS, compiled_sae, eager_sae, rotated

from gemmascope_fast.dev.testing import compare_support

PEERS = ("ours", "eager fp32", "eager bf16", "torch.compile fp32")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("case", "tokens"), RUNS, ids=IDS)
def bench_sae(benchmark, case, tokens, peer):
    sae, x = case.sae, case.x(tokens)
    if peer == "ours":
        check = compare_support(sae.encode_sparse(x), x, sae)
        assert check.equal, check
        # compared with the dense fp64 product of the same latents: only a few hundred terms' rounding is left
        dense = sae.encode(x).double()
        exact = dense @ sae.W_dec.double() + sae.b_dec.double()
        size = dense @ sae.W_dec.abs().double() + sae.b_dec.abs().double()
        terms = int((dense != 0).sum(-1).max()) + 2
        assert bool(((sae(x).double() - exact).abs() <= 1.01 * terms * 2.0**-24 * size).all())
    call = {"ours": lambda s, t: s(t), "torch.compile fp32": compiled_sae()}.get(peer, eager_sae)
    dtype = torch.bfloat16 if peer == "eager bf16" else torch.float32
    following, x = rotated(sae, tokens, dtype), x.to(dtype)
    benchmark.group = f"SAE {case.name} T={tokens}"
    benchmark.extra_info.update(case=case.name, tokens=tokens)
    benchmark(lambda: call(following(), x))
