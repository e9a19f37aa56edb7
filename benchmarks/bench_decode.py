"""Sparse decode compared with torch's embedding_bag and the dense product.  Verified before timing."""

import pytest
import torch
from cases import IDS, RUNS, eager_decode, embedding_bag_decode, rotated

PEERS = {
    "ours": lambda sae, latents, dense: sae.decode(latents),
    "embedding_bag": lambda sae, latents, dense: embedding_bag_decode(sae, latents),
    "dense fp32": lambda sae, latents, dense: eager_decode(sae, dense),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("case", "tokens"), RUNS, ids=IDS)
def bench_decode(benchmark, case, tokens, peer):
    sae = case.sae
    latents = sae.encode_sparse(case.x(tokens))
    dense, call = latents.to_dense(), PEERS[peer]
    exact = dense.double() @ sae.W_dec.double() + sae.b_dec.double()
    size = dense.abs().double() @ sae.W_dec.abs().double() + sae.b_dec.abs().double()
    # bound for any order of at most d_sae products and the bias; ours sums only what fires
    terms = int(latents.l0().max()) + 2 if peer == "ours" else sae.d_sae + 2
    assert bool(((call(sae, latents, dense).double() - exact).abs() <= 1.01 * terms * 2.0**-24 * size).all())
    following = rotated(sae, tokens)
    benchmark.group = f"decode {case.name} T={tokens}"
    benchmark.extra_info.update(
        case=case.name, tokens=tokens, l0=latents.nnz / tokens, flops=2 * latents.nnz * sae.d_in
    )
    benchmark(lambda: call(following(), latents, dense))
    assert torch.isfinite(exact).all()
