"""The fused loop in attach gives the same bytes as the steps that it replaces, and does not run in other cases."""

import sys
from pathlib import Path

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import JumpReLUTranscoder, Site
from gemmascope_fast.attach import Ablate, Add, Clamp, Direction, Mask, MinClamp, Scale
from gemmascope_fast.backends.gpu import loop, register

sys.path.insert(0, str(Path(__file__).parents[1]))
import attach_models as models

SITE = Site("resid", 1)
PLAIN = [Clamp(3, 2.0), Ablate([5, 6]), Scale(8, 1.5), Add(11, -0.5), MinClamp(13, 0.7), Scale(14, 1.0)]


@pytest.fixture(scope="module")
def model():
    return models.gemma3(num_hidden_layers=3)


@pytest.fixture
def served(monkeypatch):
    """Rows of each run of the fused loop."""
    rows, splice = [], loop.splice

    def spy(x, *args, **more):
        rows.append(x.shape[0])
        return splice(x, *args, **more)

    monkeypatch.setattr(loop, "splice", spy)
    return rows


def run(model, ids, backend, edits, mode="splice+error", sae=None, grad=False, tokens="all", **options):
    """Logits and latents of one forward."""
    sae = models.sae(site=SITE) if sae is None else sae
    with (
        torch.set_grad_enabled(grad),
        gsf.backend(backend),
        gsf.attach(model, sae, mode=mode, edits=edits, tokens=tokens, **options) as r,
    ):
        logits = model(ids).logits
    (latents,) = r.latents.values()
    return logits.detach(), latents


def same(got, want, same_bytes):
    same_bytes(got[0], want[0])
    same_bytes([got[1].crow_indices, got[1].col_indices, got[1].values.detach()],
               [want[1].crow_indices, want[1].col_indices, want[1].values.detach()])  # fmt: skip
    assert got[1].shape == want[1].shape


@pytest.mark.parametrize("mode", ["splice", "splice+error"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bytes_as_the_steps(model, served, same_bytes, mode, shape, dtype):
    ids = models.ids(*shape)
    model = model.to(dtype)
    try:
        want = run(model, ids, "native", PLAIN, mode)
        assert not served
        got = run(model, ids, "triton", PLAIN, mode)
    finally:
        model.to(torch.float32)
    assert served == [shape[0] * shape[1]]
    same(got, want, same_bytes)
    assert want[1].values.numel() > 0
    # nothing holds the room that the loop made for everything
    assert got[1].values.untyped_storage().nbytes() == 4 * got[1].values.numel()


def test_a_splice_without_edits(model, served, same_bytes):
    ids = models.ids(1, 3)
    same(run(model, ids, "triton", [], "splice"), run(model, ids, "native", [], "splice"), same_bytes)
    assert served == [3]
    run(model, ids, "triton", [], "splice+error")
    assert served == [3]  # what comes goes on


def test_generation_and_numbers_that_change(model, served, same_bytes):
    """Every decoded token takes the loop; an edit changed between calls counts from then on."""
    found = []
    for backend in ("native", "triton"):
        edit, out = Clamp(3, 1.0), []
        attached = gsf.attach(model, models.sae(site=SITE), mode="splice+error", edits=[edit], tokens="all")
        with torch.no_grad(), gsf.backend(backend), attached:
            out.append(model(models.ids(1, 4)).logits)
            edit.value = 9.0
            out.append(model(models.ids(1, 4)).logits)
            edit.on = False
            out.append(model(models.ids(1, 4)).logits)
            edit.on = True
            out.append(model.generate(models.ids(1, 5), max_new_tokens=3, do_sample=False))
        found.append(out)
    same_bytes(found[1], found[0])
    assert not torch.equal(found[0][0], found[0][1])
    assert served == [4, 4, 5, 1, 1]


def test_where_the_steps_serve(model, served, same_bytes):
    """What the loop does not do, or not in the same bytes, is left to the steps."""
    ids = models.ids(1, 4)
    chosen = torch.tensor([[True, False, True, True]])
    half = models.sae(site=SITE).to(torch.bfloat16)
    two_sites = models.sae(kind=JumpReLUTranscoder, site=Site("mlp_in", 1), site_out=Site("mlp", 1))
    cases = [
        {"edits": [Mask([1, 2, 3])]},
        {"edits": [Clamp(3, 2.0), Direction(torch.ones(models.D))]},
        {"edits": [Scale(3, 2.0), Add(3, 1.0)]},
        {"edits": [Clamp(3, 2.0, positions="generated")]},
        {"edits": [Clamp(3, 2.0, sequences=[0])]},
        {"edits": PLAIN, "tokens": chosen},
        {"edits": PLAIN, "sae": half},
        {"edits": PLAIN, "sae": two_sites},
    ]
    for case in cases:
        same(run(model, ids, "triton", **case), run(model, ids, "native", **case), same_bytes)
    run(model, models.ids(1, 17), "triton", PLAIN)
    run(model, ids, "native", PLAIN)
    run(model, ids, "eager", PLAIN)
    assert served == []


def test_gradients_need_the_steps(model, served):
    logits, _ = run(model, models.ids(1, 4), "triton", PLAIN, grad=True)
    assert logits.isfinite().all()
    assert served == []


def test_an_activation_written_in_between_keeps_its_own(model, served, same_bytes):
    """Another run adds at the site before this one writes: the error term is that of what it finds there."""
    found = []
    for backend in ("native", "triton"):
        with torch.no_grad(), gsf.backend(backend):
            other = gsf.attach(model, (), mode="splice+error", edits={1: Direction(torch.ones(models.D))}, tokens="all")
            with (
                other,
                gsf.attach(model, models.sae(site=SITE), mode="splice+error", edits=[Clamp(3, 5.0)], tokens="all"),
            ):
                found.append(model(models.ids(1, 4)).logits)
    same_bytes(found[1], found[0])
    assert served == [4]


def test_info_says_when_it_serves(monkeypatch):
    monkeypatch.setattr(register, "compiled", lambda op: op == "splice")
    assert register.loop_choice() == ("cuda", "two launches " + register.loop_choice()[1].split("launches ")[1])
    monkeypatch.setattr(register, "compiled", lambda op: False)
    assert register.loop_choice()[0] == "triton"
    monkeypatch.setattr(register.importlib.util, "find_spec", lambda name: None)
    assert register.loop_choice() == ("none", "the package triton is not installed")
