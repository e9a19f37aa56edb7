"""Op `sampled_dot`: dots of chosen pairs in the one order of summation."""

import itertools

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import dot_bound, emulate_dot, same_bytes, threads

SHAPES = [(0, 7, 5), (1, 1, 1), (1, 16, 4), (3, 15, 30), (9, 33, 67), (13, 100, 41), (5, 0, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(N, d, F, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, F, generator=g) < 0.3
    if N > 2:
        mask[1], mask[2] = False, True
    chosen = gsf.SparseLatents.from_dense(mask.float())
    x, rows, bias = (torch.randn(s, generator=g).to(dtype) for s in ((N, d), (F, d), (F,)))
    return x, rows, bias, chosen.crow_indices, chosen.col_indices


def picked(dense, crow, col):
    return dense[torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff()), col.long()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "d", "F"), SHAPES)
def test_bytes_are_those_of_the_order_of_summation(isa, N, d, F, dtype):
    x, rows, bias, crow, col = problem(N, d, F, dtype)
    for b in (bias, None):
        want = picked(torch.from_numpy(emulate_dot(x, rows.t(), b)), crow, col)
        for count in (1, 2, 3):
            with threads(count):
                assert same_bytes(ops.sampled_dot(x, rows, b, crow, col), want)


@pytest.mark.parametrize(("N", "d", "F"), SHAPES)
def test_reference_agrees_within_the_bound(N, d, F):
    x, rows, bias, crow, col = problem(N, d, F)
    with gsf.backend("eager"):
        theirs = ops.sampled_dot(x, rows, bias, crow, col)
    exact = picked(x.double() @ rows.t().double() + bias.double(), crow, col)
    size = picked(x.double().abs() @ rows.t().double().abs() + bias.double().abs(), crow, col)
    ours = ops.sampled_dot(x, rows, bias, crow, col)
    assert bool(((theirs.double() - exact).abs() <= 1.01 * (d + 2) * 2.0**-24 * size).all())
    assert bool(((ours.double() - exact).abs() <= picked(dot_bound(x, rows.t(), bias), crow, col)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_widened_exactly(isa, dtype):
    """All 65,536 of them, subnormals and NaN among them, as rows of length one and as tokens."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    want = every.float()[:, 0] + 0.0  # a product added to +0 has no negative zero
    one, numbers = torch.ones(1, 1), ~want.isnan()
    crow, col = torch.tensor([0, 2**16]), torch.arange(2**16, dtype=torch.int32)
    as_rows = ops.sampled_dot(one, every, None, crow, col)
    as_tokens = ops.sampled_dot(every, one, None, torch.arange(2**16 + 1), torch.zeros(2**16, dtype=torch.int32))
    for got in (as_rows, as_tokens):
        assert torch.equal(got.isnan(), ~numbers)
        assert same_bytes(got[numbers], want[numbers])


def test_a_pair_gives_what_encode_gives(isa):
    x, rows, bias, _, _ = problem(11, 70, 53)
    crow, col, values = ops.encode(x, rows.t(), bias, torch.zeros(53), None)
    assert same_bytes(ops.sampled_dot(x, rows, bias, crow, col), values)


def test_columns_may_come_in_any_order_and_inputs_in_any_layout(isa):
    x, rows, bias, crow, col = problem(4, 20, 30)
    turned = col.flip(0)
    lengths = crow.diff().flip(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    got = ops.sampled_dot(x.flip(0).t().contiguous().t(), rows.t().contiguous().t(), bias, offsets, turned)
    assert same_bytes(got.flip(0), ops.sampled_dot(x, rows, bias, crow, col))


def test_special_values_and_flush_to_zero(isa):
    x, rows, bias, crow, col = problem(6, 35, 40)
    x[0] *= 1e-40
    x[1, 3], x[3, 4], x[4, 5] = float("inf"), float("nan"), 3e38
    rows[5], rows[6, 4] = 1e-42, float("inf")
    want = picked(torch.from_numpy(emulate_dot(x, rows.t(), bias)), crow, col)
    numbers = ~want.isnan()
    try:
        for flush in (False, True):
            assert torch.set_flush_denormal(flush)
            got = ops.sampled_dot(x, rows, bias, crow, col)
            assert torch.equal(got.isnan(), ~numbers)
            assert same_bytes(got[numbers], want[numbers])
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("N", "d", "F"), [(0, 7, 5), (1, 16, 4), (13, 33, 67)])
def test_gradients_equal_dense_autograd(N, d, F):
    x, rows, bias, crow, col = problem(N, d, F)
    weight = torch.randn(col.numel(), generator=torch.Generator().manual_seed(3))
    leaves = [t.clone().requires_grad_() for t in (x, rows, bias)]
    (ops.sampled_dot(*leaves, crow, col) * weight).sum().backward()
    exact = [t.double().requires_grad_() for t in (x, rows, bias)]
    (picked(exact[0] @ exact[1].t() + exact[2], crow, col) * weight.double()).sum().backward()
    chosen = gsf.SparseLatents(crow, col, weight.abs(), (N, F)).to_dense().double()
    sizes = chosen @ rows.double().abs(), chosen.t() @ x.double().abs(), chosen.sum(0)
    for leaf, want, size, terms in zip(leaves, exact, sizes, (F, N, N), strict=True):
        assert bool(((leaf.grad.double() - want.grad).abs() <= 1.01 * (terms + 1) * 2.0**-24 * size).all())


def test_gradients_do_not_depend_on_threads_or_instruction_set():
    x, rows, bias, crow, col = problem(30, 65, 90)
    seen = []
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        leaves = [t.clone().requires_grad_() for t in (x, rows, bias)]
        with gsf.backends.forced_isa(name), threads(count):
            z = ops.sampled_dot(*leaves, crow, col)
            (z * z.detach()).sum().backward()
        seen.append([leaf.grad for leaf in leaves])
    assert all(same_bytes(seen[0], other) for other in seen[1:])


def test_opcheck():
    x, rows, bias, crow, col = problem(5, 17, 19)
    op = torch.ops.gemmascope_fast.sampled_dot.default
    torch.library.opcheck(op, (*(t.clone().requires_grad_() for t in (x, rows, bias)), crow, col))
    torch.library.opcheck(op, (x, rows.requires_grad_(), None, crow, col))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    run = torch.compile(lambda *a: ops.sampled_dot(*a), fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (6, 9):
        args = problem(N, 33, 40)
        assert same_bytes(run(*args), ops.sampled_dot(*args))


def test_bad_input_names_argument_expected_and_got():
    x, rows, bias, crow, col = problem(4, 8, 10)
    outside = col.clone()
    outside[-1] = 10
    bad = [
        ((x, rows, bias, crow, outside), IndexError, r"col_indices: expected values in \[0, 10\)"),
        ((x[:3], rows, bias, crow, col), ValueError, r"crow_indices: expected 4 offsets, got 5"),
        ((x[:, :7], rows, bias, crow, col), ValueError, r"x: expected .*got"),
        ((x.int(), rows, bias, crow, col), TypeError, r"x: expected a floating dtype"),
        ((x, rows, bias[:9], crow, col), ValueError, r"bias: expected"),
        ((x, rows.to(torch.int8), bias, crow, col), TypeError, r"rows: expected float32"),
    ]
    for backend in ("native", "eager"):
        with gsf.backend(backend):
            for args, kind, message in bad:
                with pytest.raises(kind, match=message):
                    ops.sampled_dot(*args)
