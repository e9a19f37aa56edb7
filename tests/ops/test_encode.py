"""Op `encode`: one order of summation, one support, on every instruction set; gradients equal dense autograd."""

import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import (
    compare_support,
    dot_bound,
    emulate_dot,
    emulate_encode,
    fma32,
    make_activations,
    make_sae,
    same_bytes,
    threads,
)

# T, d, F: nothing, one, primes, one less and one more than a tile of 4 or a lane group of 16
SHAPES = [(0, 7, 5), (1, 1, 1), (1, 16, 4), (2, 15, 3), (3, 17, 67), (5, 33, 130), (13, 48, 64), (37, 100, 251)]
SHAPES += [(4, 0, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(T, d, F, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x, W, b, theta = draw(T, d), draw(d, F), draw(F), 0.5 * draw(F)
    return x.to(dtype), W.to(dtype), b.to(dtype), theta.to(dtype)


def test_emulated_fma_rounds_the_exact_sum_once():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4000)) * 2.0 ** rng.integers(-80, 60, (3, 4000))
    values[:, :1000] = rng.integers(-(2**24), 2**24, (3, 1000)) * 2.0 ** rng.integers(-70, -5, (3, 1000))
    a, b, c = values.astype(np.float32)
    # sums that cancel to near nothing, and ties
    c[2000:3000] = -(a[2000:3000] * b[2000:3000])
    got = fma32(a, b, c)
    for ai, bi, ci, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = Fraction(ai) * Fraction(bi) + Fraction(ci)
        below, above = np.nextafter(np.float32(r), np.float32([-np.inf, np.inf]))
        error = abs(exact - Fraction(r))
        for other in (float(below), float(above)):
            distance = abs(exact - Fraction(other))
            even = struct.unpack("I", struct.pack("f", r))[0] % 2 == 0
            assert error < distance or (error == distance and even)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "d", "F"), SHAPES)
def test_bytes_are_those_of_the_order_of_summation(isa, T, d, F, dtype):
    args = problem(T, d, F, dtype)
    assert same_bytes(ops.encode(*args, None), emulate_encode(*args))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_mixed_dtypes_are_widened_exactly(isa, x_dtype, w_dtype):
    x, W, b, theta = problem(6, 70, 45, w_dtype)
    x = problem(6, 70, 45, seed=1)[0].to(x_dtype)
    wide = [t.float() for t in (x, W, b, theta)]
    assert same_bytes(ops.encode(x, W, b, theta, None), ops.encode(*wide, None))


@pytest.mark.parametrize(("T", "d", "F"), SHAPES)
def test_reference_agrees_outside_the_bound(T, d, F):
    x, W, b, theta = problem(T, d, F)
    for bandwidth in (None, 0.3):
        ours = gsf.SparseLatents(*ops.encode(x, W, b, theta, bandwidth), (T, F)).to_dense()
        with gsf.backend("eager"):
            theirs = gsf.SparseLatents(*ops.encode(x, W, b, theta, bandwidth), (T, F)).to_dense()
        z = x.double() @ W.double() + b.double()
        # eager's sum runs in some order of at most d + 1 roundings of the same products
        bound = dot_bound(x, W, b) + (d + 2) * 2.0**-24 * (x.double().abs() @ W.double().abs() + b.double().abs())
        edges = (z - theta.double().clamp(min=0)).abs()
        if bandwidth is not None:
            edges = torch.minimum(edges, ((z - theta.double()).abs() - bandwidth / 2).abs())
        sure = edges > bound
        assert torch.equal((ours != 0)[sure], (theirs != 0)[sure])
        both = (ours != 0) & (theirs != 0)
        assert bool(((ours - theirs).double().abs() <= bound)[both].all())


def test_support_equals_fp64_outside_the_bound_on_activations_like_gemmas(isa):
    sae, x = make_sae(3, 640, 1024, 18), make_activations(4, 96, 640)
    check = compare_support(sae.encode_sparse(x), x, sae)
    assert check.equal, check
    # the check itself must be able to see an error: one wrong pair, and one wrong value
    latents = sae.encode_sparse(x).detach()
    fewer = latents.values.clone()
    fewer[0] *= 1.01
    assert not compare_support(latents.with_values(fewer), x, sae).equal
    assert not compare_support(gsf.SparseLatents.empty(latents.shape), x, sae).equal
    assert 5 < latents.l0().double().mean() < 60


