"""Ops `encode_topk` and `encode_topk_screened`: the k greatest of the one order of summation, screened or not."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import dot_bound, make_activations, make_sae, same_bytes, threads
from gemmascope_fast.ops.encode_topk import greatest
from gemmascope_fast.sae.screen import Screen

# T, d, F, k
SHAPES = [
    (0, 7, 5, 2),
    (1, 1, 1, 1),
    (1, 16, 4, 4),
    (2, 15, 3, 2),
    (3, 63, 67, 5),
    (5, 65, 130, 130),
    (9, 128, 64, 1),
    (17, 70, 300, 40),
    (37, 100, 1251, 16),
    (70, 33, 700, 7),
    (1, 64, 2300, 50),
    (4, 0, 6, 3),
]


def problem(T, d, F, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return draw(T, d).to(dtype), draw(d, F).to(dtype), (0.3 * draw(F)).to(dtype)


def pre_activations(x, W, b):
    """z [T, F] in the order of summation, as far as it is positive or NaN; 0 elsewhere."""
    crow, col, values = ops.encode(x, W, b, torch.zeros_like(b), None)
    return gsf.SparseLatents(crow, col, values, (x.shape[0], W.shape[1])).to_dense()


def expected(x, W, b, k, per_batch=False):
    z = pre_activations(x, W, b)
    # ReLU's zeros are no candidates, NaN is one
    kept = torch.where(greatest(z, k, per_batch), z, 0.0)
    latents = gsf.SparseLatents.from_dense(kept)
    return latents.crow_indices, latents.col_indices, latents.values


def screened(x, W, b, k, per_batch=False, digits=0, mapped=False, screen=None):
    screen = screen or Screen.build(W, b, torch.zeros_like(b))
    return screen.encode_topk(x, W, b, k, per_batch, digits, mapped)


def assert_same(x, W, b, k, **build):
    screen = Screen.build(W, b, torch.zeros_like(b), **build)
    for per_batch in (False, True):
        want = expected(x, W, b, k, per_batch)
        assert same_bytes(ops.encode_topk(x, W, b, k, per_batch), want)
        for digits, mapped in itertools.product((0, 1, 2), (False, True)):
            assert same_bytes(screened(x, W, b, k, per_batch, digits, mapped, screen), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "d", "F", "k"), SHAPES)
def test_the_k_greatest(isa, T, d, F, k, dtype):
    x, W, b = problem(T, d, F, dtype)
    assert_same(x, W, b, k)
    assert_same(x, W, b, k, centre=torch.linspace(-1, 1, d), second_digit=False)


TIES = {
    "all rows equal": lambda F: torch.zeros(F, dtype=torch.long),
    "two kinds of rows": lambda F: torch.arange(F) % 2,
    "every row three times": lambda F: torch.arange(F) // 3,
    "the last rows are the first": lambda F: torch.arange(F) % (F - 40),
}


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("k", [1, 5, 33, 399, 400])
def test_of_equal_values_the_lower_feature(isa, name, k):
    x, W, b = problem(19, 40, 400)
    rows = TIES[name](400)
    assert_same(x, W[:, rows].contiguous(), b[rows].contiguous(), k)


def test_ties_by_whole_numbers(isa):
    """Small integers: many equal values at the k-th place, and bounds that are exact or nearly."""
    g = torch.Generator().manual_seed(3)
    W = torch.randint(-2, 3, (16, 500), generator=g).float()
    x = torch.randint(-2, 3, (40, 16), generator=g).float()
    for k in (1, 7, 64, 500):
        assert_same(x, W, torch.zeros(500), k)


def test_tokens_that_the_screen_does_not_take(isa):
    x, W, b = problem(21, 64, 500)
    x[3, 5] = float("nan")
    x[4, 6] = float("inf")
    x[5] = 0.0
    x[6] = -float("inf")
    x[7, :2] = 3e38
    x[20] *= 1e-30
    assert_same(x, W, b, 12)
    b[17] = 1e38
    b[18] = float("inf")
    assert_same(x, W, b, 12)


def test_weights_that_the_screen_does_not_judge(isa):
    """Features whose bound is no number: they are always refined, and never count for a floor."""
    x, W, b = problem(9, 64, 300)
    W[:, 5] *= 1e25
    W[:, 6] *= 1e-25
    W[:, 7] = 0
    b[8] = 1e38
    W[3, 9] = float("inf")
    for k in (1, 2, 30):
        assert_same(x, W, b, k)


def test_fewer_than_k_are_positive(isa):
    x, W, b = problem(11, 32, 200)
    b -= 30.0
    assert_same(x, W, b, 50)
    assert int(ops.encode_topk(x, W, b, 50)[0][-1]) < 11 * 50


def test_against_fp64_outside_the_bound():
    sae, x = make_sae(3, 640, 4096, 73).requires_grad_(False), make_activations(4, 33, 640)
    z = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    bound = dot_bound(x, sae.W_enc, sae.b_enc)
    for k in (1, 50, 300):
        crow, col, _ = screened(x, sae.W_enc, sae.b_enc, k)
        for t in range(33):
            got = set(col[crow[t] : crow[t + 1]].tolist())
            edge = z[t].topk(k).values[-1]
            sure = set((z[t] - bound[t] > edge + bound[t].max()).nonzero().flatten().tolist())
            never = set((z[t] + bound[t] < edge - bound[t].max()).nonzero().flatten().tolist())
            assert sure <= got
            assert not got & never


def test_threads_and_instruction_sets_give_the_same_bytes():
    sae, x = make_sae(1, 640, 5000, 30).requires_grad_(False), make_activations(2, 40, 640)
    screen = Screen.build(sae.W_enc, sae.b_enc, torch.zeros(5000), centre=sae.b_dec)
    want = expected(x, sae.W_enc, sae.b_enc, 32)
    for name, count in itertools.product(gsf.backends.supported_isas(), (1, 2, 3)):
        with gsf.backends.forced_isa(name), threads(count):
            assert same_bytes(ops.encode_topk(x, sae.W_enc, sae.b_enc, 32), want)
            assert same_bytes(screened(x, sae.W_enc, sae.b_enc, 32, screen=screen), want)


def test_a_token_alone_gives_the_bytes_it_gives_in_a_batch(isa):
    x, W, b = problem(35, 48, 900)
    whole = gsf.SparseLatents(*screened(x, W, b, 20), (35, 900))
    alone = [gsf.SparseLatents(*screened(x[t : t + 1], W, b, 20), (1, 900)) for t in range(35)]
    assert gsf.SparseLatents.cat(alone) == whole


def test_more_tokens_than_pass_together(isa):
    """Blocks of tokens meet at 256 without a screen and at 1,024 with one."""
    x, W, b = problem(1100, 16, 130)
    x[1030, 3] = float("nan")
    assert_same(x, W, b, 3)


def test_few_pairs_are_refined(isa):
    """Floors rise while the features pass: without them half of all pairs would be refined."""
    sae, x = make_sae(3, 640, 8192, 73).requires_grad_(False), make_activations(4, 64, 640)
    screen = Screen.build(sae.W_enc, sae.b_enc, torch.zeros(8192), centre=sae.b_dec)
    kept = (screen.code, screen.code2, screen.table, screen.centre)
    for T in (1, 64):
        *_, stats = ops.encode_topk_screened(x[:T], sae.W_enc, sae.b_enc, 50, *kept)
        survivors, refined, violations, rest = stats.tolist()
        assert violations == rest == 0
        assert refined < 3 * 50 * T
        assert survivors < 0.25 * T * 8192


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 90), st.integers(1, 400), st.data())
def test_any_problem(seed, T, d, F, data):
    k = data.draw(st.integers(1, F))
    x, W, b = problem(T, d, F, seed=seed)
    g = torch.Generator().manual_seed(seed)
    x *= 2.0 ** torch.randint(-40, 30, (T, 1), generator=g)
    W = W * 2.0 ** torch.randint(-20, 20, (1, F), generator=g)
    if data.draw(st.booleans()):
        W = (W * 2).round() / 2
    assert_same(x, W, b, k)


@pytest.mark.parametrize("per_batch", [False, True])
def test_gradients_are_those_of_the_chosen_pairs(per_batch):
    x, W, b = problem(6, 20, 50)
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    screen = Screen.build(W, b, torch.zeros(50))
    kept = (screen.code, screen.code2, screen.table, screen.centre)
    dense = [t.clone().requires_grad_() for t in (x, W, b)]
    z = dense[0] @ dense[1] + dense[2]
    (torch.where(greatest(z.detach(), 4, per_batch), z, 0.0) * weight).sum().backward()
    calls = [
        lambda x, W, b: ops.encode_topk(x, W, b, 4, per_batch),
        lambda x, W, b: ops.encode_topk_screened(x, W, b, 4, *kept, 0, None, False, None, per_batch)[:3],
    ]
    for call in calls:
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        latents = gsf.SparseLatents(*call(*leaves), (6, 50))
        (latents.to_dense() * weight).sum().backward()
        for leaf, want in zip(leaves, dense, strict=True):
            torch.testing.assert_close(leaf.grad, want.grad)


WITH_GRADIENTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_opcheck():
    x, W, b = problem(5, 17, 19)
    screen = Screen.build(W, b, torch.zeros(19))
    kept = (screen.code, screen.code2, screen.table, screen.centre)
    library = torch.ops.gemmascope_fast
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    for op, more in ((library.encode_topk.default, ()), (library.encode_topk_screened.default, kept)):
        torch.library.opcheck(op, (x, W, b, 3, *more))
        torch.library.opcheck(op, (x[:0], W, b, 3, *more))
        torch.library.opcheck(op, (*leaves, 3, *more), test_utils=WITH_GRADIENTS)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_into_one_graph_with_the_same_bytes():
    torch._dynamo.reset()
    run = torch.compile(lambda *a: ops.encode_topk(*a, 5), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 9, 1):
        x, W, b = problem(T, 33, 40)
        assert same_bytes(run(x, W, b), ops.encode_topk(x, W, b, 5))


@pytest.mark.parametrize("k", [0, -1, 20])
def test_k_out_of_range(k):
    x, W, b = problem(5, 17, 19)
    for backend in ("native", "eager"):
        with gsf.backend(backend), pytest.raises(ValueError, match=r"k: expected 1 to d_sae = 19, got "):
            ops.encode_topk(x, W, b, k)
        with gsf.backend(backend), pytest.raises(ValueError, match=r"k: expected 1 to d_sae = 19, got "):
            screened(x, W, b, k)


def test_bad_input_names_the_argument():
    x, W, b = problem(5, 17, 19)
    cases = [
        (lambda: ops.encode_topk(x[:, :3], W, b, 2), ValueError, "d_in"),
        (lambda: ops.encode_topk(x.int(), W, b, 2), TypeError, "floating"),
        (lambda: ops.encode_topk(x, W, b[:3], 2), ValueError, "b_enc"),
        (lambda: screened(x[:, :3], W, b, 2), ValueError, "d_in"),
        (lambda: screened(x.int(), W, b, 2), TypeError, "floating"),
    ]
    for backend in ("native", "eager"):
        for call, error, words in cases:
            with gsf.backend(backend), pytest.raises(error, match=words):
                call()


def test_the_reference_agrees_outside_the_bound():
    x, W, b = problem(23, 40, 300)
    with gsf.backend("eager"):
        crow, col, values = ops.encode_topk(x, W, b, 9)
    want = expected(x, W, b, 9)
    # random problems have no near ties at this seed
    assert same_bytes((crow, col), want[:2])
    torch.testing.assert_close(values, want[2])
