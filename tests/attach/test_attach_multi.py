"""Coders of several sites inside a model: cross-layer transcoders and crosscoders, against dense hooks by hand."""

import contextlib

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder, MultiSiteConfig

N, D, F = 4, tiny.D, 48


@pytest.fixture(scope="module", params=[tiny.gemma2, tiny.gemma3])
def model(request):
    return request.param()


def clt(skip=False, kind=None, sites=("mlp_in", "mlp")):
    g = torch.Generator().manual_seed(4)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    made = CrossLayerTranscoder.from_weights(
        W_enc=[draw(D, F, scale=D**-0.5) for _ in range(N)],
        W_dec=[draw(F, N - i, D, scale=0.3) for i in range(N)],
        b_enc=[draw(F, scale=0.1) for _ in range(N)],
        b_dec=[draw(D, scale=0.1) for _ in range(N)],
        threshold=[torch.full((F,), 0.7) for _ in range(N)],
        W_skip=[draw(D, D, scale=0.1) for _ in range(N)] if skip else None,
    )
    reads, writes = ([gsf.Site(kind, i) for i in range(N)] for kind in sites)
    made.cfg = MultiSiteConfig(D, F, N, tuple(reads), tuple(writes))
    if kind:
        made.kind = kind
    return made


class ByHand(contextlib.ExitStack):
    """Dense eager: each layer's input is caught, each MLP output replaced as `new(layer, y, x̂, f)` says."""

    def __init__(self, model, coder, new, change=lambda layer, f: f):
        super().__init__()
        self.coder, self.new, self.change, self.x, self.f = coder, new, change, {}, {}
        for i, block in enumerate(model.model.layers):
            self.enter_context(tiny.Hand(block.pre_feedforward_layernorm, change=lambda x, i=i: self.read(i, x)))
            self.enter_context(tiny.Hand(block.post_feedforward_layernorm, change=lambda y, i=i: self.write(i, y)))

    def read(self, i, x):
        own = self.coder.layers[i]
        z = x @ own.W_enc + own.b_enc
        self.x[i], self.f[i] = x, torch.relu(z) * (z > own.threshold)
        return x

    def output(self, i, latents):
        parts = [latents[j] @ self.coder.layers[j].W_dec[:, (i - j) * D : (i - j + 1) * D] for j in range(i + 1)]
        out = sum(parts) + self.coder.layers[i].b_dec[:D]
        return out if self.coder.W_skip is None else out + self.x[i] @ self.coder.W_skip[i]

    def write(self, i, y):
        changed = {j: self.change(j, f.clone()) for j, f in self.f.items() if j <= i}
        return self.new(y, self.output(i, self.f), self.output(i, changed))


def splice(y, recon, edited):
    return edited


def with_error(y, recon, edited):
    return edited + (y - recon).detach()


@pytest.mark.parametrize("skip", [False, True])
def test_every_output_is_spliced_and_every_layer_read(model, skip):
    coder, ids = clt(skip), tiny.ids()
    with torch.no_grad():
        base = model(ids).logits
        with gsf.attach(model, coder, tokens="all") as run:
            assert torch.equal(model(ids).logits, base)
        with ByHand(model, coder, lambda y, *_: y) as hand:
            model(ids)
        assert list(run.latents) == [gsf.Site("mlp_in", i) for i in range(N)]
        latents = coder.encode_sparse([hand.x[i].reshape(-1, D) for i in range(N)])
        for i in range(N):
            assert run.latents[i] is run.latents[i, "mlp_in"]
            assert run.latents[i] == latents[i]
            assert latents[i].nnz > 50
        with gsf.attach(model, [coder], mode="splice", tokens="all"):
            got = model(ids).logits
        with ByHand(model, coder, splice):
            want = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, base, atol=1e-2)