def test_every_instruction_set_and_thread_count_gives_the_same_bytes():
    x, W, b, theta = problem(70, 203, 517)
    results = {}
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        with gsf.backends.forced_isa(name), threads(count):
            results[name, count] = ops.encode(x, W, b, theta, None)
    first, *others = results.values()
    assert len(results) >= 3
    assert all(same_bytes(first, other) for other in others)


@pytest.mark.parametrize("bandwidth", [None, 0.2])
def test_a_token_alone_gives_the_bytes_it_gives_in_a_batch(isa, bandwidth):
    x, W, b, theta = problem(71, 130, 259)
    whole = gsf.SparseLatents(*ops.encode(x, W, b, theta, bandwidth), (71, 259))
    for n in (0, 1, 3, 35, 69, 70):
        assert gsf.SparseLatents(*ops.encode(x[n : n + 1], W, b, theta, bandwidth), (1, 259)) == whole[n : n + 1]
    for T in (2, 3, 5, 64):
        assert gsf.SparseLatents(*ops.encode(x[:T], W, b, theta, bandwidth), (T, 259)) == whole[:T]
    turned = gsf.SparseLatents(*ops.encode(x.flip(0), W, b, theta, bandwidth), (71, 259))
    assert turned[torch.arange(70, -1, -1)] == whole


def test_non_contiguous_inputs(isa):
    x, W, b, theta = problem(9, 40, 50)
    expected = ops.encode(x, W, b, theta, None)
    strided = torch.zeros(9, 80)
    strided[:, ::2] = x
    rows = W.t().contiguous().t()
    with_gaps = torch.zeros(50, 48)[:, :40].copy_(W.t()).t()
    spread = torch.stack([b, theta], 1)
    for tokens in (strided[:, ::2], x.t().contiguous().t()):
        for weights in (W, rows, with_gaps):
            assert same_bytes(ops.encode(tokens, weights, spread[:, 0], spread[:, 1], None), expected)
    alone = ops.encode(x, W[:, :1].contiguous(), b[:1], theta[:1], None)
    assert same_bytes(ops.encode(x, W[:, :1], b[:1], theta[:1], None), alone)


def test_rows_ascend_and_nothing_is_cut_off_where_everything_fires(isa):
    x, W, b, _ = problem(11, 20, 203)
    crow, col, values = ops.encode(x, W, b, torch.zeros(203), None)
    gsf.SparseLatents(crow, col, values, (11, 203)).validate()
    everything = ops.encode(x, W, b + 1e6, torch.zeros(203), None)
    assert everything[0].tolist() == list(range(0, 12 * 203, 203))
    assert torch.equal(everything[1], torch.arange(203, dtype=torch.int32).repeat(11))
    nothing = ops.encode(x, W, b, torch.full((203,), 1e30), None)
    assert [t.numel() for t in nothing] == [12, 0, 0]
    assert not nothing[0].any()


def test_what_fires(isa):
    """z > max(θ, 0), or z is NaN: zero, equality and negative thresholds on both sides."""
    tiny = 2.0**-149
    z = torch.tensor([0.5, 0.5, 0.5, -0.5, 0.0, tiny, -tiny, 1e-40, 1e38])
    theta = torch.tensor([0.5, float(np.nextafter(np.float32(0.5), np.float32(0))), 0.6, -1, -1, 0, -1, tiny, 1e37])
    fired = [False, True, False, False, False, True, False, True, True]
    x, W = torch.zeros(1, 3), torch.zeros(3, 9)
    crow, col, values = ops.encode(x, W, z, theta, None)
    assert col.tolist() == [i for i, f in enumerate(fired) if f]
    assert same_bytes(values, z[torch.tensor(fired)])
    assert int(crow[1]) == 4


SPECIAL = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3.4e38, 1e-45, -1e-45, 1e-38, 0.0, -0.0]


