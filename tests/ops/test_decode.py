"""Op `decode`: features summed in ascending order whatever the blocking, the threads or the instruction set."""

import itertools

import numpy as np
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import emulate_decode, same_bytes, threads

# N, d_out, F: nothing, one, primes, around the blocks of 16, 64 and 256 columns and of 8 and 32 rows
SHAPES = [(0, 7, 5), (1, 1, 1), (1, 16, 4), (3, 15, 30), (7, 63, 40), (8, 65, 40), (13, 271, 64), (33, 80, 131)]
SHAPES += [(5, 0, 6), (1, 340, 9), (65, 17, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pattern(N, F, seed=0, share=0.3):
    """A random pattern with an empty row and a full one where there is room."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(N, F, generator=g) < share
    if N > 2:
        mask[1], mask[2] = False, True
    return gsf.SparseLatents.from_dense(mask * (0.1 + torch.rand(N, F, generator=g)))


def problem(N, d, F, dtype=torch.float32, seed=0):
    latents = pattern(N, F, seed)
    g = torch.Generator().manual_seed(seed + 1)
    values = torch.randn(latents.nnz, generator=g)
    W, b = torch.randn(F, d, generator=g).to(dtype), torch.randn(d, generator=g).to(dtype)
    return latents.crow_indices, latents.col_indices, values, W, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "d", "F"), SHAPES)
def test_bytes_are_those_of_the_ascending_sum(isa, N, d, F, dtype):
    crow, col, values, W, b = problem(N, d, F, dtype)
    for bias in (b, None):
        assert same_bytes(ops.decode(crow, col, values, W, bias, None), emulate_decode(crow, col, values, W, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_other_dtypes_are_widened(isa, dtype):
    crow, col, values, W, b = problem(9, 70, 45)
    values = values.to(dtype)
    expected = ops.decode(crow, col, values.float(), W, b, None)
    assert same_bytes(ops.decode(crow, col, values, W, b, None), expected)


@pytest.mark.parametrize(("N", "d", "F"), SHAPES)
def test_int8_rows_with_a_scale(isa, N, d, F):
    crow, col, values, _, b = problem(N, d, F)
    g = torch.Generator().manual_seed(5)
    W = torch.randint(-128, 128, (F, d), generator=g, dtype=torch.int8)
    scale = torch.rand(F, generator=g) / 127
    for bias in (b, None):
        got = ops.decode(crow, col, values, W, bias, scale)
        assert same_bytes(got, emulate_decode(crow, col, values, W, bias, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_every_value_of_a_row_is_widened_exactly(isa, dtype):
    bits = 8 if dtype == torch.int8 else 16
    every = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8 if bits == 8 else torch.int16).view(dtype)
    crow, col = torch.tensor([0, 1]), torch.zeros(1, dtype=torch.int32)
    got = ops.decode(crow, col, torch.ones(1), every[None, :], None, torch.ones(1) if bits == 8 else None)[0]
    want = every.float() + 0.0
    numbers = ~want.isnan()
    assert torch.equal(got.isnan(), ~numbers)
    assert same_bytes(got[numbers], want[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "d", "F"), SHAPES)
def test_reference_agrees_within_the_bound(N, d, F, dtype):
    crow, col, values, W, b = problem(N, d, F, dtype)
    ours = ops.decode(crow, col, values, W, b, None)
    with gsf.backend("eager"):
        theirs = ops.decode(crow, col, values, W, b, None)
    dense = gsf.SparseLatents(crow, col, values, (N, F)).to_dense().double()
    exact = dense @ W.double() + b.double()
    size = dense.abs() @ W.double().abs() + b.double().abs()
    # at most F products, each sum rounded once; eager also rounds the product
    assert bool(((ours.double() - exact).abs() <= 1.01 * (F + 1) * 2.0**-24 * size).all())
    assert bool(((theirs.double() - exact).abs() <= 1.01 * (F + 2) * 2.0**-24 * size).all())
    if d:
        rms = [float((t.double() - exact).square().mean().sqrt()) if N else 0.0 for t in (ours, theirs)]
        assert rms[0] <= 2 * rms[1] + 1e-30


def test_order_matters_and_is_ascending(isa):
    """1e8 - 1e8 + 1 in any other order is not 1."""
    crow = torch.tensor([0, 3])
    col = torch.tensor([0, 1, 2], dtype=torch.int32)
    W = torch.tensor([[1e8], [-1e8], [1.0]]).expand(3, 40).contiguous()
    assert bool((ops.decode(crow, col, torch.ones(3), W, None, None) == 1).all())
    assert bool((ops.decode(crow, col, torch.ones(3), W[[0, 2, 1]], None, None) == 0).all())


def test_every_instruction_set_thread_count_and_blocking_gives_the_same_bytes():
    crow, col, values, W, b = problem(67, 333, 200)
    whole = gsf.SparseLatents(crow, col, values, (67, 200))
    first = ops.decode(crow, col, values, W, b, None)
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        with gsf.backends.forced_isa(name), threads(count):
            assert same_bytes(ops.decode(crow, col, values, W, b, None), first)
            # a row alone, and few rows, go another way through the columns than many
            for begin, end in ((0, 1), (2, 3), (3, 8), (5, 40), (66, 67)):
                part = whole[begin:end]
                got = ops.decode(part.crow_indices, part.col_indices, part.values, W, b, None)
                assert same_bytes(got, first[begin:end])
            # fewer columns: another split into blocks, the same element
            for columns in (1, 17, 64, 100, 256, 332):
                got = ops.decode(crow, col, values, W[:, :columns].contiguous(), b[:columns], None)
                assert same_bytes(got, first[:, :columns].contiguous())


def test_non_contiguous_inputs(isa):
    crow, col, values, W, b = problem(9, 40, 50)
    expected = ops.decode(crow, col, values, W, b, None)
    doubled = torch.stack([values, values], 1)[:, 0]
    assert same_bytes(ops.decode(crow, col, doubled, W.t().contiguous().t(), b.repeat(2)[::1][:40], None), expected)
    wide = torch.zeros(50, 80)
    wide[:, ::2] = W
    assert same_bytes(ops.decode(crow, col, values, wide[:, ::2], b, None), expected)


def test_special_values_give_what_the_emulation_gives(isa):
    crow, col, values, W, b = problem(12, 37, 40)
    special = torch.tensor([float("inf"), -float("inf"), 1e30, 3.4e38, 1e-45, 1e-40, 0.0, -0.0])
    values[: len(special)] = special
    values[40:60] = 1e-42
    W[3], W[4, :5], W[5, 7] = 1e-40, 3e38, float("inf")
    b[0], b[1] = float("inf"), 1e-45
    got, want = ops.decode(crow, col, values, W, b, None), emulate_decode(crow, col, values, W, b)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any()
    assert same_bytes(
        got.nan_to_num(7.0, float("inf"), -float("inf")), want.nan_to_num(7.0, float("inf"), -float("inf"))
    )
    nan = ops.decode(crow, col, torch.full_like(values, float("nan")), W, b, None)
    assert torch.equal(nan.isnan().all(1), crow.diff() > 0)


def test_non_finite_sums_have_the_same_bytes_on_every_instruction_set():
    crow, col, values, W, b = problem(12, 37, 40)
    values[::5], values[1::7] = float("inf"), float("nan")
    W[3, ::2], b[2] = -float("inf"), float("nan")
    seen = []
    for name in gsf.backends.supported_isas():
        with gsf.backends.forced_isa(name):
            seen.append(ops.decode(crow, col, values, W, b, None))
    assert all(same_bytes(seen[0], other) for other in seen[1:])


def test_flush_to_zero_of_the_caller_changes_no_byte(isa):
    crow, col, values, W, b = problem(9, 40, 60)
    values, b = values * 1e-40, b * 1e-40
    expected = emulate_decode(crow, col, values, W, b)
    assert 0 < expected.abs().max() < 1e-38
    try:
        assert torch.set_flush_denormal(True)
        for count in (1, 2, 3):
            with threads(count):
                assert same_bytes(ops.decode(crow, col, values, W, b, None), expected)
        assert float(torch.tensor([1e-40]) * 0.5) == 0.0
    finally:
        torch.set_flush_denormal(False)


# ---- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "d", "F"), [(0, 7, 5), (1, 16, 4), (13, 33, 67), (29, 48, 130)])
def test_gradients_equal_dense_autograd(N, d, F, dtype):
    crow, col, values, W, b = problem(N, d, F, dtype)
    leaves = [t.clone().requires_grad_() for t in (values, W, b)]
    weight = torch.randn(N, d, generator=torch.Generator().manual_seed(3))
    (ops.decode(crow, col, *leaves, None) * weight).sum().backward()

    exact = [t.double().requires_grad_() for t in (values, W, b)]
    rows = torch.repeat_interleave(torch.arange(N), crow.diff())
    dense = torch.zeros(N, F, dtype=torch.float64).index_put((rows, col.long()), exact[0])
    ((dense @ exact[1] + exact[2]) * weight.double()).sum().backward()

    size_values = (weight.double().abs() @ W.double().abs().t())[rows, col.long()]
    sizes = size_values, dense.detach().abs().t() @ weight.double().abs(), weight.double().abs().sum(0)
    for leaf, want, size, terms in zip(leaves, exact, sizes, (d, N, N), strict=True):
        assert leaf.grad.dtype == leaf.dtype
        unit = 0 if leaf.dtype == torch.float32 else torch.finfo(leaf.dtype).eps / 2
        floor = torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps
        bound = (terms + 1) * 2.0**-24 * size + 1.01 * unit * want.grad.abs() + floor
        assert bool(((leaf.grad.double() - want.grad).abs() <= bound).all())


def test_gradients_do_not_depend_on_threads_or_instruction_set():
    crow, col, values, W, b = problem(40, 65, 130)
    seen = []
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        leaves = [t.clone().requires_grad_() for t in (values, W, b)]
        with gsf.backends.forced_isa(name), threads(count):
            out = ops.decode(crow, col, *leaves, None)
            (out * out.detach()).sum().backward()
        seen.append([leaf.grad for leaf in leaves])
    assert all(same_bytes(seen[0], other) for other in seen[1:])


def test_scaled_rows_have_no_gradient_and_say_so():
    crow, col, values, _, _ = problem(4, 8, 10)
    W = torch.ones(10, 8, dtype=torch.int8)
    out = ops.decode(crow, col, values.requires_grad_(), W, None, torch.ones(10))
    with pytest.raises(ValueError, match="row_scale"):
        out.sum().backward()


# ---- the dispatcher ---------------------------------------------------------------------------------


def test_opcheck():
    crow, col, values, W, b = problem(5, 17, 19)
    op = torch.ops.gemmascope_fast.decode.default
    leaves = [t.clone().requires_grad_() for t in (values, W, b)]
    torch.library.opcheck(op, (crow, col, *leaves, None))
    torch.library.opcheck(op, (crow, col, values, W.requires_grad_(), None, None))
    torch.library.opcheck(op, (crow, col, values, torch.ones(19, 17, dtype=torch.int8), b, torch.ones(19)))


def test_compiles_into_one_graph_with_the_same_bytes_and_gradients():
    torch._dynamo.reset()
    run = torch.compile(lambda *a: ops.decode(*a, None), fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (6, 9):
        crow, col, *rest = problem(N, 33, 40)
        gradients = []
        for call in (run, lambda *a: ops.decode(*a, None)):
            leaves = [t.clone().requires_grad_() for t in rest]
            out = call(crow, col, *leaves)
            assert same_bytes(out, ops.decode(crow, col, *rest, None))
            (out * out).sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        assert same_bytes(*gradients)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_encode_and_decode_in_one_compiled_function():
    torch._dynamo.reset()

    def reconstruct(x, W_enc, b_enc, theta, W_dec):
        return ops.decode(*ops.encode(x, W_enc, b_enc, theta, None), W_dec, None, None)

    g = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=g) for s in ((7, 20), (20, 50), (50,), (50,), (50, 20))]
    run = torch.compile(reconstruct, fullgraph=True, backend="aot_eager")
    assert same_bytes(run(*args), reconstruct(*args))


def test_cost_counts_each_row_once():
    crow, col, values, W, b = problem(6, 33, 40)
    cost = ops.OPS["decode"].cost(crow, col, values, W, b)
    nnz = col.numel()
    assert cost.flops == 2 * nnz * 33
    assert cost.bytes == min(nnz, 40) * 33 * 4 + 8 * nnz + 4 * 6 * 33


# ---- bad input --------------------------------------------------------------------------------------


def test_bad_input_names_argument_expected_and_got():
    crow, col, values, W, b = problem(4, 8, 10)
    outside, negative, falling = col.clone(), col.clone(), crow.clone()
    outside[-1], negative[0] = 10, -1
    falling[1] = crow[-1] + 1
    last, both = col.numel() - 1, outside.clone()
    both[1] = -1
    bad = [
        ((crow, outside, values, W, b, None), IndexError, rf"values in \[0, 10\), got 10 at position {last}$"),
        (
            (crow, negative, values, W, b, None),
            IndexError,
            r"col_indices: expected values in \[0, 10\), got -1 at position 0",
        ),
        ((crow, both, values, W, b, None), IndexError, r"got -1 at position 1$"),
        ((falling, col, values, W, b, None), ValueError, r"crow_indices: expected offsets"),
        ((crow + 1, col, values, W, b, None), ValueError, r"crow_indices: expected offsets"),
        ((crow[:-1], col, values, W, b, None), ValueError, r"crow_indices: expected offsets"),
        ((crow.int(), col, values, W, b, None), TypeError, r"crow_indices: expected int64, got"),
        ((crow, col.long(), values, W, b, None), TypeError, r"col_indices: expected int32, got"),
        ((crow, col, values[:-1], W, b, None), ValueError, r"values: expected"),
        ((crow, col, values.int(), W, b, None), TypeError, r"values: expected a floating dtype"),
        ((crow, col, values, W, b[:-1], None), ValueError, r"b_dec: expected"),
        ((crow, col, values, W[0], b, None), ValueError, r"W_dec: expected"),
        ((crow, col, values, W.to(torch.int8), b, None), ValueError, r"row_scale: required for int8 W_dec"),
        ((crow, col, values, W.to(torch.int8), b, torch.ones(9)), ValueError, r"row_scale: expected"),
        ((crow, col, values, W.int(), b, None), TypeError, r"W_dec: expected"),
    ]
    for backend in ("native", "eager"):
        with gsf.backend(backend):
            for args, kind, message in bad:
                with pytest.raises(kind, match=message):
                    ops.decode(*args)


@pytest.mark.parametrize("kind", [list, np.ndarray])
def test_what_is_no_tensor_is_named(kind):
    crow, col, values, W, b = problem(4, 8, 10)
    for position, name in ((0, "crow_indices"), (1, "col_indices"), (2, "values"), (3, "W_dec")):
        args = [crow, col, values, W, b, None]
        args[position] = args[position].tolist() if kind is list else args[position].numpy()
        with (
            gsf.backend("eager"),
            pytest.raises(TypeError, match=rf"^{name}: expected a torch.Tensor, got \S*{kind.__name__}$"),
        ):
            ops.decode(*args)
        # through the dispatcher these are torch's words
        with pytest.raises(
            RuntimeError, match=f"type 'Tensor' for argument '{name}' but instead found type '{kind.__name__}'"
        ):
            ops.decode(*args)
