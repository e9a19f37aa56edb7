"""The whole SAE, encode and decode, against eager PyTorch, torch.compile and SAELens."""

import pytest

from gemmascope_fast.dev.bench.suite_modules import sae_bench

IMPLS = (
    "ours",
    "eager fp32",
    "eager bf16",
    "F.linear + embedding_bag, bf16",
    "torch.compile fp32",
    "SAELens fp32",
)


@pytest.mark.parametrize("impl", IMPLS)
def bench_sae(timed, case, tokens, impl):
    timed(impl, sae_bench, case, tokens)