def test_a_splice_sums_as_the_coder_itself():
    """Bit for bit: the first output's replacement reaches the second layer's input, and so on."""
    model, coder, ids = tiny.gemma3(), clt(True), tiny.ids()
    with (
        torch.no_grad(),
        gsf.attach(model, coder, mode="splice", tokens="all"),
        contextlib.ExitStack() as stack,
    ):
        x = [stack.enter_context(tiny.Hand(b.pre_feedforward_layernorm)) for b in model.model.layers]
        y = [stack.enter_context(tiny.Hand(b.post_feedforward_layernorm)) for b in model.model.layers]
        model(ids)
        # hooks of a module run in their order: these stand after ours
        assert torch.equal(torch.stack([h.seen[0] for h in y]), coder([h.seen[0] for h in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_its_error_nothing_changes(model, dtype):
    model, coder, ids = model.to(dtype), clt(True), tiny.ids()
    try:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                base = model(ids).logits
                with gsf.attach(model, coder, mode="splice+error", edits=gsf.Add(3, 0.0, site=1), tokens="all"):
                    assert torch.equal(model(ids).logits, base)
    finally:
        model.float()


def put(f, feature, value):
    f[..., feature] = value
    return f


@pytest.mark.parametrize("mode", ["splice", "splice+error"])
@pytest.mark.parametrize("tokens", ["all", "content"])
def test_an_edit_acts_at_its_own_output_and_every_later_one(model, mode, tokens):
    coder, ids = clt(), tiny.ids()
    v = torch.linspace(-1, 1, D)
    edits = [gsf.Clamp(5, 3.0, site=(1, "mlp_in")), gsf.Ablate([2, 7], site=2), gsf.Direction(v, 2.0, site=2)]
    chosen = (ids != 2) | (tokens == "all")

    def change(layer, f):
        return put(f, 5, 3.0) if layer == 1 else put(f, [2, 7], 0.0) if layer == 2 else f

    how = splice if mode == "splice" else with_error
    with torch.no_grad():
        with gsf.attach(model, coder, mode=mode, edits=edits, tokens=tokens):
            got = model(ids).logits
        with (
            ByHand(model, coder, lambda y, *r: torch.where(chosen[..., None], how(y, *r), y), change),
            tiny.Hand(model.model.layers[2].post_feedforward_layernorm, change=lambda y: y + 2 * v * chosen[..., None]),
        ):
            want = model(ids).logits
        with gsf.attach(model, coder, mode=mode, tokens=tokens):
            plain = model(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


@pytest.mark.parametrize("tokens", ["all", "content"])
def test_gradient_and_attribution_hold_the_error_constant(tokens):
    model, coder, ids = tiny.gemma3(), clt(True), tiny.ids()
    chosen = (ids != 2) | (tokens == "all")
    weights = [model.model.layers[0].self_attn.o_proj.weight, *(x.W_dec for x in coder.layers), *coder.W_skip]
    hand = ByHand(model, coder, lambda y, *r: torch.where(chosen[..., None], with_error(y, *r), y))
    with hand:
        metric = model(ids).logits[0, -1, 5] - model(ids).logits[0, -1, 9]
        f = [hand.f[i] for i in range(N)]
        *want, g1 = torch.autograd.grad(metric, [*weights, f[1]], allow_unused=False)
    with gsf.attach(model, coder, mode="splice+error", tokens=tokens) as run:
        model(ids)
        run.clear()
        metric = model(ids).logits[0, -1, 5] - model(ids).logits[0, -1, 9]
        got = torch.autograd.grad(metric, weights, retain_graph=True)
        score = run.attribution(metric)[gsf.Site("mlp_in", 1)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    second = score[18:].to_dense()  # the metric's second forward is the one whose latents `f` are
    expected = (g1 * f[1]).detach().reshape(-1, F) * chosen.reshape(-1, 1)
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_generate_splices_every_decoded_token():
    model, coder, ids = tiny.gemma3(), clt(), tiny.ids(1)
    with gsf.attach(model, coder, mode="splice", tokens="all") as run:
        output = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    want = ids
    with torch.no_grad(), ByHand(model, coder, splice):
        for _ in range(5):
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(output, want)
    assert not torch.equal(output, model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1))
    assert [s.n_rows for s in run.sequences(2, output)] == [13]


def test_integrated_gradients_are_those_of_dense_autograd():
    model, coder, ids, steps = tiny.gemma3(), clt(), tiny.ids(), 4

    def metric():
        return model(ids).logits[0, -1, 5]

    total = 0
    for step in range(steps):
        share = (step + 0.5) / steps
        with ByHand(model, coder, with_error, lambda i, f, share=share: share * f if i == 1 else f) as hand:
            # through the moved latents alone: share · f, so by the chain rule share times their gradient
            total = total + torch.autograd.grad(metric(), hand.f[1])[0] / share
    want = (total * hand.f[1] / steps).detach().reshape(-1, F)
    with gsf.attach(model, coder, mode="splice+error", tokens="all") as run:
        got = run.integrated_gradients(1, metric, steps)
    scale = float(want.abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-3, atol=1e-4 * scale)


# ---- crosscoders --------------------------------------------------------------------------------------


def crosscoder(layers=(0, 2, 3)):
    base = tiny.sae(len(layers) * D, seed=5)
    weights = {n: getattr(base, n).detach() for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    return Crosscoder(**weights, sites=[tiny.resid(i) for i in layers])


def test_a_crosscoder_reads_its_sites_side_by_side(model):
    coder, ids = crosscoder(), tiny.ids()
    other = tiny.sae(site=tiny.resid(1))
    with torch.no_grad():
        base = model(ids).logits
        with (
            contextlib.ExitStack() as stack,
            gsf.attach(model, [coder, other], tokens="content") as run,
        ):
            hands = [stack.enter_context(tiny.Hand(model.model.layers[i])) for i in (0, 2, 3)]
            assert torch.equal(model(ids).logits, base)
    want = coder.encode(torch.stack([hand.rows() for hand in hands], 1))
    want[(ids == 2).reshape(-1)] = 0
    assert list(run.latents) == [coder.sites, tiny.resid(1)]
    assert torch.equal(run.latents[2].to_dense(), want)
    assert run.latents[2] is run.latents[coder.sites]
    assert run.latents[1].shape == (18, tiny.F)
    assert float(want.count_nonzero()) > 50


def test_a_crosscoder_follows_generate(model):
    coder = crosscoder()
    with gsf.attach(model, coder, tokens="all") as run:
        output = model.generate(tiny.ids(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert [s.n_rows for s in run.sequences(coder.sites, output)] == [12, 12]


def test_a_crosscoder_of_latents_a_layer_is_observed():
    model, coder = tiny.gemma3(), clt(kind="crosscoder", sites=("resid", "resid"))
    with torch.no_grad(), tiny.Hand(model.model.layers[3]) as hand, gsf.attach(model, coder, tokens="all") as run:
        model(tiny.ids())
    assert run.latents[3] == coder.layers[3].encode_sparse(hand.rows())


BAD = {
    "crosscoder": (crosscoder, {"mode": "splice"}, "crosscoder .* cannot be spliced"),
    "crosscoder with its error": (crosscoder, {"mode": "splice+error"}, "cannot be spliced"),
    "crosscoder of latents a layer": (
        lambda: clt(kind="crosscoder", sites=("resid", "resid")), {"mode": "splice"}, "cannot be spliced",
    ),
    "under a key": (lambda: {1: clt()}, {}, "cross layer transcoder has 4 sites"),
    "crosscoder under a key": (lambda: {1: crosscoder()}, {}, "crosscoder has 3 sites"),
    "without sites": (lambda: CrossLayerTranscoder(clt().layers), {}, "names 0 of its 4 sites"),
    "too many layers": (lambda: crosscoder((0, 2, 4)), {}, "4 layers"),
    "another width": (lambda: Crosscoder(**{
        n: getattr(tiny.sae(60), n).detach() for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    }, sites=[tiny.resid(0), tiny.resid(1)]), {}, "carries 32 dimensions, the SAE's d_in is 30"),
    "edit without a site": (clt, {"mode": "splice", "edits": gsf.Clamp(1, 1.0)}, "names no site"),
    "feature too large": (clt, {"mode": "splice", "edits": gsf.Clamp(48, 1.0, site=1)}, r"\[0, 48\)"),
    "vector of another width": (
        clt, {"mode": "splice", "edits": gsf.Direction(torch.ones(2 * D), site=2)}, r"expected \[32\]",
    ),
    "two splices": (
        lambda: [clt(), tiny.sae(site=gsf.Site("mlp", 2))], {"mode": "splice"}, "two splices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_attached_is_named(name):
    model = tiny.gemma3()
    make, options, message = BAD[name]
    before = tiny.hook_count(model)
    with pytest.raises(gsf.AttachError, match=message):
        gsf.attach(model, make(), **options)
    assert tiny.hook_count(model) == before
