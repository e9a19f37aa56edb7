"""Straight-through gradients of JumpReLU and of the L0 step, computed on the stored pairs only.

`ops.encode(..., bandwidth)` gives z for every pair that fired or is within ε/2 of its threshold. For all other
pairs both pseudo-derivatives are zero, so sums over the stored pairs equal dense autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast import ops


def _save(ctx, inputs) -> None:
    z, theta, ctx.bandwidth, ctx.theta_to_input = inputs
    ctx.save_for_backward(z, theta)
    ctx.save_for_forward(z, theta)
    ctx.set_materialize_grads(False)


class JumpReLU(torch.autograd.Function):
    """value = z where z > max(θ, 0), else 0.  ∂/∂z = 1[fired]·g; ∂/∂θ = −(θ/ε)·rect((z−θ)/ε)·g.

    With `theta_to_input`, the negative of the θ-term is added to ∂/∂z (Anthropic's option).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, theta: Tensor, bandwidth: float, theta_to_input: bool) -> Tensor:
        return torch.where(z <= theta.clamp(min=0), torch.zeros_like(z), z)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        z, theta = ctx.saved_tensors
        dz = torch.where(z <= theta.clamp(min=0), torch.zeros_like(z), grad)
        near = ((z - theta).abs() < ctx.bandwidth / 2).to(grad.dtype)
        dtheta = -(theta / ctx.bandwidth) * near * grad
        if ctx.theta_to_input:
            dz = dz - dtheta
        return dz, dtheta, None, None

    @staticmethod
    def jvp(ctx, dz, dtheta, _bandwidth, _theta_to_input):
        z, theta = ctx.saved_tensors
        out = torch.zeros_like(z)
        near = ((z - theta).abs() < ctx.bandwidth / 2).to(z.dtype)
        to_theta = -(theta / ctx.bandwidth) * near
        if dz is not None:
            out = torch.where(z <= theta.clamp(min=0), out, dz)
            out = out - to_theta * dz if ctx.theta_to_input else out
        return out if dtheta is None else out + to_theta * dtheta


class L0Step(torch.autograd.Function):
    """1[z > max(θ, 0)] per pair.  ∂/∂θ = −(1/ε)·rect((z−θ)/ε)·g; ∂/∂z = 0, or −∂/∂θ with `theta_to_input`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, theta: Tensor, bandwidth: float, theta_to_input: bool) -> Tensor:
        return (~(z <= theta.clamp(min=0))).to(z.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        z, theta = ctx.saved_tensors
        near = ((z - theta).abs() < ctx.bandwidth / 2).to(grad.dtype)
        dtheta = -(1 / ctx.bandwidth) * near * grad
        return (-dtheta if ctx.theta_to_input else None), dtheta, None, None

    @staticmethod
    def jvp(ctx, dz, dtheta, _bandwidth, _theta_to_input):
        z, theta = ctx.saved_tensors
        to_theta = -(1 / ctx.bandwidth) * ((z - theta).abs() < ctx.bandwidth / 2).to(z.dtype)
        out = torch.zeros_like(z) if dtheta is None else to_theta * dtheta
        return out - to_theta * dz if dz is not None and ctx.theta_to_input else out


def encode_with_bandwidth(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    theta_to_input: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, col_indices, values) of pairs that fired (value z) or are within the bandwidth (value 0)."""
    return with_gradients(ops.encode(x, W_enc, b_enc, threshold, bandwidth), threshold, bandwidth, theta_to_input)


def with_gradients(
    pairs: tuple[Tensor, Tensor, Tensor], threshold: Tensor, bandwidth: float, theta_to_input: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply JumpReLU to the pre-activations z that `ops.encode` returned with this bandwidth."""
    crow, col, z = pairs
    theta = threshold.float()[col.long()]
    return crow, col, JumpReLU.apply(z, theta, bandwidth, theta_to_input)
