"""Gated SAEs of SAELens and dictionary_learning, which are JumpReLU SAEs."""

import copy

import pytest
import torch
from dictionary_learning.dictionary import GatedAutoEncoder
from lens_saes import D_IN, D_SAE, assert_as_exact, fill, in_double, tokens
from sae_lens import GatedSAE, GatedSAEConfig

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained


def gated(**cfg):
    return fill(GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, **cfg)))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_accelerated(centred, norm):
    sae, x = gated(apply_b_dec_to_input=centred, normalize_activations=norm), tokens()
    fast, exact = gsf.accelerate(sae), in_double(sae)
    with torch.no_grad():
        assert fast.why_plain() is None
        acts = fast.encode(x)
        assert torch.equal(acts != 0, sae.encode(x) != 0)
        assert 0 < int((acts != 0).sum()) < acts.numel()
        assert_as_exact(acts, sae.encode(x), exact.encode(x.double()))
        assert_as_exact(fast(x), sae(x), exact(x.double()))
        assert torch.equal(fast.encode_sparse(x).to_dense(), acts)
        _, cache = fast.run_with_cache(x)
        _, held = sae.run_with_cache(x)
        assert list(cache) == list(held)
        for name in held:
            torch.testing.assert_close(cache[name], held[name], rtol=1e-4, atol=1e-4)


def test_hooks_see_the_magnitudes_and_leave_the_gate():
    sae, x = gated(), tokens()
    fast = gsf.accelerate(sae)
    for each in (sae, fast):
        each.add_hook("hook_sae_acts_pre", lambda z, hook: z * 0 + 3.0)
    with torch.no_grad():
        torch.testing.assert_close(fast.encode(x), sae.encode(x))
        assert set(fast.encode(x).unique().tolist()) == {0.0, 3.0}


def test_gradients_of_its_parameters_are_saelenss():
    sae, x = gated(), tokens()
    fast = gsf.accelerate(sae)
    with pytest.warns(UserWarning, match="gradients of a gated SAE's parameters"):
        fast(x).square().sum().backward()
    sae(x).square().sum().backward()
    for (name, one), (_, other) in zip(fast.named_parameters(), sae.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_gradients_of_its_input():
    sae, x = gated().requires_grad_(False), tokens()
    grads = []
    for each in (sae, gsf.accelerate(sae)):
        at = x.clone().requires_grad_()
        each(at).square().sum().backward()
        grads.append(at.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_edits_are_seen():
    sae, x = gated().requires_grad_(False), tokens()
    fast = gsf.accelerate(sae, inplace=True)
    before = fast.encode(x)
    with torch.no_grad():
        fast.b_gate.add_(0.5)
    now = fast.encode(x)
    assert not torch.equal(now, before)
    torch.testing.assert_close(now, GatedSAE.encode(fast, x))
    fast.fold_W_dec_norm()
    torch.testing.assert_close(fast.encode(x), GatedSAE.encode(fast, x))


@pytest.mark.parametrize("centred", [False, True])
def test_loaded_from_saelenss_own_file(tmp_path, centred):
    sae, x = gated(apply_b_dec_to_input=centred), tokens()
    sae.save_model(tmp_path)
    made, exact = from_pretrained(tmp_path), in_double(sae)
    with torch.no_grad():
        assert torch.equal(made.encode(x) != 0, sae.encode(x) != 0)
        assert_as_exact(made.encode(x), sae.encode(x), exact.encode(x.double()))
        assert_as_exact(made(x), sae(x), exact(x.double()))


def test_dictionary_learnings():
    sae, x = fill(GatedAutoEncoder(D_IN, D_SAE)), tokens()
    made, exact = gsf.accelerate(sae), copy.deepcopy(sae).double()
    assert type(made) is gsf.JumpReLUSAE
    with torch.no_grad():
        assert torch.equal(made.encode(x) != 0, sae.encode(x) != 0)
        assert_as_exact(made.encode(x), sae.encode(x), exact.encode(x.double()))
        assert_as_exact(made(x), sae(x), exact(x.double()))
