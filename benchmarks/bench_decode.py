"""Sparse decode against the dense product and other sparse decodes."""

import pytest

from gemmascope_fast.dev.bench.suite_ops import decode_bench


@pytest.mark.parametrize("impl", ["ours", "eager fp32", "embedding_bag", "sparsify", "scipy.sparse"])
def bench_decode(timed, case, tokens, impl):
    timed(impl, decode_bench, case, tokens)
