"""The trainer: gradients against dense autograd, control of L0, revival, folding, batches, resuming after a kill."""

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gemmascope_fast.cli.train import train_to_end
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.training.activations import Batches
from gemmascope_fast.training.checkpoint import load_run, save_run
from gemmascope_fast.training.trainer import PARAMETERS, Scaling, TrainConfig, Trainer, loss_terms

HERE = str(Path(__file__).parent)
D, F, N = 24, 96, 40
CONFIG = TrainConfig(
    d_sae=F,
    l0=5,
    steps=400,
    batch=64,
    lr=3e-3,
    bandwidth=0.1,
    threshold=0.1,
    sparsity=0.02,
    control=0.03,
    revive_every=50,
)


def weights(dtype):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    W_dec = torch.randn(F, D, generator=g, dtype=torch.float64) / D**0.5
    W_enc = torch.randn(F, D, generator=g, dtype=torch.float64) / D**0.5
    b_enc = torch.randn(F, generator=g, dtype=torch.float64) * 0.1
    b_dec = torch.randn(D, generator=g, dtype=torch.float64) * 0.1
    theta = torch.rand(F, generator=g, dtype=torch.float64) + 0.3
    # float32 first: all three evaluations see the same numbers
    return [t.float().to(dtype).requires_grad_() for t in (x, W_enc, b_enc, theta, W_dec, b_dec)]


def dense_loss(x, W_enc, b_enc, theta, W_dec, b_dec, config):
    """The same loss over every (token, feature) pair; a term of value zero carries each pseudo-derivative."""
    eps = config.bandwidth
    z = x @ W_enc.t() + b_enc
    step = (z > theta).to(z.dtype).detach()
    rect = ((z - theta).abs() < eps / 2).to(z.dtype).detach()
    by_theta = -rect / eps * (theta - theta.detach())
    if config.theta_to_input:
        by_theta = by_theta + rect / eps * (z - z.detach())
    f = z * step + theta.detach() * by_theta
    x_hat = f @ W_dec + b_dec
    return (x - x_hat).pow(2).sum() / N, (step + by_theta).sum() / N


@pytest.mark.parametrize("theta_to_input", [False, True])
def test_gradients_equal_dense_autograd(theta_to_input):
    config = dataclasses.replace(CONFIG, theta_to_input=theta_to_input)

    def gradients(loss, dtype):
        leaves = weights(dtype)
        mse, l0 = loss(*leaves)
        (mse + 0.37 * l0).backward()
        return mse, l0, [leaf.grad.double() for leaf in leaves]

    def ours(x, W_enc, b_enc, theta, W_dec, b_dec):
        return loss_terms(x, W_enc.t(), b_enc, theta, W_dec, b_dec, config)[:2]

    def dense(*leaves):
        return dense_loss(*leaves, config)

    mse, l0, got = gradients(ours, torch.float32)
    want_mse, want_l0, want = gradients(dense, torch.float64)
    _, _, eager = gradients(dense, torch.float32)
    assert l0.item() == pytest.approx(want_l0.item())
    assert mse.item() == pytest.approx(want_mse.item(), rel=1e-5)
    for name, a, b, e in zip(("x", "W_enc", "b_enc", "theta", "W_dec", "b_dec"), got, want, eager, strict=True):
        assert b.abs().max() > 0, name
        # twice the error of the dense form in fp32, which sums in another order, plus one rounding of the largest
        limit = 2 * (e - b).abs().max() + 2.0**-23 * b.abs().max()
        assert (a - b).abs().max() <= limit, name


