"""Op `csr_transpose`: a stable counting sort by column."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import same_bytes


def problem(N, F, seed=0, share=0.3):
    mask = torch.rand(N, F, generator=torch.Generator().manual_seed(seed)) < share
    latents = gsf.SparseLatents.from_dense(mask.float())
    return latents.crow_indices, latents.col_indices


def by_hand(crow, col, columns):
    rows = [n for n in range(len(crow) - 1) for _ in range(int(crow[n]), int(crow[n + 1]))]
    entries = sorted(range(len(col)), key=lambda i: (int(col[i]), i))
    counts = [sum(int(c) < f for c in col) for f in range(columns + 1)]
    return (
        torch.tensor(counts),
        torch.tensor([rows[i] for i in entries], dtype=torch.int32),
        torch.tensor(entries).long(),
    )


@pytest.mark.parametrize("backend", ["native", "eager"])
@settings(max_examples=60, deadline=None)
@given(N=st.integers(0, 12), F=st.integers(0, 20), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.2, 1.0]))
def test_against_a_sort_by_hand(backend, N, F, seed, share):
    crow, col = problem(N, F, seed, share)
    with gsf.backend(backend):
        assert same_bytes(ops.csr_transpose(crow, col, F), by_hand(crow, col, F))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_is_the_transpose_stable_and_its_own_inverse(backend):
    crow, col = problem(41, 97)
    values = torch.arange(col.numel(), dtype=torch.float32)
    with gsf.backend(backend):
        ccol, rows, order = ops.csr_transpose(crow, col, 97)
        dense = gsf.SparseLatents(crow, col, values, (41, 97)).to_dense()
        turned = gsf.SparseLatents(ccol, rows, values[order], (97, 41)).validate()
        assert torch.equal(turned.to_dense(), dense.t())
        back = ops.csr_transpose(ccol, rows, 41)
    assert same_bytes(back[:2], (crow, col))
    assert torch.equal(order[back[2]], torch.arange(col.numel()))


def test_equal_pairs_keep_their_order():
    crow, col = torch.tensor([0, 4, 6]), torch.tensor([2, 2, 0, 2, 2, 0], dtype=torch.int32)
    for backend in ("native", "eager"):
        with gsf.backend(backend):
            assert ops.csr_transpose(crow, col, 3)[2].tolist() == [2, 5, 0, 1, 3, 4]


def test_opcheck_and_compile():
    crow, col = problem(7, 19)
    torch.library.opcheck(torch.ops.gemmascope_fast.csr_transpose.default, (crow, col, 19))
    torch._dynamo.reset()
    run = torch.compile(lambda a, b: ops.csr_transpose(a, b, 19), fullgraph=True, backend="aot_eager")
    assert same_bytes(run(crow, col), ops.csr_transpose(crow, col, 19))


def test_bad_input_names_argument_expected_and_got():
    crow, col = problem(7, 19, share=0.9)
    bad = [
        ((crow, col, 18), IndexError, r"col_indices: expected values in \[0, 18\)"),
        ((crow, col, -1), ValueError, r"columns: expected 0 or more, got -1"),
        ((crow[1:], col, 19), ValueError, r"crow_indices: expected offsets from 0"),
        ((crow[:0], col, 19), ValueError, r"crow_indices: expected"),
        ((crow, col.long(), 19), TypeError, r"col_indices: expected int32"),
    ]
    for backend in ("native", "eager"):
        with gsf.backend(backend):
            for args, kind, message in bad:
                with pytest.raises(kind, match=message):
                    ops.csr_transpose(*args)
