"""Exact encode compared with eager fp32 and bf16.  Verified against fp64 before timing."""

import pytest
import torch
from cases import IDS, RUNS, eager_encode, rotated

from gemmascope_fast.dev.testing import compare_support

# name: (call, dtype of weights and activations)
PEERS = {
    "ours": (lambda sae, x: sae.encode_sparse(x), torch.float32),
    "ours, no screen": (lambda sae, x: sae.encode_sparse(x, screen=False), torch.float32),
    "eager fp32": (eager_encode, torch.float32),
    "eager bf16": (eager_encode, torch.bfloat16),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("case", "tokens"), RUNS, ids=IDS)
def bench_encode(benchmark, case, tokens, peer):
    sae, x = case.sae, case.x(tokens)
    call, dtype = PEERS[peer]
    if peer.startswith("ours"):
        check = compare_support(call(sae, x), x, sae)
        assert check.equal, check
    following, x = rotated(sae, tokens, dtype), x.to(dtype)
    benchmark.group = f"encode {case.name} T={tokens}"
    benchmark.extra_info.update(case=case.name, tokens=tokens, flops=2 * tokens * sae.W_enc.numel())
    benchmark(lambda: call(following(), x))