def test_special_values_give_what_the_emulation_gives(isa):
    x, W, b, theta = problem(len(SPECIAL) + 4, 35, 66)
    for i, value in enumerate(SPECIAL):
        x[i, (7 * i) % 35] = value
    x[-1] = float("nan")
    x[-2] = 1e-42
    x[-3] = 1e38
    W[:, 3] = 0
    W[:, 4] = 1e-40
    W[:, 5] = 1e35
    W[5, 6] = float("inf")
    b[7], b[8], b[9] = float("nan"), float("inf"), -float("inf")
    for bandwidth in (None, 0.5):
        ours = ops.encode(x, W, b, theta, bandwidth)
        assert same_bytes(ours, emulate_encode(x, W, b, theta, bandwidth))
    nan = ours[2].isnan()
    assert nan.any()
    assert set(ours[2][nan].view(torch.int32).tolist()) == {0x7FC00000}


def test_against_the_dense_formula_with_non_finite_activations(isa):
    """NaN counts as not zero: the stored pairs are those of relu(z) * (z > θ)."""
    x, W, b, theta = problem(6, 20, 40)
    x[0, 3], x[1, 4], x[2, :2] = float("nan"), float("inf"), torch.tensor([float("inf"), -float("inf")])
    z = torch.from_numpy(emulate_dot(x, W, b))
    dense = torch.relu(z) * (z > theta)
    crow, col, _ = ops.encode(x, W, b, theta, None)
    stored = torch.zeros(6, 40, dtype=torch.bool)
    stored[torch.repeat_interleave(torch.arange(6), crow.diff()), col.long()] = True
    assert torch.equal(stored, dense != 0)
    assert stored[0].all()


def test_flush_to_zero_of_the_caller_changes_no_byte(isa):
    x, W, b, theta = problem(5, 40, 60)
    x, b, theta = x * 1e-40, b * 1e-40, theta * 1e-41
    expected = emulate_encode(x, W, b, theta)
    assert 0 < expected[2].abs().max() < 1e-38
    try:
        assert torch.set_flush_denormal(True)
        for count in (1, 2, 3):
            with threads(count):
                assert same_bytes(ops.encode(x, W, b, theta, None), expected)
        # and the caller still has the setting after the call
        assert float(torch.tensor([1e-40]) * 0.5) == 0.0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("bandwidth", [1e-3, 0.25, 4.0])
def test_pairs_within_the_bandwidth(isa, bandwidth):
    args = problem(23, 36, 90)
    crow, col, values = ops.encode(*args, bandwidth)
    assert same_bytes((crow, col, values), emulate_encode(*args, bandwidth))
    z = torch.from_numpy(emulate_dot(*args[:3]))
    near = ((z - args[3]).abs() < bandwidth / 2).sum()
    assert crow[-1] == ((z > args[3].clamp(min=0)) | ((z - args[3]).abs() < bandwidth / 2)).sum() >= near


# ---- gradients --------------------------------------------------------------------------------------


def dense_gradients(x, W, b, theta, weight, support):
    x, W, b = (t.detach().double().requires_grad_() for t in (x, W, b))
    z = x @ W + b
    (torch.where(support, z, 0.0) * weight).sum().backward()
    return x.grad, W.grad, b.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "d", "F"), [(0, 7, 5), (1, 16, 4), (13, 33, 67), (29, 48, 130)])
def test_gradients_equal_dense_autograd(T, d, F, dtype):
    x, W, b, theta = problem(T, d, F, dtype)
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    crow, col, values = ops.encode(*leaves, theta, None)
    rows = torch.repeat_interleave(torch.arange(T), crow.diff())
    weight = torch.randn(T, F, generator=torch.Generator().manual_seed(2))
    (values * weight[rows, col.long()]).sum().backward()
    support = torch.zeros(T, F, dtype=torch.bool)
    support[rows, col.long()] = True
    expected = dense_gradients(x, W, b, theta, weight.double(), support)
    active = weight.double().abs() * support
    sizes = active @ W.double().abs().t(), x.double().abs().t() @ active, active.sum(0)
    for leaf, want, size, terms in zip(leaves, expected, sizes, (F, T, T), strict=True):
        assert leaf.grad.dtype == dtype
        # fp32 sums of at most `terms` products, one rounding each, then one rounding to the leaf's dtype
        unit = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = (terms + 1) * 2.0**-24 * size + unit * want.abs() * 1.01 + floor
        assert bool(((leaf.grad.double() - want).abs() <= bound).all())


