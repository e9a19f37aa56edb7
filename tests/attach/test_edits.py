"""Edits of latents inside a model, against dense eager arithmetic in hooks written by hand."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops

LAYER = 1


@pytest.fixture(scope="module")
def model():
    return tiny.gemma3()


@pytest.fixture(scope="module")
def sae():
    return tiny.sae()


@pytest.fixture(scope="module")
def fired(model, sae):
    """Features that fire somewhere, the most frequent first."""
    with torch.no_grad(), gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        model(tiny.ids())
    return torch.bincount(run.latents[LAYER].col_indices.long()).argsort(descending=True).tolist()


def ours(model, sae, edits, mode="splice+error", ids=None, tokens="all"):
    with torch.no_grad(), gsf.attach(model, {LAYER: sae}, mode=mode, edits=edits, tokens=tokens):
        return model(tiny.ids() if ids is None else ids).logits


def by_hand(model, sae, change, mode="splice+error", extra=0.0, where=None):
    """Dense eager: x̂ of the changed latents, plus the error, plus what is added to the activation itself."""

    def hook(x):
        f = sae.encode(x)
        new = change(f.clone()) @ sae.W_dec + sae.b_dec + extra
        if mode == "splice+error":
            new = new + (x - (f @ sae.W_dec + sae.b_dec))
        return new if where is None else torch.where(where[..., None], new, x)

    with torch.no_grad(), tiny.Hand(model.model.layers[LAYER], change=hook):
        return model(tiny.ids()).logits


def put(f, feature, value):
    f[..., feature] = value
    return f


def edit_cases(a, b, c):
    """name: (edits, the same on dense latents)."""
    v = torch.linspace(-1, 1, 32)
    return {
        "clamp": (gsf.Clamp(a, 2.5), lambda f: put(f, a, 2.5)),
        "clamp of what is silent": (gsf.Clamp(c, 2.5), lambda f: put(f, c, 2.5)),
        "scale": (gsf.Scale(a, -1.5), lambda f: put(f, a, -1.5 * f[..., a])),
        "ablate": (gsf.Ablate([a, b]), lambda f: put(f, [a, b], 0)),
        "add": (gsf.Add(b, 3.0), lambda f: put(f, b, f[..., b] + 3)),
        "min clamp": (gsf.MinClamp(a, 1.2), lambda f: put(f, a, f[..., a].clamp(min=1.2))),
        "mask": (gsf.Mask([a, c]), lambda f: f * torch.isin(torch.arange(tiny.F), torch.tensor([a, c]))),
        "in order": (
            [gsf.Clamp(a, 2.0), gsf.Add(a, 1.0), gsf.Scale(a, 3.0), gsf.Ablate(b)],
            lambda f: put(put(f, a, 9.0), b, 0),
        ),
        "mask, then more": (
            [gsf.Mask([a, b]), gsf.Scale(a, 2.0), gsf.Add(b, 1.0)],
            lambda f: put(put(torch.zeros_like(f), a, 2 * f[..., a]), b, f[..., b] + 1),
        ),
        "direction": ([gsf.Direction(v, 2.0), gsf.Clamp(a, 1.0)], lambda f: put(f, a, 1.0)),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["splice", "splice+error"])
@pytest.mark.parametrize("name", edit_cases(0, 1, 2))
def test_edits_are_those_of_dense_arithmetic(model, sae, fired, name, mode):
    edits, change = edit_cases(fired[0], fired[1], fired[-1])[name]
    extra = 2.0 * torch.linspace(-1, 1, 32) if name == "direction" else 0.0
    want = by_hand(model, sae, change, mode, extra)
    got = ours(model, sae, edits, mode)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, by_hand(model, sae, lambda f: f, mode), atol=1e-3)


NOTHING = {
    "add 0": lambda a, silent: gsf.Add(a, 0.0),
    "scale 1": lambda a, silent: gsf.Scale(a, 1.0),
    "direction 0": lambda a, silent: gsf.Direction(torch.ones(32), 0.0),
    "ablate what is silent": lambda a, silent: gsf.Ablate(silent),
    "off": lambda a, silent: gsf.Clamp(a, 9.0, on=False),
    "no sequence": lambda a, silent: gsf.Clamp(a, 9.0, sequences=torch.zeros(2, dtype=torch.bool)),
    "no position": lambda a, silent: gsf.Clamp(a, 9.0, positions="generated"),
    "both": lambda a, silent: [gsf.Add(a, 2.0), gsf.Add(a, -2.0)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NOTHING)
def test_an_edit_that_changes_nothing_changes_no_bit(model, sae, fired, name, dtype):
    with torch.no_grad(), gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        model(tiny.ids())
    silent = next(f for f in range(tiny.F) if f not in run.latents[LAYER].col_indices)
    model.to(dtype)
    try:
        with torch.no_grad():
            base = model(tiny.ids()).logits
        assert torch.equal(ours(model, sae, NOTHING[name](fired[0], silent)), base)
        assert not torch.equal(ours(model, sae, gsf.Add(fired[0], 5.0)), base)
    finally:
        model.float()


def test_editing_three_features_decodes_three_rows(model, sae, fired, monkeypatch):
    """Neither a dense product, nor a second encode, nor a decode of what was not touched."""
    entries, encodes = [], []
    real_decode, real_encode = ops.decode.__class__.__call__, type(sae).encode_sparse

    def call(op, *args):
        if op.name == "decode":
            entries.append(args[1].numel())
        return real_decode(op, *args)

    monkeypatch.setattr(ops.decode.__class__, "__call__", call)
    monkeypatch.setattr(type(sae), "encode_sparse", lambda *a, **k: encodes.append(1) or real_encode(*a, **k))
    ours(model, sae, [gsf.Clamp(f, 4.0) for f in fired[:3]])
    assert entries == [3 * 18]
    assert encodes == [1]
    entries.clear()
    ours(model, sae, [])
    ours(model, sae, gsf.Direction(torch.ones(32), 2.0))
    assert entries == []


# ---- where they act -----------------------------------------------------------------------------------

ROWS = torch.arange(9).expand(2, 9)
SELECTED = {
    "mask": ({"positions": torch.arange(9) > 4}, ROWS > 4),
    "mask of a batch": ({"positions": torch.tensor([[4], [6]]) < ROWS}, torch.tensor([[4], [6]]) < ROWS),
    "callable": ({"positions": lambda ids: ids % 2 == 0}, tiny.ids() % 2 == 0),
    "prompt": ({"positions": "prompt"}, ROWS >= 0),
    "one sequence": ({"sequences": torch.tensor([False, True])}, torch.tensor([[False], [True]]).expand(2, 9)),
    "by number": ({"sequences": [0]}, torch.tensor([[True], [False]]).expand(2, 9)),
    "both": ({"sequences": [1], "positions": ROWS[0] > 4}, (ROWS > 4) & torch.tensor([[False], [True]])),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["splice", "splice+error"])
@pytest.mark.parametrize("name", SELECTED)
def test_edits_act_where_they_are_told(model, sae, fired, name, mode):
    options, where = SELECTED[name]
    a = fired[0]
    edits = [gsf.Clamp(a, 2.5, **options), gsf.Add(fired[1], 1.0)]
    want = by_hand(
        model, sae, lambda f: put(put(f, fired[1], f[..., fired[1]] + 1), a, torch.where(where, 2.5, f[..., a])), mode
    )
    torch.testing.assert_close(ours(model, sae, edits, mode), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["splice", "splice+error"])
def test_edits_leave_tokens_alone_that_were_not_selected(model, sae, fired, mode):
    where = tiny.ids() != 2
    edits = [gsf.Clamp(fired[0], 2.5), gsf.Direction(torch.ones(32), 1.5, positions=ROWS[0] < 5)]
    extra = torch.where(ROWS[..., None] < 5, 1.5, 0.0)
    want = by_hand(model, sae, lambda f: put(f, fired[0], 2.5), mode, extra, where)
    torch.testing.assert_close(ours(model, sae, edits, mode, tokens="content"), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_edits_under_generate_act_on_each_decoded_token(model, sae, fired, positions):
    """With a KV cache, as decoding by hand without one, where the edit is on for one sequence of two."""
    a, ids, new = fired[0], tiny.ids(), 6
    edit = gsf.Clamp(a, 40.0, positions=positions, sequences=torch.tensor([True, False]))
    with gsf.attach(model, {LAYER: sae}, mode="splice+error", edits=edit, tokens="all"):
        got = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=-1)

    def change(x):
        f = sae.encode(x)
        column = torch.arange(x.shape[1])
        where = {"all": column >= 0, "prompt": column < 9, "generated": column >= 9}[positions]
        shift = torch.where(where, 40.0 - f[..., a], 0.0) * torch.tensor([[1.0], [0.0]])
        return x + shift[..., None] * sae.W_dec[a]

    want = ids
    with torch.no_grad(), tiny.Hand(model.model.layers[LAYER], change=change):
        for _ in range(new):
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, want)
    plain = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=-1)
    assert torch.equal(got[1], plain[1])
    assert not torch.equal(got[0], plain[0])


def test_an_edit_is_switched_between_calls(model, sae, fired):
    edit = gsf.Clamp(fired[0], 6.0)
    with torch.no_grad():
        base = model(tiny.ids()).logits
        with gsf.attach(model, {LAYER: sae}, mode="splice+error", edits=[edit], tokens="all"):
            both = model(tiny.ids()).logits
            edit.sequences = [1]
            one = model(tiny.ids()).logits
            edit.on = False
            assert torch.equal(model(tiny.ids()).logits, base)
    assert torch.equal(one[0], base[0])
    assert not torch.equal(both[0], base[0])
    torch.testing.assert_close(one[1], both[1])


def test_several_sites_and_a_direction_without_an_sae(model, sae, fired):
    v = torch.linspace(-2, 1, 32)
    with torch.no_grad():
        with gsf.attach(
            model,
            {LAYER: sae, 2: tiny.sae(seed=2)},
            mode="splice+error",
            edits={LAYER: gsf.Clamp(fired[0], 2.0), "model.layers.3.output": [gsf.Direction(v)]},
            tokens="all",
        ) as run:
            got = model(tiny.ids()).logits
        with gsf.attach(
            model,
            {LAYER: sae, 2: tiny.sae(seed=2)},
            mode="splice+error",
            edits=[gsf.Direction(v, site=3), gsf.Clamp(fired[0], 2.0, site=(LAYER, "resid"))],
            tokens="all",
        ):
            assert torch.equal(model(tiny.ids()).logits, got)
        with (
            tiny.Hand(
                model.model.layers[LAYER],
                change=lambda x: x + (2 - sae.encode(x)[..., [fired[0]]]) * sae.W_dec[fired[0]],
            ),
            tiny.Hand(model.model.layers[3], change=lambda x: x + v),
        ):
            want = model(tiny.ids()).logits
        with (
            gsf.attach(model, (), mode="splice+error", edits={3: gsf.Direction(v)}, tokens="all"),
            tiny.Hand(model.model.norm, "input") as x,
        ):
            model(tiny.ids())
        with tiny.Hand(model.model.norm, "input") as plain:
            model(tiny.ids())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x.rows(), plain.rows() + v)
    assert list(run.latents) == [LAYER, 2]


def test_edits_of_a_transcoder_act_at_its_output(model, fired):
    coder = tiny.sae(kind=gsf.JumpReLUTranscoder, site=gsf.Site("mlp_in", 1), site_out=gsf.Site("mlp", 1))
    block = model.model.layers[1]
    with torch.no_grad():
        with gsf.attach(model, coder, mode="splice+error", edits=gsf.Add(5, 4.0), tokens="all"):
            got = model(tiny.ids()).logits
        with tiny.Hand(block.post_feedforward_layernorm, change=lambda y: y + 4 * coder.W_dec[5]):
            torch.testing.assert_close(got, model(tiny.ids()).logits)


def test_the_gradient_goes_through_edits(model, sae, fired):
    a, b = fired[:2]
    weights = (model.model.layers[0].mlp.up_proj.weight, sae.W_enc, sae.W_dec)

    def gradients():
        return torch.autograd.grad(model(tiny.ids()).logits.logsumexp(-1).square().sum(), weights)

    with gsf.attach(
        model, {LAYER: sae}, mode="splice+error", edits=[gsf.Scale(a, 3.0), gsf.Clamp(b, 1.0)], tokens="all"
    ):
        got = gradients()

    def hook(x):
        z = x @ sae.W_enc + sae.b_enc
        f = torch.relu(z) * (z > sae.threshold)
        error = (x - (f @ sae.W_dec + sae.b_dec)).detach()
        scale = torch.ones(tiny.F).index_fill(0, torch.tensor(a), 3.0)
        f = (f * scale).index_fill(-1, torch.tensor(b), 1.0)
        return f @ sae.W_dec + sae.b_dec + error

    with tiny.Hand(model.model.layers[LAYER], change=hook):
        want = gradients()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


# ---- bad input ----------------------------------------------------------------------------------------

BAD = {
    "feature too large": (lambda: gsf.Clamp(96, 1.0), IndexError, r"\[0, 96\)"),
    "feature below zero": (lambda: gsf.Ablate(-1), IndexError, "from 0 on"),
    "mask too large": (lambda: gsf.Mask([1, 96]), IndexError, r"\[0, 96\)"),
    "not a feature": (lambda: gsf.Clamp("a", 1.0), ValueError, "feature"),
    "not a number": (lambda: gsf.Clamp(1, float("nan")), ValueError, "finite"),
    "vector of another width": (lambda: gsf.Direction(torch.ones(31)), ValueError, r"\[32\]"),
    "integer vector": (lambda: gsf.Direction(torch.ones(32, dtype=torch.int64)), ValueError, "floating"),
    "positions": (lambda: gsf.Clamp(1, 1.0, positions="some"), ValueError, "positions"),
    "two values": (lambda: [gsf.Clamp(1, 1.0), gsf.Clamp(1, 2.0)], ValueError, "contradict"),
    "clamp and ablate": (lambda: [gsf.Clamp(1, 1.0), gsf.Ablate([0, 1])], ValueError, "contradict"),
    "at least and less": (lambda: [gsf.Clamp(1, 1.0), gsf.MinClamp(1, 2.0)], ValueError, "contradict"),
    "masked out": (lambda: [gsf.Clamp(1, 1.0), gsf.Mask([2])], ValueError, "drops feature 1"),
    "no such layer": (lambda: gsf.Direction(torch.ones(32), site=9), gsf.AttachError, "4 layers"),
    "no SAE there": (lambda: gsf.Clamp(1, 1.0, site=2), ValueError, "needs an SAE"),
    "no edit": (lambda: [3], TypeError, "edits"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_named_before_anything_runs(model, sae, name):
    make, error, message = BAD[name]
    before = tiny.hook_count(model)
    with pytest.raises(error, match=message):
        gsf.attach(model, {LAYER: sae}, mode="splice+error", edits=make(), tokens="all")
    assert tiny.hook_count(model) == before


def test_observing_takes_no_edits_and_several_saes_need_a_site(model, sae):
    with pytest.raises(gsf.AttachError, match="mode 'observe'"):
        gsf.attach(model, {LAYER: sae}, mode="observe", edits=gsf.Clamp(1, 1.0), tokens="all")
    with pytest.raises(gsf.AttachError, match="names no site"):
        gsf.attach(model, {1: sae, 2: sae}, mode="splice", edits=gsf.Clamp(1, 1.0), tokens="all")


def test_edits_of_separate_rows_do_not_contradict(model, sae):
    for one, other in (
        ({"positions": "prompt"}, {"positions": "generated"}),
        ({"sequences": [0]}, {"sequences": [1]}),
        ({"positions": ROWS[0] > 4}, {"positions": ROWS[0] < 4}),
    ):
        gsf.attach(
            model,
            {LAYER: sae},
            mode="splice",
            edits=[gsf.Clamp(1, 1.0, **one), gsf.Clamp(1, 2.0, **other)],
            tokens="all",
        )


def test_a_selection_of_the_wrong_size_is_an_error(model, sae):
    for options in (
        {"sequences": [2]},
        {"sequences": torch.ones(3, dtype=torch.bool)},
        {"positions": ROWS[:1, :5] > 2},
    ):
        with pytest.raises(gsf.AttachError, match=next(iter(options))):
            ours(model, sae, gsf.Clamp(1, 1.0, **options))


def test_edits_without_a_mode_keep_the_error(model, sae, fired):
    """The default is "splice+error": only what the edited features write changes."""
    edits = gsf.Clamp(fired[0], 5.0)
    outputs = []
    for given in ({}, {"mode": "splice+error"}, {"mode": "splice"}):
        with torch.no_grad(), gsf.attach(model, {LAYER: sae}, edits=edits, tokens="all", **given) as run:
            outputs.append(model(tiny.ids()).logits)
        assert run.mode == given.get("mode", "splice+error")
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with gsf.attach(model, {LAYER: sae}) as run:
        assert run.mode == "observe"
