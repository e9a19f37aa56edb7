"""Exact top-k encode against eager PyTorch, in fp32 and bf16."""

import pytest

from gemmascope_fast.dev.bench.suite_topk import topk_bench


@pytest.mark.parametrize("k", [50, 100])
@pytest.mark.parametrize("impl", ["ours", "ours, no screen", "eager fp32", "eager bf16"])
def bench_topk(timed, case, tokens, impl, k):
    timed(impl, topk_bench, case, k, tokens)