def test_gradients_do_not_depend_on_threads_or_instruction_set():
    x, W, b, theta = problem(40, 65, 130)
    seen = []
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        with gsf.backends.forced_isa(name), threads(count):
            values = ops.encode(*leaves, theta, None)[2]
            (values * values.detach()).sum().backward()
        seen.append([leaf.grad for leaf in leaves])
    assert all(same_bytes(seen[0], other) for other in seen[1:])


def test_threshold_gets_no_gradient_without_a_bandwidth():
    x, W, b, theta = problem(5, 8, 20)
    theta.requires_grad_()
    values = ops.encode(x.requires_grad_(), W, b, theta, None)[2]
    values.sum().backward()
    assert theta.grad is None


# ---- the dispatcher ---------------------------------------------------------------------------------


# opcheck's own backward sums integer and floating outputs into one integer tensor and fails there, for any op
# whose first output is integer: compiled gradients are checked below.
WITH_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("bandwidth", [None, 0.2])
def test_opcheck(bandwidth):
    x, W, b, theta = problem(5, 17, 19)
    op = torch.ops.gemmascope_fast.encode.default
    torch.library.opcheck(op, (x, W, b, theta, bandwidth))
    torch.library.opcheck(op, (x[:0], W, b, theta, bandwidth))
    leaves = [t.requires_grad_() for t in (x, W, b)]
    torch.library.opcheck(op, (*leaves, theta, bandwidth), test_utils=WITH_GRADIENTS)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_into_one_graph_with_the_same_bytes_and_gradients():
    torch._dynamo.reset()
    run = torch.compile(lambda *a: ops.encode(*a, None), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 9, 1):
        x, W, b, theta = problem(T, 33, 40)
        assert same_bytes(run(x, W, b, theta), ops.encode(x, W, b, theta, None))
        gradients = []
        for call in (run, lambda *a: ops.encode(*a, None)):
            leaves = [t.clone().requires_grad_() for t in (x, W, b)]
            values = call(*leaves, theta)[2]
            (values * values).sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        assert same_bytes(*gradients)


def test_cost_counts_weights_and_tokens():
    x, W, b, theta = problem(6, 33, 40, torch.bfloat16)
    cost = ops.OPS["encode"].cost(x, W, b, theta)
    assert cost.flops == 2 * 6 * 33 * 40
    assert cost.bytes == 2 * 33 * 40 + 2 * 6 * 33


# ---- bad input --------------------------------------------------------------------------------------


def test_bad_input_names_argument_expected_and_got():
    x, W, b, theta = problem(3, 8, 10)
    bad = [
        ((x.int(), W, b, theta, None), TypeError, r"x: expected a floating dtype, got"),
        ((x.to(torch.complex64), W, b, theta, None), TypeError, r"x: expected a floating dtype, got"),
        ((x[:, :7], W, b, theta, None), ValueError, r"x: expected .*8.*got"),
        ((x[0], W, b, theta, None), ValueError, r"x: expected .*got"),
        ((x, W, b[:9], theta, None), ValueError, r"b_enc: expected .*10.*got"),
        ((x, W, b, theta[:9], None), ValueError, r"threshold: expected .*10.*got"),
        ((x, W, b, theta, -1.0), ValueError, r"bandwidth: expected a positive number, got -1"),
        ((x, W, b, theta, 0.0), ValueError, r"bandwidth: expected a positive number, got 0"),
    ]
    for backend in ("native", "eager"):
        with gsf.backend(backend):
            for args, kind, message in bad:
                with pytest.raises(kind, match=message):
                    ops.encode(*args)
    with pytest.raises(TypeError, match="W_enc: expected"):
        ops.encode(x, W.to(torch.int8), b, theta, None)