def data(rows=4096, seed=0):
    """Sparse sums of 40 directions, off centre and with one dimension that towers over the rest, as in Gemma."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(9))
    directions /= directions.norm(dim=1, keepdim=True)
    on = torch.rand(rows, 40, generator=g) < 0.08
    x = (on * (1 + torch.rand(rows, 40, generator=g))) @ directions * 7 + 3
    x[:, 5] += 900
    return x


def run(config, steps=None, x=None):
    x = data() if x is None else x
    trainer = Trainer(config, Scaling.of([x]))
    batches = Batches([x], config.batch, config.seed)
    seen = [trainer.step(trainer.scaling.apply(batches[i])) for i in range(steps or config.steps)]
    return trainer, seen


@pytest.fixture(scope="module")
def trained():
    return run(CONFIG)


def test_l0_comes_to_its_target_and_the_error_falls(trained):
    trainer, seen = trained
    last = seen[-50:]
    assert sum(s.l0 for s in last) / 50 == pytest.approx(CONFIG.l0, rel=0.15)
    # the mean alone leaves 1
    assert sum(s.fvu for s in last) / 50 < 0.4
    assert float(trainer.params["threshold"].detach().min()) > 0


def test_decoder_rows_keep_unit_norm_and_adam_sees_no_parallel_gradient():
    trainer, _ = run(CONFIG, steps=1)
    W = Trainer(CONFIG, Scaling.of([data()])).params["W_dec"].detach()
    moment = trainer.adam.state[trainer.params["W_dec"]]["exp_avg"]
    scale = moment.norm(dim=1) + 1e-30
    assert moment.abs().max() > 0
    assert ((moment * W).sum(1).abs() / scale).max() < D * 2.0**-23
    norms = trainer.params["W_dec"].detach().norm(dim=1)
    assert (norms - 1).abs().max() < D * 2.0**-23


def test_the_folded_sae_reads_raw_activations(trained):
    trainer, _ = trained
    sae, x = trainer.to_sae(), data(500, seed=4)
    small = trainer.scaling.apply(x)
    p = {k: v.detach().double() for k, v in trainer.params.items()}
    z = small.double() @ p["W_enc_rows"].t() + p["b_enc"]
    f = z * (z > p["threshold"])
    x_hat = (f @ p["W_dec"] + p["b_dec"]) * trainer.scaling.scale + trainer.scaling.mean.double()
    ours = sae.encode_sparse(x).detach()
    # the raw pre-activation is a sum of terms up to ‖x‖: that many roundings of fp32, in units of z
    slack = D * 2.0**-22 * float(x.norm(dim=1).max()) / trainer.scaling.scale
    sure = (z - p["threshold"]).abs() > slack
    assert sure.double().mean() > 0.99
    assert ((ours.to_dense() > 0) == (f > 0))[sure].all()
    rows = sure.all(1)
    assert rows.sum() > 100
    error = (sae(x).detach().double() - x_hat)[rows].abs().max()
    assert error < 10 * slack * trainer.scaling.scale


def test_half_precision_weights_do_not_shift_the_mean(trained):
    trainer, _ = trained
    x = data(500, seed=4)
    full, half = trainer.to_sae(), trainer.to_sae(dtype=torch.float16)
    assert torch.equal(half.W_enc, half.W_enc.half().float())
    z_full = x.double() @ full.W_enc.double() + full.b_enc.double()
    z_half = x.double() @ half.W_enc.double() + half.b_enc.double()
    # rounding W_enc moves z by at most half a unit of ‖w∘(x - mean)‖₁; uncorrected, the mean of 900 would move it
    off = (x - trainer.scaling.mean).double().abs() @ full.W_enc.double().abs() * 2.0**-11
    assert ((z_full - z_half).abs() <= off + 1e-3).all()


def test_a_dead_feature_comes_back_where_the_error_is(trained):
    trainer, _ = trained
    trainer = Trainer.restore(*trainer.state())
    x = trainer.scaling.apply(data(64, seed=5))
    dead = torch.tensor([3, 50])
    with torch.no_grad():
        trainer.silent[dead] = CONFIG.dead_after + 1
        error = torch.randn(64, D, generator=torch.Generator().manual_seed(6)) * 0.5
        before = trainer.params["W_dec"].clone()
        trainer._revive(x, error)
    p = {k: v.detach() for k, v in trainer.params.items()}
    z = x @ p["W_enc_rows"].t() + p["b_enc"]
    for f in dead.tolist():
        along = torch.nn.functional.cosine_similarity(error, p["W_dec"][f], dim=1)
        token = int(along.argmax())
        assert along[token] == pytest.approx(1, abs=1e-5)
        assert float(z[token, f]) == pytest.approx(float(error[token].norm()), rel=1e-4)
        assert not trainer.adam.state[trainer.params["W_dec"]]["exp_avg"][f].any()
    alive = torch.ones(F, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(p["W_dec"][alive], before[alive])
    assert trainer.silent[dead].eq(0).all()


def test_silence_is_counted_in_tokens():
    x = data(256)
    trainer = Trainer(CONFIG, Scaling.of([x]))
    with torch.no_grad():
        trainer.params["b_enc"][7] = -100.0
    for _ in range(3):
        trainer.step(trainer.scaling.apply(x[:64]))
    assert trainer.silent[7] == 3 * 64
    assert (trainer.silent == 0).sum() > F // 2


def test_every_epoch_is_a_permutation_over_all_parts():
    parts = [torch.arange(10.0)[:, None], torch.arange(10.0, 37.0)[:, None]]
    batches = Batches(parts, 12, seed=1)
    assert batches.per_epoch == 3
    first = torch.cat([batches[i] for i in range(3)])[:, 0]
    second = torch.cat([batches[i] for i in range(3, 6)])[:, 0]
    assert first.unique().numel() == second.unique().numel() == 36
    assert not torch.equal(first, second)
    assert torch.equal(Batches(parts, 12, seed=1)[4], batches[4])
    with pytest.raises(ValueError, match="at least 38 tokens"):
        Batches(parts, 38, seed=1)


def test_the_nudge_moves_rare_features_alone():
    trainer = Trainer(dataclasses.replace(CONFIG, nudge=0.25, rare_after=128), Scaling.of([data()]))
    trainer.silent[:3] = torch.tensor([128, 129, 10_000])
    with torch.no_grad():
        trainer._nudge()
    want = torch.zeros(F)
    want[1:3] = 0.25 * CONFIG.lr / CONFIG.lr_warmup  # the learning rate of the first step
    assert torch.allclose(trainer.params["b_enc"], want, rtol=2.0**-22, atol=0)


def test_a_silent_feature_is_raised_until_it_fires():
    """Biased below every token it would stay silent for good: no gradient reaches it."""
    x = data()

    def silent_at_the_end(nudge):
        config = dataclasses.replace(CONFIG, nudge=nudge, rare_after=128, dead_after=10**9, lr_decay=0.0)
        trainer, batches = Trainer(config, Scaling.of([x])), Batches([x], config.batch, 0)
        trainer.params["b_enc"].detach()[:8] -= 1.0
        for i in range(300):
            trainer.step(trainer.scaling.apply(batches[i]))
        return int((trainer.silent[:8] >= 300 * config.batch).sum())

    assert silent_at_the_end(0.0) == 8
    assert silent_at_the_end(2.0) == 0


SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from test_training import CONFIG, data, dataclasses, Batches, Scaling, Trainer, train_to_end
config = dataclasses.replace(CONFIG, steps=2000)
x = data()
train_to_end(Trainer(config, Scaling.of([x])), Batches([x], config.batch, config.seed), Path(sys.argv[1]), {}, 40)
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    state = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(state), HERE])
    try:
        deadline = time.monotonic() + 300
        while not state.exists():
            assert process.poll() is None, "the run ended before its first save"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    trainer, about = load_run(state)
    assert about == {}
    assert 0 < trainer.steps_done < 2000
    assert trainer.steps_done % 40 == 0
    # two hundred steps on from there, against the same run never interrupted
    end = trainer.steps_done + 200
    config, x = trainer.config, data()
    batches = Batches([x], config.batch, config.seed)
    whole = Trainer(config, Scaling.of([x]))
    for one in (trainer, whole):
        for step in range(one.steps_done, end):
            one.step(one.scaling.apply(batches[step]))
    assert trainer.log_sparsity == whole.log_sparsity
    for name in PARAMETERS:
        assert torch.equal(trainer.params[name], whole.params[name]), name


def test_a_save_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    trainer, _ = run(CONFIG, steps=2)
    path = tmp_path / "run"
    save_run(trainer, path, {"a": 1})
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("gemmascope_fast.files.atomic.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_run(trainer, path, {"a": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("size", [0, 7, 100, -10])
def test_a_damaged_run_is_refused(tmp_path, size):
    trainer, _ = run(CONFIG, steps=1)
    path = tmp_path / "run"
    save_run(trainer, path, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="run"):
        load_run(path)


def test_settings_that_mean_nothing_are_refused():
    for name, value in (("l0", F), ("steps", 0), ("lr", -1.0), ("bandwidth", 0.0), ("lr_decay", 1.5)):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(CONFIG, **{name: value})
    with pytest.raises(ValueError, match=r"activation: expected one of jumprelu, topk, batchtopk, got 'tanh'"):
        dataclasses.replace(CONFIG, activation="tanh")
    with pytest.raises(ValueError, match="l0: expected a whole number"):
        dataclasses.replace(CONFIG, activation="topk", l0=4.5)
    with pytest.raises(ValueError, match="activations"):
        Scaling.of([torch.ones(5, 3)])
    with pytest.raises(ValueError, match="activations"):
        Scaling.of([torch.tensor([[1.0, float("nan")], [0.0, 1.0]])])


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_the_other_activations(activation, tmp_path):
    config = dataclasses.replace(CONFIG, activation=activation)
    trainer, seen = run(config)
    assert all(s.l0 <= CONFIG.l0 for s in seen)
    assert sum(s.fvu for s in seen[-50:]) / 50 < 0.4
    sae, x = trainer.to_sae(), data(2000, seed=4)
    l0 = sae.encode_sparse(x).detach().l0().float()
    if activation == "topk":
        assert (sae.kind, sae.k, int(l0.max())) == ("topk_sae", CONFIG.l0, CONFIG.l0)
    else:
        # one threshold that keeps k a token on average, more where there is more
        assert sae.kind == "sae"
        assert len(set(sae.threshold.tolist())) == 1
        assert float(l0.mean()) == pytest.approx(CONFIG.l0, rel=0.2)
        assert float(l0.std()) > 0.5
    fvu = (sae(x).detach() - x).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.4
    # a run that goes on from a file ends where it would have ended
    save_run(run(dataclasses.replace(config, steps=30), steps=15)[0], tmp_path / "run", {})
    again, _ = load_run(tmp_path / "run")
    batches = Batches([data()], config.batch, config.seed)
    for step in range(15, 30):
        again.step(again.scaling.apply(batches[step]))
    whole, _ = run(dataclasses.replace(config, steps=30))
    for name, value in whole.state()[0].items():
        assert torch.equal(value, again.state()[0][name]), name
    assert whole.state()[1] == again.state()[1]


def test_saving_in_the_middle_does_not_change_the_run(tmp_path):
    config = dataclasses.replace(CONFIG, steps=20)
    x = data(512)
    saved, plain = (Trainer(config, Scaling.of([x])) for _ in range(2))
    train_to_end(saved, Batches([x], config.batch, 0), tmp_path / "run", {}, 3)
    train_to_end(plain, Batches([x], config.batch, 0), tmp_path / "other", {}, 100)
    assert torch.equal(saved.params["W_enc_rows"], plain.params["W_enc_rows"])
    assert load_run(tmp_path / "run")[0].steps_done == 20
