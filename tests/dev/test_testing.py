"""The synthetic SAEs and activations are what they say, and the same each time."""

import pytest
import torch

from gemmascope_fast.dev.testing import CENTRED_NORM, MASSIVE_DIMENSION, make_activations, make_sae, same_bytes


@pytest.mark.parametrize(("d", "F", "l0"), [(640, 1024, 18), (64, 300, 5), (300, 2000, 60)])
def test_l0_is_about_what_was_asked_on_other_tokens(d, F, l0):
    sae = make_sae(1, d, F, l0)
    measured = float(sae.encode_sparse(make_activations(99, 300, d)).l0().double().mean())
    assert 0.6 * l0 < measured < 1.6 * l0
    assert (sae.threshold > 0).float().mean() > 0.99


def test_activations_look_like_gemmas():
    x = make_activations(5, 2000, 640).double()
    mean = x.mean(0)
    assert mean.abs().argmax() == MASSIVE_DIMENSION
    centred = x - mean
    assert centred.norm(dim=1).mean() == pytest.approx(CENTRED_NORM, rel=0.1)
    energy = torch.linalg.svdvals(centred).square()
    share = energy.cumsum(0) / energy.sum()
    # directions are random, not orthogonal: the shares are about those of facts, not equal to them
    for count, held in ((16, 0.47), (64, 0.78), (128, 0.92), (256, 0.98)):
        assert float(share[count - 1]) == pytest.approx(held, abs=0.08)


def test_everything_is_seeded():
    torch.manual_seed(0)
    first = make_sae(3, 40, 90, 8), make_activations(3, 5, 40)
    torch.manual_seed(1)
    second = make_sae(3, 40, 90, 8), make_activations(3, 5, 40)
    assert same_bytes(list(first[0].state_dict().values()), list(second[0].state_dict().values()))
    assert same_bytes(first[1], second[1])
    assert not same_bytes(make_activations(4, 5, 40), first[1])
    # a longer text begins otherwise, but mean and directions are the world's
    assert not same_bytes(make_sae(3, 40, 90, 8, world=1).W_enc, first[0].W_enc)


def test_a_transcoder_of_another_width():
    assert make_sae(3, 40, 90, 8, d_out=24).W_dec.shape == (90, 24)
    assert make_sae(3, 40, 90, 8, torch.bfloat16).dtype == torch.bfloat16
