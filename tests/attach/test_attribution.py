"""run.attribution against dense eager autograd with the error held constant."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf


@pytest.fixture(scope="module")
def model():
    return tiny.gemma3()


SAES = {1: tiny.sae(), 3: tiny.sae(seed=2)}
METRICS = {
    "loss": lambda logits: torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tiny.ids()[:, 1:].flatten()),
    "logit difference": lambda logits: logits[0, -1, 5] - logits[0, -1, 9],
}


class Dense:
    """A dense SAE with its error, in a hook; its latents are kept for autograd."""

    def __init__(self, sae, share=1.0):
        self.sae, self.share = sae, share

    def __call__(self, x):
        z = x @ self.sae.W_enc + self.sae.b_enc
        self.f = torch.relu(z) * (z > self.sae.threshold)
        error = (x - (self.f @ self.sae.W_dec + self.sae.b_dec)).detach()
        self.moved = self.share * self.f
        return self.moved @ self.sae.W_dec + self.sae.b_dec + error


def by_hand(model, metric, ids):
    dense = {key: Dense(sae) for key, sae in SAES.items()}
    hands = [tiny.Hand(model.model.layers[key], change=d) for key, d in dense.items()]
    value = metric(model(ids).logits)
    grads = torch.autograd.grad(value, [d.f for d in dense.values()])
    for hand in hands:
        hand.handle.remove()
    return {k: (g * d.f).detach().reshape(-1, tiny.F) for (k, d), g in zip(dense.items(), grads, strict=True)}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_attribution_is_that_of_dense_autograd(model, name, frozen):
    want = by_hand(model, METRICS[name], tiny.ids())
    for module in (model, *SAES.values()):
        module.requires_grad_(not frozen)
    try:
        with gsf.attach(model, SAES, mode="splice+error", tokens="all") as run:
            metric = METRICS[name](model(tiny.ids()).logits)
            got = run.attribution(metric)
    finally:
        for module in (model, *SAES.values()):
            module.requires_grad_(True)
    for key in SAES:
        assert torch.equal(got[key].crow_indices, run.latents[key].crow_indices)
        scale = float(want[key].abs().max())
        torch.testing.assert_close(got[key].to_dense(), want[key], rtol=1e-3, atol=1e-5 * scale)
        assert scale > 0


def test_attribution_of_a_reward():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**tiny.COMMON, num_labels=1)
    model = tiny.lively(transformers.Gemma2ForSequenceClassification(config))
    content = tiny.ids() != 2
    dense = Dense(SAES[1])
    with tiny.Hand(model.model.layers[1], change=lambda x: torch.where(content[..., None], dense(x), x)):
        reward = model(tiny.ids()).logits[:, 0].sum()
        want = torch.autograd.grad(reward, dense.f)[0] * dense.f
    with gsf.attach(model, {1: SAES[1]}, mode="splice+error", tokens="content") as run:
        got = run.attribution(model(tiny.ids()).logits[:, 0].sum())[1]
    torch.testing.assert_close(got.to_dense(), want.reshape(-1, tiny.F), rtol=1e-3, atol=1e-5)
    assert got[0].nnz == 0


def test_several_calls_and_one_metric(model):
    with gsf.attach(model, {1: SAES[1]}, mode="splice+error", tokens="all") as run:
        model(tiny.ids())
        metric = model(tiny.ids(seed=6)).logits[0, -1, 3]
        first = run.attribution(metric, retain_graph=True)[1]
        again = run.attribution(metric)[1]
    assert first == again
    assert first.n_rows == 36
    assert float(first[:18].values.abs().max()) == 0
    assert float(first[18:].values.abs().max()) > 0


def test_integrated_gradients(model):
    ids, steps = tiny.ids(), 4

    def metric(logits):
        return logits[0, -1, 5] - logits[0, -1, 9]

    total = 0
    for step in range(steps):
        dense = Dense(SAES[1], (step + 0.5) / steps)
        with tiny.Hand(model.model.layers[1], change=dense):
            total = total + torch.autograd.grad(metric(model(ids).logits), dense.moved)[0]
    want = (total * dense.f / steps).detach().reshape(-1, tiny.F)
    with gsf.attach(model, {1: SAES[1]}, mode="splice+error", tokens="all") as run:
        got = run.integrated_gradients(1, lambda: metric(model(ids).logits), steps)
        assert len(run.tokens) == 0
        fine = run.integrated_gradients(1, lambda: metric(model(ids).logits), 64)
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-3, atol=1e-5)
    ends = []
    for share in (1.0, 0.0):
        with torch.no_grad(), tiny.Hand(model.model.layers[1], change=Dense(SAES[1], share)):
            ends.append(float(metric(model(ids).logits)))
    assert float(fine.values.sum()) == pytest.approx(ends[0] - ends[1], rel=0.02)


def test_what_has_no_gradient_is_named(model):
    with gsf.attach(model, SAES, tokens="all") as run:
        metric = model(tiny.ids()).logits.sum()
    with pytest.raises(gsf.AttachError, match="no gradient"):
        run.attribution(metric)
    with gsf.attach(model, SAES, mode="splice+error", tokens="all") as run:
        logits = model(tiny.ids()).logits
    with pytest.raises(gsf.AttachError, match="one element"):
        run.attribution(logits)
    with torch.no_grad(), gsf.attach(model, SAES, mode="splice+error", tokens="all") as run:
        metric = model(tiny.ids()).logits.sum()
    with pytest.raises(gsf.AttachError, match="no gradient"):
        run.attribution(metric)
    with (
        gsf.attach(model, SAES, mode="splice", tokens="all") as run,
        pytest.raises(gsf.AttachError, match="splice\\+error"),
    ):
        run.integrated_gradients(1, lambda: metric)
