"""Building the certified screen: rows compared with their reference, the op's contract, bad arguments."""

import math

import pytest
import torch
from screen_problems import arrays, problem

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes, threads
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.ops.screen_rows import Row, rows_of, table_stride
from gemmascope_fast.sae.screen import Screen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 5])
def test_rows_against_their_reference(isa, dtype, k):
    _, W, b, theta = problem(1, 203, 77, dtype)
    W[:, 5] = 0.0
    W[3, 6] = math.nan
    mu = torch.linspace(-3, 3, 203)
    directions = torch.randn(k, 203, generator=torch.Generator().manual_seed(2)) if k else None
    for second in (True, False):
        code, code2, table = ops.screen_rows(W, b, theta, mu, second, directions)
        with gsf.backend("eager"):
            want = ops.screen_rows(W, b, theta, mu, second, directions)
        assert torch.equal(code, want[0])
        assert torch.equal(code2, want[1])
        exact = [Row.SCALE, Row.ZERO, Row.SCALE2]
        assert torch.equal(table[exact], want[2][exact])
        # norms and biases: sums in fp64 in another order, then one rounding upwards
        torch.testing.assert_close(table, want[2], rtol=3e-7, atol=1e-9)
        assert table.shape == (len(Row) + k, 80)
        assert table_stride(16_384) == 16_384 + 16
    never = table[Row.START, :77] == math.inf
    assert never.nonzero().flatten().tolist() == [5, 6]
    assert bool((table[Row.START, 77:] == -math.inf).all())


def test_the_first_digit_is_the_nested_code():
    _, W, b, theta = problem(1, 130, 50)
    screen, codes = Screen.build(W, b, theta), quantize(W.t())
    assert torch.equal(rows_of(screen.code)[:50, :130], codes.q)
    assert torch.equal(screen.table[Row.SCALE, :50], codes.scale[:, 0])
    assert torch.equal(screen.table[Row.ZERO, :50], codes.zero_point[:, 0].float())


