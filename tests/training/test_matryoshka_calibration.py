"""Text written by a model: whole windows, the same for the same seed, from the model's own distribution."""

import pytest
import torch
from tiny_model import two_blocks

from gemmascope_fast.training.nested import calibration

pytest.importorskip("transformers")


def test_windows_are_whole_and_repeat(monkeypatch):
    monkeypatch.setattr(calibration, "WINDOW", 12)
    model = two_blocks()
    state = torch.random.get_rng_state()
    first, again, other = (calibration.sampled(model, 2, 5, batch=3, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (5, 12)
    assert bool((first[:, 0] == 2).all())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's draws are his own


def test_tokens_follow_the_models_distribution(monkeypatch):
    monkeypatch.setattr(calibration, "WINDOW", 2)
    model = two_blocks()
    model.generation_config.top_k = 1  # what a folder says of generation does not narrow the draw
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
        want = model(torch.tensor([[2]])).logits[0, -1].softmax(-1)
    ends = model.generation_config.eos_token_id
    want[[] if ends is None else ends] = 0  # never drawn
    want /= want.sum()
    drawn = calibration.sampled(model, 2, 4000, batch=4000)[:, 1]
    got = torch.bincount(drawn, minlength=want.numel()) / drawn.numel()
    # 4,000 draws are within 4 standard errors in every cell
    assert bool(((got - want).abs() <= 4 * (want * (1 - want) / 4000).sqrt() + 1e-3).all())
    assert want.max() < 0.9  # and a distribution, not a point
    assert (want > 0.02).sum() > 3
