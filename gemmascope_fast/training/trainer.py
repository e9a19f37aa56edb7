"""The trainer of SAEs: loss, optimiser, L0 control, revival of dead features, and folding into an SAE.

Three activations: JumpReLU with trained thresholds (Rajamanoharan et al., arXiv 2407.14435), top-k (Gao et al., arXiv
2406.04093) and BatchTopK (Bussmann et al., arXiv 2412.06410).

It trains on centred activations scaled to mean square norm 1; `to_sae` folds both into the weights, so the trained
SAE takes raw activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.sae.config import SAEConfig
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.straight_through import JumpReLU, L0Step
from gemmascope_fast.sae.topk import TopKSAE

PARAMETERS = ("W_enc_rows", "W_dec", "b_enc", "b_dec", "threshold")
ACTIVATIONS = ("jumprelu", "topk", "batchtopk")
SLOW = 0.99  # a batch's least value counts for a hundredth in BatchTopK's threshold: the last few hundred batches


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; together with the activations they determine the result."""

    d_sae: int = 4096
    activation: str = "jumprelu"
    l0: float = 60.0  # target: mean number of features that fire per token; k of the other activations
    steps: int = 3000
    batch: int = 1024  # tokens
    lr: float = 2e-3
    lr_warmup: int = 100  # steps
    lr_decay: float = 1 / 3  # share of the steps at the end over which lr falls to zero, linearly
    bandwidth: float = 0.03  # ε, in units of the scaled activations, like the threshold
    threshold: float = 0.03  # initial θ
    sparsity: float = 1.2e-3  # initial λ, which the control then changes
    sparsity_warmup: int = 100  # steps
    control: float = 0.01  # change of log λ per step and per unit of L0 / target - 1
    betas: tuple[float, float] = (0.9, 0.999)
    theta_to_input: bool = False  # add the negative θ-term to the pre-activation's gradient (Anthropic's option)
    rare_after: int = 12_000  # raise a feature's bias, step by step, after this many tokens without firing
    nudge: float = 0.1  # how much to raise it per step, in learning rates
    dead_after: int = 100_000  # a feature is dead after this many tokens without firing
    revive_every: int = 250  # steps
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "d_sae",
            "l0",
            "steps",
            "batch",
            "lr",
            "bandwidth",
            "threshold",
            "sparsity",
            "rare_after",
            "dead_after",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.activation != "jumprelu" and self.l0 != int(self.l0):
            raise ValueError(f"l0: expected a whole number of features, the k of {self.activation}, got {self.l0}")
        if self.l0 >= self.d_sae:
            raise ValueError(f"l0: expected a target below d_sae = {self.d_sae}, got {self.l0}")
        if not 0 <= self.lr_decay <= 1:
            raise ValueError(f"lr_decay: expected a share of the steps in [0, 1], got {self.lr_decay}")
        if not self.nudge >= 0:
            raise ValueError(f"nudge: expected a number of learning rates, got {self.nudge}")
        if self.revive_every < 1:
            raise ValueError(f"revive_every: expected a number of steps, got {self.revive_every}")