@pytest.mark.parametrize("noise", [0, 3, 100])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_given_code_is_the_first_digit_and_its_error_is_measured(isa, noise, scaled):
    x, W, b, theta = problem(1, 203, 77)
    scales = torch.exp2(torch.arange(203) % 4).float() if scaled else None
    g = torch.Generator().manual_seed(5)
    own = quantize((W.t() if scales is None else W.t() * scales).contiguous())
    q = (own.q.int() + torch.randint(-noise, noise + 1, own.q.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    scale = own.scale[:, 0] * (1 + noise / 50 * torch.rand(77, generator=g))
    scale[3], scale[4], scale[5] = 0, math.inf, 2.0**44
    given = (q, scale, own.zero_point[:, 0])
    mu = torch.linspace(-3, 3, 203)
    code, code2, table = ops.screen_rows(W, b, theta, mu, True, None, scales, *given)
    with gsf.backend("eager"):
        want = ops.screen_rows(W, b, theta, mu, True, None, scales, *given)
    used = torch.tensor([f not in (3, 4, 5) for f in range(77)])
    assert torch.equal(rows_of(code)[:77, :203][used], q[used])
    assert (table[Row.START, :77] == math.inf).nonzero().flatten().tolist() == [3, 4, 5]
    assert torch.equal(code, want[0])
    assert torch.equal(code2, want[1])
    torch.testing.assert_close(table, want[2], rtol=3e-7, atol=1e-9)
    for digits in (1, 2):
        args = (x, W, b, theta, code, code2, table, mu, digits)
        *answer, stats = ops.encode_screened(*args, None, None, False, scales)
        assert same_bytes(answer, ops.encode(x, W, b, theta))
        assert int(stats[2]) == 0


def test_given_codes_that_cannot_be_used():
    _, W, b, theta = problem(1, 203, 77)
    codes = quantize(W.t().contiguous())
    q, s, z = codes.q, codes.scale[:, 0].contiguous(), codes.zero_point[:, 0].contiguous()
    for given in ((q,), (q[1:], s, z), (q.int(), s, z), (q, s.double(), z), (q, s, z[1:]), (q.t(), s, z)):
        for name in ("native", "eager"):
            with gsf.backend(name), pytest.raises(ValueError, match="given"):
                ops.screen_rows(W, b, theta, None, True, None, None, *given)
    with pytest.raises(ValueError, match="one scale a row"):
        Screen.build(W, b, theta, codes=quantize(W.t(), 32))


def test_norms_are_rounded_up():
    _, W, b, theta = problem(1, 333, 200)
    screen = Screen.build(W, b, theta)
    s, zero, s2 = (screen.table[r, :200].double()[:, None] for r in (Row.SCALE, Row.ZERO, Row.SCALE2))
    first, second = (rows_of(c)[:200, :333].double() for c in (screen.code, screen.code2))
    e = W.t().double() - s * (first - zero)
    e2 = e - s2 * (second - 128)
    for row, exact in ((Row.NORM, W.t().double()), (Row.ERROR, e), (Row.ERROR2, e2)):
        kept, true = screen.table[row, :200].double(), exact.norm(dim=1)
        assert bool((kept >= true).all())
        assert bool((kept <= true * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("digits", [0, 1, 2])
def test_opcheck(digits):
    x, W, b, theta = problem(5, 40, 30)
    torch.library.opcheck(torch.ops.gemmascope_fast.screen_rows.default, (W, b, theta, x[0], True, x[1:3]))
    screen = Screen.build(W, b, theta, directions=x[1:3])
    args = (x, W, b, theta, screen.code, screen.code2, screen.table, None, digits, 0.3, screen.directions, digits == 1)
    torch.library.opcheck(torch.ops.gemmascope_fast.encode_screened.default, args)
    grad = [t.clone().requires_grad_() for t in (x, W, b)]
    # opcheck's own backward fails for any op whose first output is integer; compiled gradients are checked below
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.gemmascope_fast.encode_screened.default, (*grad, *args[3:]), test_utils=tests)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_into_one_graph_with_the_same_bytes_and_gradients():
    torch._dynamo.reset()
    x, W, b, theta = problem(6, 33, 40)
    screen = Screen.build(W, b, theta)

    def call(*leaves):
        args = (*leaves, theta, screen.code, screen.code2, screen.table, None, 0, None)
        return ops.encode_screened(*args)[:3]

    run = torch.compile(call, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (run, call):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        csr = f(*leaves)
        assert same_bytes(csr, ops.encode(x, W, b, theta, None))
        csr[2].square().sum().backward()
        gradients.append([t.grad for t in leaves])
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_gradients_equal_those_of_the_full_encode():
    x, W, b, theta = problem(7, 60, 90)
    screen = Screen.build(W, b, theta)
    grads = []
    for run in (
        lambda a: ops.encode(*a, theta, None)[2],
        lambda a: ops.encode_screened(*a, theta, screen.code, screen.code2, screen.table, None, 0, None)[2],
    ):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        run(leaves).square().sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("T", [1, 3, 17, 70])
def test_mapped_rows_give_the_same_bytes(isa, T):
    """Few candidates a chunk, which wait for all chunks, and many, which do not; tokens that skip the screen."""
    for l0 in (20, 600):
        sae, x = make_sae(3, 203, 901, l0).requires_grad_(False), make_activations(4, T, 203)
        x[T // 2, 7] = math.nan
        weights, screen = (sae.W_enc, sae.b_enc, sae.threshold), sae.prepare().screen_cache.screen
        *csr, stats = ops.encode_screened(x, *weights, *arrays(screen), 0, 0.1, screen.directions, True)
        assert same_bytes(csr, ops.encode(x, *weights, 0.1))
        assert stats[2:].tolist() == [0, 1]


def test_of_mapped_rows_the_second_digit_is_always_read():
    """Otherwise it is given up where the first 256 pairs that it looks at fire; here the others do not."""
    sae, x = make_sae(3, 256, 2048, 20).requires_grad_(False), make_activations(4, 1, 256).repeat(64, 1)
    sae.b_enc += 1000 - (x[:1] @ sae.W_enc + sae.b_enc)[0]
    sae.threshold.fill_(1005.0)  # nearer than the bound of one digit, farther than that of two
    sae.threshold[:512] = 995.0
    weights, screen = (sae.W_enc, sae.b_enc, sae.threshold), sae.prepare().screen_cache.screen
    with threads(1):
        stats = [
            ops.encode_screened(x, *weights, *arrays(screen), digits, None, screen.directions, mapped)[3].tolist()[:2]
            for digits, mapped in ((0, False), (1, False), (0, True))
        ]
    assert stats == [[64 * 2048, 64 * 2048], [64 * 2048, 64 * 512], [64 * 2048, 64 * 512]]


def test_bad_arguments():
    x, W, b, theta = problem(2, 40, 30)
    screen = Screen.build(W, b, theta)
    good = [x, W, b, theta, screen.code, screen.code2, screen.table, None, 0, None, None]

    def call(**changed):
        args = list(good)
        for place, value in changed.items():
            args[int(place[1:])] = value
        return ops.encode_screened(*args)

    for wrong, match in (
        ({"_4": screen.code[1:]}, "code"),
        ({"_5": screen.code2[1:]}, "code2"),
        ({"_6": screen.table[1:]}, "table"),
        ({"_7": torch.zeros(3)}, "centre"),
        ({"_8": 3}, "digits"),
        ({"_9": 0.0}, "bandwidth"),
        ({"_0": x[:, 1:]}, "x"),
        ({"_10": torch.zeros(1, 39)}, "directions"),
        ({"_10": torch.zeros(129, 40)}, "directions"),
        ({"_10": torch.zeros(1, 40)}, "table"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**wrong)
    with pytest.raises(TypeError, match="code"):
        call(_4=screen.code.to(torch.int8))
    with pytest.raises(ValueError, match="centre"):
        Screen.build(W, b, theta, centre=torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        Screen.build(W, b, theta, centre=torch.full((40,), math.nan))
    for wrong in (torch.zeros(40), torch.zeros(2, 39), torch.zeros(0, 40), torch.zeros(41, 40)):
        with pytest.raises(ValueError, match="directions"):
            Screen.build(W, b, theta, directions=wrong)
    with pytest.raises(ValueError, match="finite"):
        Screen.build(W, b, theta, directions=torch.full((2, 40), math.inf))
