"""Exact encode against eager PyTorch, in fp32 and bf16."""

import pytest

from gemmascope_fast.dev.bench.suite_ops import encode_bench


@pytest.mark.parametrize("impl", ["ours", "ours, no screen", "eager fp32", "eager bf16", "torch.compile fp32"])
def bench_encode(timed, case, tokens, impl):
    timed(impl, encode_bench, case, tokens)