@dataclass(frozen=True)
class Scaling:
    """The affine map x → (x - mean) / scale that makes the mean square norm 1.  mean fp32 [d_in]."""

    mean: Tensor
    scale: float

    @classmethod
    def of(cls, activations: Sequence[Tensor]) -> Scaling:
        """Compute from activations [N_i, d_in], in fp64 and in blocks.  ValueError if constant or not finite."""
        blocks = [part for x in activations for part in x.split(8192)]
        rows = sum(part.shape[0] for part in blocks)
        mean = torch.stack([part.double().sum(0) for part in blocks]).sum(0) / rows
        square = sum(float((part.double() - mean).square().sum()) for part in blocks) / rows
        if not (math.isfinite(square) and square > 0):
            raise ValueError(f"activations: expected finite values that vary, got a centred mean square of {square}")
        return cls(mean.float(), math.sqrt(square))

    def apply(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.scale


@dataclass(frozen=True)
class Step:
    """Results of one step: mean square error per token (its FVU, as the scaled variance is 1), L0, λ, dead features."""

    fvu: float
    l0: float
    sparsity: float
    dead: int


def loss_terms(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, W_dec: Tensor, b_dec: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(mean square error, L0, x̂ [N, d], col of the pairs kept, their size: more than 0 for those that fired).

    x [N, d_in] scaled.  With JumpReLU the pairs are those that fired or lie within the bandwidth: nowhere else is a
    gradient, and both terms have straight-through ones.  With the other activations the pairs are the chosen ones.
    """
    if config.activation != "jumprelu":
        crow, col, values = ops.encode_topk(x, W_enc, b_enc, int(config.l0), config.activation == "batchtopk")
        x_hat = ops.decode(crow, col, values, W_dec, b_dec, None)
        fired = torch.ones_like(values.detach())
        return (x - x_hat).square().sum() / x.shape[0], fired.sum() / x.shape[0], x_hat, col, values.detach()
    crow, col, z = ops.encode(x, W_enc, b_enc, threshold, config.bandwidth)
    theta = threshold[col.long()]
    values = JumpReLU.apply(z, theta, config.bandwidth, config.theta_to_input)
    fired = L0Step.apply(z, theta, config.bandwidth, config.theta_to_input)
    x_hat = ops.decode(crow, col, values, W_dec, b_dec, None)
    mse = (x - x_hat).square().sum() / x.shape[0]
    return mse, fired.sum() / x.shape[0], x_hat, col, fired.detach()


class Trainer:
    """Parameters, Adam and L0 control of one run.  `step(x)` takes a scaled batch; everything is fp32.

    W_enc_rows and W_dec [d_sae, d_in]; decoder rows have unit norm; W_enc starts as W_decᵀ.
    """

    def __init__(self, config: TrainConfig, scaling: Scaling) -> None:
        self.config, self.scaling = config, scaling
        d_in = scaling.mean.numel()
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(config.d_sae, d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.params = {
            "W_enc_rows": rows.clone(),
            "W_dec": rows,
            "b_enc": torch.zeros(config.d_sae),
            "b_dec": torch.zeros(d_in),
            "threshold": torch.full((config.d_sae,), config.threshold),
        }
        for p in self.params.values():
            p.requires_grad_()
        self.adam = torch.optim.Adam(self.params.values(), lr=config.lr, betas=config.betas, fused=True)
        for p in self.params.values():  # created now, so that checkpoints of all steps have the same tensors
            self.adam.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64)  # tokens since a feature last fired
        self.log_sparsity = math.log(config.sparsity)
        self.steps_done = 0
        self.revived = 0
        self.least = 0.0  # BatchTopK: running mean of the least value that was kept, the threshold at inference

    def step(self, x: Tensor) -> Step:
        """One step on a scaled batch x [batch, d_in]."""
        p, config = self.params, self.config
        sparsity = math.exp(self.log_sparsity) * min(1.0, (self.steps_done + 1) / max(1, config.sparsity_warmup))
        mse, l0, x_hat, col, fired = loss_terms(
            x, p["W_enc_rows"].t(), p["b_enc"], p["threshold"], p["W_dec"], p["b_dec"], config
        )
        self.adam.zero_grad(set_to_none=True)
        (mse + sparsity * l0).backward()
        with torch.no_grad():
            self._project_decoder_gradient()
            self.adam.param_groups[0]["lr"] = self._lr()
            self.adam.step()
            p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
            # At θ = 0 a JumpReLU is a ReLU, and θ would never get a gradient again.
            p["threshold"].clamp_(min=config.threshold * 1e-3)
            self._count_silent(x.shape[0], col, fired)
            self._nudge()
            if config.activation == "jumprelu":
                self._steer(float(l0.detach()))
            elif fired.numel():
                least = float(fired.min())
                self.least = least if not self.steps_done else SLOW * self.least + (1 - SLOW) * least
            self.steps_done += 1
            # No revival after the learning rate began to fall, because those features would not be trained.
            if self.steps_done % config.revive_every == 0 and self.steps_done < config.steps * (1 - config.lr_decay):
                self._revive(x, x - x_hat)
        dead = int((self.silent > config.dead_after).sum())
        return Step(float(mse.detach()), float(l0.detach()), sparsity, dead)

    def _lr(self) -> float:
        config, done = self.config, self.steps_done + 1
        rise = min(1.0, done / max(1, config.lr_warmup))
        fall = (config.steps - self.steps_done) / max(1.0, config.lr_decay * config.steps)
        return config.lr * min(rise, max(0.0, fall), 1.0)

    def _project_decoder_gradient(self) -> None:
        """Remove from dW_dec the part parallel to each (unit) row, so that Adam does not train the norm."""
        W, grad = self.params["W_dec"], self.params["W_dec"].grad
        assert grad is not None
        grad -= (grad * W).sum(1, keepdim=True) * W

    def _steer(self, l0: float) -> None:
        """λ rises while L0 is above its target and falls while below: integral control of log λ."""
        if self.steps_done >= self.config.sparsity_warmup:
            error = max(-1.0, min(1.0, l0 / self.config.l0 - 1.0))
            self.log_sparsity += self.config.control * error

    def _count_silent(self, tokens: int, col: Tensor, fired: Tensor) -> None:
        self.silent += tokens
        self.silent[col[fired > 0].long()] = 0

    def _nudge(self) -> None:
        """Raise the bias of each feature that has not fired for a while, until it fires.

        A feature that never fires gets no gradient, and one that fires on only a few training tokens does not fire on
        most other texts.  If all features fire once in `rare_after` tokens, they add d_sae / rare_after to L0, which
        is little.  The step shrinks with the learning rate.
        """
        rare = (self.silent > self.config.rare_after).nonzero()[:, 0]
        self.params["b_enc"][rare] += self.config.nudge * self._lr()

    def _revive(self, x: Tensor, error: Tensor) -> None:
        """Point each dead feature at the reconstruction error of a token, sampled by its squared norm.

        The new feature reads and writes along the error's direction u. Its bias makes its value on that token the
        length of the error: z = u·x + b = ‖error‖.
        """
        dead = (self.silent > self.config.dead_after).nonzero()[:, 0]
        if not dead.numel():
            return
        p = self.params
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        square = error.square().sum(1).double()
        chosen = torch.multinomial(square, dead.numel(), replacement=dead.numel() > x.shape[0], generator=generator)
        length = error[chosen].norm(dim=1, keepdim=True).clamp(min=1e-12)
        u = error[chosen] / length
        p["W_dec"][dead] = u
        p["W_enc_rows"][dead] = u
        p["b_enc"][dead] = length[:, 0] - (u * x[chosen]).sum(1)
        p["threshold"][dead] = self.config.threshold
        for name in ("W_dec", "W_enc_rows", "b_enc", "threshold"):
            state = self.adam.state[p[name]]
            state["exp_avg"][dead] = 0
            state["exp_avg_sq"][dead] = 0
        self.silent[dead] = 0
        self.revived += dead.numel()

    def to_sae(self, cfg: SAEConfig | None = None, dtype: torch.dtype = torch.float32) -> JumpReLUSAE:
        """The SAE for raw activations: latents in units of the activations, decoder rows with unit norm.

        With z = scale · (W_encᵀ (x - mean) / scale + b): W_enc stays, b_enc' = scale·b - mean @ W_enc,
        θ' = scale·θ, b_dec' = scale·b_dec + mean.  b_enc' is computed in fp64 from W_enc rounded to `dtype`, so that
        rounding the weights does not change the mean's contribution.
        """
        p, scale = {name: value.detach() for name, value in self.params.items()}, self.scaling.scale
        # copies, because the trainer continues to change its parameters
        W_enc = p["W_enc_rows"].to(dtype, copy=True).t()
        mean = self.scaling.mean.double()
        b_enc = scale * p["b_enc"].double() - mean @ W_enc.double()
        threshold = p["threshold"]
        if self.config.activation != "jumprelu":
            threshold = torch.full_like(threshold, self.least if self.config.activation == "batchtopk" else 0.0)
        top = {"k": int(self.config.l0)} if self.config.activation == "topk" else {}
        return (TopKSAE if top else JumpReLUSAE).from_weights(
            W_enc=W_enc.float(),
            W_dec=p["W_dec"].to(dtype, copy=True).float(),
            b_enc=b_enc.float(),
            b_dec=(scale * p["b_dec"].double() + mean).float(),
            threshold=scale * threshold,
            cfg=cfg,
            **top,
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) with which `restore` continues bit for bit."""
        tensors = {"mean": self.scaling.mean, "silent": self.silent}
        for name, p in self.params.items():
            tensors[name] = p.detach()
            state = self.adam.state[p]
            tensors |= {f"{name}.exp_avg": state["exp_avg"], f"{name}.exp_avg_sq": state["exp_avg_sq"]}
        numbers = {
            "config": asdict(self.config),
            "scale": self.scaling.scale,
            "log_sparsity": self.log_sparsity,
            "steps_done": self.steps_done,
            "revived": self.revived,
            "least": self.least,
        }
        return tensors, numbers

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Trainer:
        """The inverse of `state`."""
        settings = dict(numbers["config"])
        settings["betas"] = tuple(settings["betas"])
        trainer = cls(TrainConfig(**settings), Scaling(tensors["mean"], numbers["scale"]))
        trainer.silent = tensors["silent"].clone()
        trainer.log_sparsity = numbers["log_sparsity"]
        trainer.steps_done, trainer.revived = numbers["steps_done"], numbers["revived"]
        trainer.least = numbers.get("least", 0.0)
        for name, p in trainer.params.items():
            p.data.copy_(tensors[name])
            state = trainer.adam.state[p]
            state["step"].fill_(trainer.steps_done)
            state["exp_avg"].copy_(tensors[f"{name}.exp_avg"])
            state["exp_avg_sq"].copy_(tensors[f"{name}.exp_avg_sq"])
        return trainer
