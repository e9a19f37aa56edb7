"""Exact arithmetic under `torch.autocast`: the bytes of every op, module and hook are those outside of it."""

import contextlib

import attach_models as tiny
import pytest
import torch
from torch.utils import _pytree as pytree

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.analysis.concepts.methods import Detector
from gemmascope_fast.attach.entries import Activations
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.dropin import core
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.sae import MatryoshkaSAE
from gemmascope_fast.sae.multi_site import CrossLayerTranscoder

D, F, N = 64, 128, 20
AUTOCASTS = [torch.bfloat16, torch.float16]
INPUTS = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(dtype=torch.float32):
    given = {
        "W_enc": random(D, F) / 8,
        "W_dec": random(F, D, seed=1) / 8,
        "b_enc": random(F, seed=2),
        "b_dec": random(D, seed=3),
        "threshold": torch.full((F,), 0.5),
    }
    return {name: t.to(dtype) for name, t in given.items()}


class Dropped(torch.nn.Module):
    """What the drop-ins share: decode of dense latents, where few fire and where most do."""

    def __init__(self):
        super().__init__()
        self.sae = gsf.JumpReLUSAE.from_weights(**weights() | {"threshold": torch.full((F,), 2.5)})
        self.d_in = D

    def forward(self, x):
        few = self.sae.encode(x)
        few = few * (few > 3.0)  # one in fifty
        return core.decode(self.sae, few), core.decode(self.sae, few + 1), core.pre_activations(self.sae, x)


def crosslayer(dtype=torch.float32):
    given = {
        "W_enc": [random(D, F, seed=i) / 8 for i in range(2)],
        "W_dec": [random(F, 2, D, seed=2 + i) / 8 for i in range(2)],
        "b_enc": [torch.zeros(F)] * 2,
        "b_dec": [torch.zeros(D)] * 2,
        "threshold": [torch.full((F,), 0.5)] * 2,
        "W_skip": [random(D, D, seed=4 + i) for i in range(2)],
    }
    return CrossLayerTranscoder.from_weights(**{name: [t.to(dtype) for t in ts] for name, ts in given.items()})


SKIP = {"W_skip": random(D, D, seed=5)}
MODULES = {
    "sae": lambda: gsf.JumpReLUSAE.from_weights(**weights()),
    "sae in bfloat16": lambda: gsf.JumpReLUSAE.from_weights(**weights(torch.bfloat16)),
    "skip transcoder": lambda: gsf.JumpReLUSkipTranscoder.from_weights(**weights(), **SKIP),
    "skip transcoder in float16": lambda: gsf.JumpReLUSkipTranscoder.from_weights(
        **weights(torch.float16), W_skip=SKIP["W_skip"].half()
    ),
    "top-k": lambda: gsf.TopKSAE.from_weights(**weights() | {"threshold": torch.zeros(F)}, k=9),
    "crosscoder": lambda: gsf.Crosscoder.from_weights(**weights(), n_layers=2),
    "cross-layer transcoder": crosslayer,
    "cross-layer transcoder in float16": lambda: crosslayer(torch.float16),
    "top-k in float16": lambda: gsf.TopKSAE.from_weights(
        **weights(torch.float16) | {"threshold": torch.zeros(F, dtype=torch.float16)}, k=9
    ),
    "nested sae": lambda: MatryoshkaSAE.from_sae(gsf.JumpReLUSAE.from_weights(**weights())),
    "nested sae, int8": lambda: MatryoshkaSAE.from_sae(
        gsf.JumpReLUSAE.from_weights(**weights()), activations="int8", bits=4
    ),
    "nested layer": lambda: MatryoshkaLinear.from_linear(
        torch.nn.Linear(D, 48), group_size=32, activations="int8", mean=random(D, seed=6)
    ),
    "dropped in": Dropped,
}


