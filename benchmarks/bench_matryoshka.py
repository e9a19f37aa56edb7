"""A linear layer of Gemma 2 2B's MLP at 8, 4 and 2 bits of one nested code against `F.linear` and torch's own 8- and
4-bit products, with a scale for each row and for 32 weights."""

import pytest

from gemmascope_fast.dev.bench.suite_ops import linear_bench

ROWS, COLUMNS = 9216, 2304
IMPLS = (
    *(f"ours, {bits} bits" for bits in (8, 4, 2)),
    "eager fp32",
    "eager bf16",
    "_weight_int8pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "_int_mm",
)


@pytest.mark.parametrize("impl", IMPLS)  # changes first: the bench is built once for all of them
@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("group_size", [None, 32], ids=["row", "group32"])
def bench_matryoshka(timed, tokens, group_size, impl):
    timed(impl, linear_bench, ROWS, COLUMNS, tokens, group_size)
