"""Screens and layouts follow the weights: every edit that can be detected is detected."""

import pytest
import torch
from torch import nn

import gemmascope_fast as gsf
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes
from gemmascope_fast.sae.weights import fingerprint

D, F = 48, 200
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def pair():
    return make_sae(0, D, F, 12), make_activations(3, 40, D)


def fresh(sae):
    """The same weights in an SAE that has packed nothing yet."""
    return gsf.JumpReLUSAE(*(getattr(sae, n).detach().clone() for n in NAMES))


def new_parameter(sae):
    sae.W_enc = nn.Parameter(sae.W_enc.detach() * 1.5)


def new_data(sae):
    sae.W_enc.data = sae.W_enc.data * 1.5


def new_data_in_gemma_scopes_layout(sae):
    sae.W_enc.data = (sae.W_enc.data * 1.5).contiguous()


def assigned(sae):
    state = {n: t * 1.5 for n, t in sae.state_dict().items()}
    sae.load_state_dict(state, assign=True)


def loaded(sae):
    sae.load_state_dict({n: t * 1.5 for n, t in sae.state_dict().items()})


def in_place(sae):
    with torch.no_grad():
        sae.W_enc[:, ::3] *= 1.5


def in_place_bias(sae):
    with torch.no_grad():
        sae.b_enc += 100


def in_place_threshold(sae):
    with torch.no_grad():
        sae.threshold *= 2


def decoder(sae):
    with torch.no_grad():
        sae.W_dec *= 2
        sae.b_dec += 1


def other_dtype(sae):
    sae.to(torch.bfloat16)


EDITS = [new_parameter, new_data, new_data_in_gemma_scopes_layout, assigned, loaded, in_place, in_place_bias]
EDITS += [in_place_threshold, decoder, other_dtype]


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_seen(edit):
    sae, x = pair()
    before = sae(x)
    edit(sae)
    assert not same_bytes(sae(x), before)
    assert same_bytes(sae(x), fresh(sae)(x))
    assert sae.W_enc.t().is_contiguous()


@pytest.mark.parametrize("edit", EDITS[:8])
def test_the_fingerprint_changes(edit):
    sae, _ = pair()
    watched = lambda: fingerprint(sae.W_enc, sae.b_enc, sae.threshold)  # noqa: E731
    before = watched()
    assert watched() == before
    edit(sae)
    assert watched() != before


def test_prepare_by_hand_gives_the_same_bytes():
    sae, x = pair()
    expected = fresh(sae)(x)
    assert sae.prepare() is sae
    assert same_bytes(sae(x), expected)
    assert sae.prepare(force=True) is sae
    assert same_bytes(sae(x), expected)


def test_edits_nobody_can_see_need_force():
    sae, x = pair()
    sae(x)
    sae.b_enc.data.mul_(0.5)
    sae.W_enc.data.mul_(0.5)
    sae.prepare(force=True)
    assert same_bytes(sae(x), fresh(sae)(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_threshold_that_stops_being_finite_raises(bad):
    sae, x = pair()
    sae(x)
    with torch.no_grad():
        sae.threshold[7] = bad
    with pytest.raises(ValueError, match=r"threshold: expected finite values, got .* at feature 7"):
        sae(x)
    with torch.no_grad():
        sae.threshold[7] = 1.0
    assert same_bytes(sae(x), fresh(sae)(x))


def test_inference_tensors_have_no_version_and_still_serve():
    with torch.inference_mode():
        sae, x = pair()
        first = sae(x)
        assert same_bytes(sae(x), first)