def run_all(module, x, dense, inside):
    """Answers and gradients of everything that a module does, backward inside the block as well."""
    with inside:
        x = x.clone().requires_grad_()
        found = [module(x)]
        if hasattr(module, "encode") and not isinstance(module, Dropped):
            latents = module.encode_sparse(x)
            found += [s.values for s in (latents if isinstance(latents, list) else [latents])]
            dense = dense.clone().requires_grad_()
            found += [module.decode(latents), module.decode(dense), module.decode(dense.detach())]
            found.append(torch.autograd.grad(module.decode(dense).float().square().sum(), dense))
        if hasattr(module, "skip"):
            found.append(module.skip(x))
        total = sum(t.float().square().sum() for t in pytree.tree_leaves(found) if t.requires_grad)
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        found.append([g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None])
    return [t.detach() for t in pytree.tree_leaves(found)]


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind, dtype, autocast, backend):
    torch.manual_seed(0)
    module = MODULES[kind]()
    shape = (2, N, D) if kind.startswith("cross-layer") else (N, D)
    x = random(*shape, seed=7).to(dtype)
    dense = torch.relu(random(*shape[:-1], F, seed=8)).to(next(iter(module.state_dict().values())).dtype)
    dense = dense if dense.is_floating_point() else dense.float()
    asked = contextlib.nullcontext() if backend is None else gsf.backend(backend)
    with asked:
        inside = run_all(module, x, dense, torch.autocast("cpu", autocast))  # first, where anything is cached
        plain = run_all(module, x, dense, contextlib.nullcontext())
    assert len(inside) == len(plain) > 1
    for ours, theirs in zip(inside, plain, strict=True):
        assert same_bytes(ours, theirs)


@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("dtype", INPUTS)
def test_references(dtype, autocast):
    """Of every op with a product, called as it stands."""
    x, W, b, theta = random(N, D).to(dtype), random(D, F, seed=1), random(F, seed=2), torch.zeros(F)
    nested = MatryoshkaLinear.from_linear(torch.nn.Linear(D, 48), group_size=32)
    planes, more = list(nested.packed.read(4)), (nested.scale, nested.zero_point, *[None] * 4, 48, 32, 4, 0)
    calls = [
        lambda: ops.encode_reference(x, W, b, theta),
        lambda: ops.encode_tensor_reference(x, W, b, theta),
        lambda: ops.matryoshka_linear_reference(x, planes, *more, False),
        lambda: ops.matryoshka_linear_reference(x, planes, *more, True),
    ]
    csr = ops.encode(x, W, b, theta)
    calls += [
        lambda: ops.decode_reference(*csr, W.t(), None),
        lambda: ops.sampled_dot_reference(x, W.t(), b, *csr[:2]),
        lambda: ops.screen_rows_reference(W, b, theta, x[0].float(), True, random(2, D)),
        lambda: Detector("probe", b[:D], b[:D], x[0].float()).scores(x.float()),
    ]
    for call in calls:
        with torch.autocast("cpu", autocast):
            inside = call()
        for ours, theirs in zip(pytree.tree_leaves(inside), pytree.tree_leaves(call()), strict=True):
            assert same_bytes(ours, theirs)


# ---- in a model ----------------------------------------------------------------------------------------------------

SITES = {"site": gsf.Site("mlp_in", 1), "site_out": gsf.Site("mlp", 1)}


@pytest.mark.parametrize("autocast", AUTOCASTS)
def test_a_spliced_skip_transcoder_in_a_model_under_autocast(autocast):
    model = tiny.gemma3()
    coder = tiny.sae(kind=gsf.JumpReLUSkipTranscoder, W_skip=0.1 * random(32, 32), **SITES)
    block = tiny.layer(model)
    with torch.no_grad(), torch.autocast("cpu", autocast):
        read = Activations()
        outer = gsf.attach(model, {gsf.Site("mlp_in", 1): read}, tokens="all")
        with (
            outer,
            gsf.attach(model, coder, mode="splice", tokens="all") as run,
            tiny.Hand(block.post_feedforward_layernorm) as written,
        ):
            model(tiny.ids())
    x = outer.activations[gsf.Site("mlp_in", 1)]
    (latents,) = (run.latents[key] for key in run.latents)
    assert latents == coder.encode_sparse(x)
    assert same_bytes(written.rows(), coder(x).detach().to(written.rows().dtype))


@pytest.mark.parametrize("kind", ["sae", "skip transcoder"])
def test_gradients_of_the_error_term_under_autocast(kind):
    """What the error term hands on in a backward inside the block, beside the same outside of it."""
    from gemmascope_fast.attach.error_term import with_sae_gradient

    sae = MODULES[kind]()
    found = []
    for inside in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
        with inside:
            x = random(N, D, seed=9).requires_grad_()
            out = with_sae_gradient(x, sae, sae.encode_sparse(x), x, None)
            leaves = [x, *(p for p in sae.parameters() if p is not sae.threshold)]
            found.append([out.detach(), *torch.autograd.grad((out * random(N, D, seed=10)).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert same_bytes(ours, theirs)
