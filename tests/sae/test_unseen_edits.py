"""Edits of weights that change no version counter, weights of another shape, forks: what an SAE detects."""

import subprocess
import sys

import pytest
import torch

from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.training.trainer import Scaling, TrainConfig, Trainer

X = make_activations(2, 64, 64)


def by_data(p):
    p.data.mul_(1.5)


def by_numpy(p):
    p.detach().numpy()[:] *= 1.5


def in_a_part(p):
    p.data[:40] += 1e4


def by_fused(optimizer, **options):
    def edit(p):
        p.grad = torch.ones_like(p)
        optimizer([p], lr=0.5, fused=True, **options).step()

    return edit


EDITS = {
    "data": by_data,
    "numpy": by_numpy,
    "a part": in_a_part,
    "fused Adam": by_fused(torch.optim.Adam),
    "fused AdamW": by_fused(torch.optim.AdamW, weight_decay=0.0),
    "fused SGD": by_fused(torch.optim.SGD),
    "fused Adagrad": by_fused(torch.optim.Adagrad),
}


@pytest.mark.parametrize("name", ["threshold", "b_enc"])
@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("screen", [None, True])
def test_edits_of_the_vectors_are_seen(name, how, screen):
    sae = make_sae(1, 64, 256, 9)
    sae.prepare()
    with torch.no_grad():
        before = sae.encode_sparse(X, screen=screen)
    version = getattr(sae, name)._version
    EDITS[how](getattr(sae, name))
    with torch.no_grad():
        after = sae.encode_sparse(X, screen=screen)
        assert after == sae.encode_sparse(X, screen=False)
    assert after != before
    assert getattr(sae, name)._version == version, "another mechanism saw it"


def test_a_threshold_that_becomes_infinite_is_an_error():
    sae = make_sae(1, 64, 256, 9).requires_grad_(False).prepare()
    sae.threshold.data[3] = float("inf")
    with pytest.raises(ValueError, match="threshold: expected finite values"):
        sae.encode_sparse(X, screen=True)


def test_weights_of_another_shape_or_layout_are_seen():
    sae = make_sae(1, 64, 256, 9).requires_grad_(False).prepare()
    want = sae.encode_sparse(X)
    sae.W_enc.data = sae.W_enc.data.clone(memory_format=torch.contiguous_format)  # Gemma Scope's own layout
    assert sae.encode_sparse(X) == want
    sae.W_enc.data = sae.W_enc.data[..., :255]
    with pytest.raises(ValueError, match=r"W_enc: expected \[64, 256\]"):
        sae.encode_sparse(X)


def test_an_sae_of_a_trainer_is_its_own():
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) * 3 + 5
    config = TrainConfig(d_sae=64, l0=8.0, steps=30, batch=64, lr=2e-3, bandwidth=0.03, threshold=0.03)
    scaling = Scaling.of([x])
    trainer = Trainer(config, scaling)
    trainer.step(scaling.apply(x[:64]))
    sae = trainer.to_sae()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    for _ in range(3):
        trainer.step(scaling.apply(x[:64]))
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


FORK = """
import os, sys, threading, torch
from gemmascope_fast.dev.testing import make_activations, make_sae
torch.set_num_threads(1)
sae, x = make_sae(3, 64, 256, 9).requires_grad_(False).prepare(), make_activations(2, 5, 64)
ready, done = threading.Event(), threading.Event()
def hold():
    with sae.screen_cache._lock:
        ready.set()
        done.wait(60)
thread = threading.Thread(target=hold, daemon=True)
thread.start()
ready.wait()
child = os.fork()
if child == 0:
    sae.W_enc.mul_(1.0)
    sae.encode_sparse(x, screen=True)
    os._exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
sys.exit(code)
"""


def test_a_fork_while_a_screen_is_built_does_not_hang():
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False)
    assert done.returncode == 7
