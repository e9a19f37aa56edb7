"""Ops and modules with every kind of derivative in torch, compared with dense functions of torch."""

import contextlib
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import make_sae, same_bytes
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.sae import MatryoshkaSAE
from gemmascope_fast.sae.multi_site import CrossLayerTranscoder
from gemmascope_fast.sae.screen import Screen
from gemmascope_fast.sae.straight_through import JumpReLU, L0Step, encode_with_bandwidth

D, F, N = 7, 12, 4
BACKENDS = [None, "eager"]


def asked(name):
    return contextlib.nullcontext() if name is None else gsf.backend(name)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- ops: (function of the differentiable arguments, the same by torch, those arguments) ---------------------------

W, B, THETA = random(D, F), random(F, seed=1), torch.full((F,), 0.3)
X = random(N, D, seed=2)
CSR = gsf.SparseLatents.from_dense((random(N, F, seed=3) > 0.4).float())
CROW, COL = CSR.crow_indices, CSR.col_indices
ROWS = CSR.row_indices()
V = random(CSR.nnz, seed=4)
NESTED = MatryoshkaLinear.from_linear(torch.nn.Linear(64, 6), group_size=32, bits=4, activations="exact")


def dense_of(values):
    return torch.zeros(N, F).index_put((ROWS, COL.long()), values)


def dense_latents(x, W, b):
    z = x @ W + b
    return torch.relu(z) * (z > THETA)


def encoded(encode):
    def call(x, W, b):
        crow, col, values = encode(x, W, b)[:3]
        return gsf.SparseLatents(crow, col, values, (N, F)).to_dense()

    return call


SCREEN = Screen.build(W, B, THETA)


def screened(x, W_enc, b):
    return SCREEN.call(x, W_enc, b, THETA)


def nested(x, bias):
    p, planes = NESTED.packed, list(NESTED.packed.read(4))
    return ops.matryoshka_linear(x, planes, p.scale, p.zero_point, bias, None, None, None, 6, 32, 4, 0, True)


OPS = {
    "encode": (encoded(lambda x, W, b: ops.encode(x, W, b, THETA, None)), dense_latents, (X, W, B)),
    "encode_screened": (encoded(screened), dense_latents, (X, W, B)),
    "encode_tensor": (encoded(lambda x, W, b: ops.encode_tensor(x, W, b, THETA)), dense_latents, (X, W, B)),
    "decode": (
        lambda v, W, b: ops.decode(CROW, COL, v, W, b),
        lambda v, W, b: dense_of(v) @ W + b,
        (V, random(F, D, seed=5), random(D, seed=6)),
    ),
    "decode without a bias": (
        lambda v, W: ops.decode(CROW, COL, v, W),
        lambda v, W: dense_of(v) @ W,
        (V, random(F, D, seed=5)),
    ),
    "sampled_dot": (
        lambda x, rows, b: ops.sampled_dot(x, rows, b, CROW, COL),
        lambda x, rows, b: (x @ rows.t() + b)[ROWS, COL.long()],
        (X, random(F, D, seed=7), B),
    ),
    "matryoshka_linear": (nested, lambda x, b: x @ NESTED.weight.t() + b, (random(3, 64), random(6, seed=8))),
}
RAGGED = ("encode", "encode_screened", "encode_tensor")


def numbered(f, i, args):
    """f of argument i alone."""
    return lambda t: f(*args[:i], t, *args[i + 1 :])


def by_forward_ad(f, x):
    v = random(*x.shape, seed=9)
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def by_double_backward(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def summed(f):
    return lambda x: f(x).square().sum()


TRANSFORMS = {
    "jvp": lambda f, x: jvp(f, (x,), (random(*x.shape, seed=9),)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "grad": lambda f, x: grad(summed(f))(x),
    "grad of grad": lambda f, x: grad(summed(grad(summed(f))))(x),
    "forward over reverse": lambda f, x: jvp(grad(summed(f)), (x,), (random(*x.shape, seed=9),)),
    "reverse over forward": lambda f, x: grad(lambda y: summed(jacfwd(f))(y))(x),
    "hessian": lambda f, x: torch.func.hessian(summed(f))(x),
    "forward_ad": by_forward_ad,
    "double backward": by_double_backward,
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x),
    "vectorised": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward vectorised": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, random(*x.shape, seed=9)),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(summed(f), x, random(*x.shape, seed=9)),
}


def assert_near(ours, theirs):
    for a, b in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) + 1e-6


