"""Converts gated SAEs (Rajamanoharan et al., arXiv 2404.16014) to the equivalent JumpReLU SAEs.

A gated SAE computes a = x @ W_enc, fires if a + b_gate > 0, and gives relu(exp(r_mag) · a + b_mag).  With
z = exp(r_mag) · a + b_mag the gate is z > b_mag - exp(r_mag) · b_gate, so it is a JumpReLU SAE with encoder
W_enc · exp(r_mag), bias b_mag and that threshold.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import shown

VECTORS = ("b_gate", "b_mag", "r_mag")


def jumprelu_of(b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, threshold), fp64 [d_sae]: the encoder is W_enc · scale, its bias b_mag.

    A threshold below 0 means that the gate is open wherever relu gives a positive value, as with threshold 0.
    """
    scale = r_mag.double().exp()
    return scale, b_mag.double() - scale * b_gate.double()


def ungated(path: Path, arrays: dict[str, Entry]) -> dict[str, Entry]:
    """The arrays of the JumpReLU SAE as entries, from those of a gated one: nothing large is read here."""
    missing = [name for name in (*VECTORS, "W_enc") if name not in arrays]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]}: missing from a gated SAE, which has {shown(sorted(arrays))}")
    if len({arrays[name].shape for name in VECTORS}) != 1 or len(arrays["b_mag"].shape) != 1:
        shapes = [arrays[name].shape for name in VECTORS]
        raise CheckpointError(f"{path}: {', '.join(VECTORS)}: expected three vectors of one length, got {shapes}")
    if len(arrays["W_enc"].shape) != 2 or arrays["W_enc"].shape[1:] != arrays["b_mag"].shape:
        raise CheckpointError(
            f"{path}: W_enc: expected [d_in, {arrays['b_mag'].shape[0]}] with b_mag, got {arrays['W_enc'].shape}"
        )
    held = [arrays[name].read(torch.device("cpu"), torch.float64) for name in VECTORS]
    scale, threshold = jumprelu_of(*held)
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{path}: r_mag: expected values whose exp is finite")
    made = {name: entry for name, entry in arrays.items() if name not in VECTORS}
    made["W_enc"] = scaled_columns(arrays["W_enc"], scale)
    made["b_enc"] = arrays["b_mag"]
    threshold = threshold.clamp(min=0)
    made["threshold"] = arrays["b_mag"].mapped(lambda block, start: threshold[start : start + block.shape[0]])
    return made


def scaled_columns(entry: Entry, scale: Tensor) -> Entry:
    """A matrix [m, n], stored as it is or transposed, with column j multiplied by scale[j]."""
    if entry.flip:
        back = entry.transposed()
        return back.mapped(
            lambda block, start: block.double() * scale[start : start + block.shape[0], None]
        ).transposed()
    return entry.mapped(lambda block, start: block.double() * scale)