def near_of(transform, ours, theirs, x):
    wanted = transform(theirs, x)
    assert_near(transform(ours, x), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_ops(name, transform, backend):
    ours, theirs, args = OPS[name]
    with asked(backend):
        for i, x in enumerate(args):
            near_of(TRANSFORMS[transform], numbered(ours, i, args), numbered(theirs, i, args), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_vmap_is_a_loop_or_an_error(name, backend):
    ours, theirs, args = OPS[name]
    with asked(backend):
        for i, x in enumerate(args):
            many = torch.stack([x, 2 * x, -x], 1)
            f, g = numbered(ours, i, args), numbered(theirs, i, args)
            if name in RAGGED:
                for call in (
                    vmap(f, in_dims=1),
                    vmap(grad(summed(f)), in_dims=1),
                    grad(lambda t, f=f: vmap(f, 1)(t).sum()),
                ):
                    with pytest.raises(NotImplementedError, match=f"^vmap cannot run over {name}: .* leading"):
                        call(many)
                continue
            assert_near(vmap(f, in_dims=1)(many), vmap(g, in_dims=1)(many))
            assert_near(vmap(grad(summed(f)), in_dims=1)(many), vmap(grad(summed(g)), in_dims=1)(many))
            assert_near(grad(summed(vmap(f, 1)))(many), grad(summed(vmap(g, 1)))(many))
            if backend is None and name != "matryoshka_linear":
                assert same_bytes(vmap(f, in_dims=1)(many)[1], f(2 * x))


def test_scaled_rows_in_forward_mode():
    """int8 rows have a scale; their reverse mode is an error that says so."""
    rows = torch.randint(-99, 99, (F, D), dtype=torch.int8)
    scale = random(F, seed=4)
    wide = rows.float() * scale[:, None]
    near_of(TRANSFORMS["jvp"], lambda v: ops.decode(CROW, COL, v, rows, None, scale), lambda v: dense_of(v) @ wide, V)
    near_of(
        TRANSFORMS["jvp"],
        lambda s: ops.decode(CROW, COL, V, rows, None, s),
        lambda s: dense_of(V) @ (rows.float() * s[:, None]),
        scale,
    )
    for call in (
        lambda: grad(lambda v: ops.decode(CROW, COL, v, rows, None, scale).sum())(V),
        lambda: grad(lambda s: ops.decode(CROW, COL, V, rows, None, s).sum())(scale),
    ):
        with pytest.raises(ValueError, match="row_scale: decode with scaled rows has no gradient"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_codes_have_no_derivative(backend):
    p, planes = NESTED.packed, list(NESTED.packed.read(4))

    def linear(scale):
        return ops.matryoshka_linear(
            X.repeat(1, 10)[:, :64], planes, scale, p.zero_point, *[None] * 4, 6, 32, 4, 0, True
        )

    def weights(scale):
        return ops.matryoshka_dequantize(planes, scale, p.zero_point, 6, 64, 32, 4, 0)

    scale = p.scale.float()
    with asked(backend):
        for f in (linear, weights):
            for call in (lambda: grad(lambda s: f(s).sum())(scale), lambda: jvp(f, (scale,), (scale,))):  # noqa: B023
                with pytest.raises(ValueError, match=r"^scale: codes and their scales have no derivative"):
                    call()


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_gradients_of_nested_layers_are_those_of_every_backend(activations):
    """Straight through the rounding of the activations, in the reference too."""
    layer = MatryoshkaLinear.from_linear(torch.nn.Linear(64, 6), group_size=32, bits=4, activations=activations)
    x, found = random(5, 64), []
    for backend in BACKENDS:
        with asked(backend):
            y = x.clone().requires_grad_()
            layer(y).square().sum().backward()
            found.append(y.grad)
            assert_near(jvp(layer, (x,), (x,))[1], x @ layer.weight.t())
    assert_near(found[0], found[1])


def test_direct_calls_of_torchs_op_under_a_transform_are_an_error():
    for call in (grad(lambda x: torch.ops.gemmascope_fast.encode(x, W, B, THETA)[2].sum()),):
        with pytest.raises(NotImplementedError, match=r"call gemmascope_fast\.ops\.encode"):
            call(X)


# ---- modules -------------------------------------------------------------------------------------------------------


def weights(d_out=D, seed=10):
    return {
        "W_enc": random(D, F, seed=seed),
        "W_dec": random(F, d_out, seed=seed + 1),
        "b_enc": random(F, seed=seed + 2),
        "b_dec": random(d_out, seed=seed + 3),
        "threshold": THETA,
    }


def of_sae(p, x):
    z = x @ p["W_enc"] + p["b_enc"]
    return (torch.relu(z) * (z > p["threshold"])) @ p["W_dec"] + p["b_dec"]


def of_topk(p, x):
    z = torch.relu(x @ p["W_enc"] + p["b_enc"])
    return torch.zeros_like(z).scatter(-1, z.topk(3).indices, z.topk(3).values) @ p["W_dec"] + p["b_dec"]


MODULES = {
    "sae": (lambda: gsf.JumpReLUSAE.from_weights(**weights()), of_sae),
    "transcoder": (lambda: gsf.JumpReLUTranscoder.from_weights(**weights()), of_sae),
    "skip transcoder": (
        lambda: gsf.JumpReLUSkipTranscoder.from_weights(**weights(), W_skip=random(D, D, seed=20)),
        lambda p, x: of_sae(p, x) + x @ p["W_skip"],
    ),
    "top-k": (lambda: gsf.TopKSAE.from_weights(**weights() | {"threshold": torch.zeros(F)}, k=3), of_topk),
    "crosscoder": (lambda: gsf.Crosscoder.from_weights(**weights(), n_layers=1), of_sae),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind, transform):
    make, theirs = MODULES[kind]
    module = make()
    held = {name: p.detach().clone() for name, p in module.named_parameters()}
    # torch's own forward mode fails for one token under vmap
    for x in (X,) if transform == "forward vectorised" else (X, X[0]):
        near_of(TRANSFORMS[transform], module, lambda t: theirs(held, t), x)


@pytest.mark.parametrize("kind", MODULES)
def test_functional_call(kind):
    """Weights in place of the module's own: the answer of those, their derivatives, and the module as it was."""
    make, theirs = MODULES[kind]
    module = make().prepare()
    held = {name: p.detach().clone() for name, p in module.named_parameters()}
    other = {name: p * 1.25 for name, p in held.items()}
    layouts = {name: (p.stride(), p.data_ptr()) for name, p in other.items()}
    assert_near(functional_call(module, other, (X,)), theirs(other, X))
    assert {name: (p.stride(), p.data_ptr()) for name, p in other.items()} == layouts
    ours = grad(lambda p: functional_call(module, p, (X,)).square().sum())(other)
    assert_near(ours, grad(lambda p: theirs(p, X).square().sum())(other))
    ours = jvp(lambda p: functional_call(module, p, (X,)), (other,), (held,))
    # a threshold has no derivative without a bandwidth
    assert_near(ours, jvp(lambda p: theirs(p, X), (other,), (held,)))
    assert_near(module(X), theirs(held, X))
    with pytest.raises(ValueError, match=r"screen: expected None or False when torch\.func replaces the weights"):
        grad(lambda p: functional_call(Encodes(module), {f"0.{n}": t for n, t in p.items()}, (X,)))(other)


class Encodes(torch.nn.Sequential):
    """An SAE's screened encode as a module's forward."""

    def forward(self, x):
        return self[0].encode_sparse(x, screen=True).values.sum()


@pytest.mark.parametrize("kind", [*MODULES, "nested"])
def test_vmap_over_a_module_is_one_error(kind):
    module = MatryoshkaSAE.from_sae(make_sae(0, 32, 24, 6)) if kind == "nested" else MODULES[kind][0]()
    x = random(3, module.d_in)
    for call in (module, module.encode, module.encode_sparse):
        with pytest.raises(NotImplementedError, match="leading dimensions"):
            vmap(call)(x)
    latents = module.encode(x)
    assert_near(vmap(module.decode)(latents), module.decode(latents))


def test_decode_of_dense_latents_has_derivatives_where_they_are_zero():
    for module in (make() for make, _ in MODULES.values()):
        latents = module.encode(X).detach()
        W_dec, b_dec = module.W_dec.detach(), module.b_dec.detach()
        for name in ("jvp", "jacfwd", "forward_ad", "grad", "vectorised"):
            near_of(TRANSFORMS[name], module.decode, lambda t: t @ W_dec + b_dec, latents)  # noqa: B023


def test_one_row_of_features_keeps_its_tangent():
    """A decoded token's features are looked up from lists, which have no derivative."""
    sae = MODULES["sae"][0]()
    x = X[:1]
    near_of(
        TRANSFORMS["forward_ad"],
        lambda t: sae.encode_sparse(t).features([0, 3, 5]),
        lambda t: sae.encode(t)[..., [0, 3, 5]],
        x,
    )


def test_cross_layer_transcoders():
    coder = CrossLayerTranscoder.from_weights(
        W_enc=[random(D, F, seed=i) for i in range(2)],
        W_dec=[random(F, 2, D, seed=3 + i) for i in range(2)],
        b_enc=[B, B],
        b_dec=[random(D, seed=6)] * 2,
        threshold=[THETA, THETA],
        W_skip=[random(D, D, seed=7 + i) for i in range(2)],
    )
    x = random(2, 3, D, seed=11)
    p = {name: t.detach() for name, t in coder.named_parameters()}

    def theirs(x):
        f = [dense_latents_of(x[i], p[f"layers.{i}.W_enc"]) for i in range(2)]
        first = f[0] @ p["layers.0.W_dec"] + p["layers.0.b_dec"]
        second = f[1] @ p["layers.1.W_dec"] + p["layers.1.b_dec"]
        return torch.stack([first[..., :D] + x[0] @ p["W_skip.0"], first[..., D:] + second + x[1] @ p["W_skip.1"]])

    def dense_latents_of(x, W):
        z = x @ W + B
        return torch.relu(z) * (z > THETA)

    for name in ("jvp", "jacfwd", "jacrev", "double backward", "forward_ad"):
        near_of(TRANSFORMS[name], coder, theirs, x)


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("function", [JumpReLU, L0Step])
def test_straight_through_functions_have_one_derivative_in_both_modes(function, to_input):
    z, theta = random(9), 0.2 * torch.ones(9)

    def f(z, theta):
        return function.apply(z, theta, 0.8, to_input)

    for argnums in (0, 1):
        forward, reverse = jacfwd(f, argnums)(z, theta), jacrev(f, argnums)(z, theta)
        assert_near(forward, reverse)
        assert bool(reverse.any()) == (argnums == 1 or function is JumpReLU or to_input)


def test_a_bandwidth_in_forward_mode_is_its_reverse_mode():
    def f(x, theta):
        crow, col, values = encode_with_bandwidth(x, W, B, theta, 0.5)
        return gsf.SparseLatents(crow, col, values, (N, F)).to_dense()

    for argnums in (0, 1):
        assert_near(jacfwd(f, argnums)(X, THETA), jacrev(f, argnums)(X, THETA))


# ---- the backend travels with the graph ----------------------------------------------------------------------------


@pytest.fixture
def references(monkeypatch):
    """Names of the ops whose reference ran."""
    ran = []
    for name, op in ops.OPS.items():

        def count(*args, name=name, reference=op.reference):
            ran.append(name)
            return reference(*args)

        monkeypatch.setattr(op, "reference", count)
    return ran


def in_a_thread(call):
    failed = []

    def run():
        try:
            call()
        except Exception as error:  # noqa: BLE001 - handed on to the test
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("name", OPS)
def test_backward_runs_on_the_backend_of_its_forward(name, where, references):
    ours, _theirs, args = OPS[name]
    leaves = [a.clone().requires_grad_() for a in args]
    go = in_a_thread if where == "in a thread" else lambda call: call()
    with gsf.backend("eager"):
        out = ours(*leaves).square().sum()
    references.clear()
    (first,) = torch.autograd.grad(out, leaves[0], create_graph=True)
    assert references
    references.clear()
    go(lambda: first.square().sum().backward())  # of second order: the graph that the backward built
    assert references
    references.clear()
    other = ours(*[a.clone().requires_grad_() for a in args]).sum()
    with gsf.backend("eager"):
        go(other.backward)
    assert not references
