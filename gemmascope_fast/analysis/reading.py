"""Reads one text with an SAE: latents, and figures of quality computed directly from their formulas."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import backends
from gemmascope_fast.attach import Activations, attach
from gemmascope_fast.attach.entries import spread
from gemmascope_fast.attach.tokens import device_of
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops.encode import kappa
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

REPEATS = 5


@dataclass
class Reading:
    """One text, read: S tokens, their pieces, the content mask (bool [S]), latents [S, d_sae], the figures."""

    pieces: list[str]
    content: list[bool]
    latents: SparseLatents
    figures: dict[str, Any]
    cut: int = 0


def read_text(
    model: Any, tokenizer: Any, sae: JumpReLUSAE, layer: int, text: str, *, model_name: str, max_tokens: int = 1024
) -> Reading:
    """Run the text through the model and the SAE at the output of `layer`.

    L0, FVU, dead_fraction and support are over the content tokens (no BOS, EOS, PAD); cross-entropies are in
    nats, the mean over the content tokens that have a token before them.  Raises ValueError for a text of fewer
    than two content tokens, an unknown layer, or another kind of SAE.
    """
    if sae.kind != "sae":
        raise ValueError(f"sae: expected an SAE that reads and writes one site, got a {sae.kind}")
    if max_tokens < 3:
        raise ValueError(f"max_tokens: expected at least 3, got {max_tokens}")
    every = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = every[:, :max_tokens]
    content = ~torch.isin(ids[0], torch.tensor(sorted(tokenizer.all_special_ids)))
    ids = ids.to(device_of(model))
    if int(content.sum()) < 2:
        raise ValueError(f"text: expected at least two tokens besides the special ones, got {int(content.sum())}")
    with torch.inference_mode():
        rows, ce_base = _base(model, layer, ids, content)
        read = sae.encode_sparse(rows)
        mean = rows.double().mean(0)
        ce_spliced = _spliced(model, layer, ids, content, sae)
        ce_ablated = _spliced(model, layer, ids, content, constant(mean))
        error = (rows.double() - sae.decode(read).double()).square().sum()
        fvu = error / (rows.double() - mean).square().sum()
        equal, flips = check_support(sae, rows, read)
        times = measure(lambda: model(ids), lambda: eager(sae, rows), lambda: sae(rows))
    fired = torch.unique(read.col_indices).numel()
    figures = {
        "model": model_name,
        "layer": layer,
        "tokens": rows.shape[0],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "l0": float(read.l0().double().mean()),
        "fvu": float(fvu),
        "ce_base": ce_base,
        "ce_spliced": ce_spliced,
        "ce_mean_ablated": ce_ablated,
        "delta_loss": ce_spliced - ce_base,
        "dead_fraction": 1 - fired / sae.d_sae,
        "support_equal": equal,
        "support_flips_vs_eager": flips,
        "ms_per_token": {
            "model": times[0] / ids.shape[1],
            "sae_eager": times[1] / rows.shape[0],
            "sae": times[2] / rows.shape[0],
        },
        "backend": _backend(sae.device),
    }
    pieces = [tokenizer.decode([int(i)]) for i in ids[0]]
    return Reading(pieces, content.tolist(), spread(read.cpu(), content), figures, every.shape[1] - ids.shape[1])


def _base(model: Any, layer: int, ids: Tensor, content: Tensor) -> tuple[Tensor, float]:
    """(activations of the content rows at the output of the layer, cross-entropy of the unchanged model)."""
    try:
        run = attach(model, {(layer, "resid"): Activations()}, tokens=content)
    except AttachError as error:
        raise ValueError(f"layer: expected a layer of {type(model).__name__}, got {layer}: {error}") from error
    with run:
        loss = cross_entropy(model, ids, content)
    return run.activations[layer, "resid"].float(), loss


def _spliced(model: Any, layer: int, ids: Tensor, content: Tensor, sae: JumpReLUSAE) -> float:
    """Cross-entropy with the content rows of the layer's output reconstructed; the others pass unchanged."""
    with attach(model, {(layer, "resid"): sae}, mode="splice", tokens=content):
        return cross_entropy(model, ids, content)


def constant(mean: Tensor) -> JumpReLUSAE:
    """An SAE in which nothing fires, so it reconstructs every row as `mean` [d]; splicing it in is an ablation."""
    d = mean.numel()
    return JumpReLUSAE.from_weights(
        W_enc=torch.zeros(d, 1),
        W_dec=torch.zeros(1, d),
        b_enc=torch.zeros(1),
        b_dec=mean.float(),
        threshold=torch.ones(1),
    ).to(mean.device)


def cross_entropy(model: Any, ids: Tensor, content: Tensor) -> float:
    """Mean of -log p(token | earlier tokens) in nats over content tokens from the second position on; ids [1, S]."""
    logits = model(ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return float(losses[content[1:]].double().mean())


def eager(sae: JumpReLUSAE, x: Tensor) -> Tensor:
    """The dense fp32 SAE as usually written in PyTorch: our time is compared with it."""
    z = x @ sae.W_enc + sae.b_enc
    return (torch.relu(z) * (z > sae.threshold)) @ sae.W_dec + sae.b_dec


def check_support(sae: JumpReLUSAE, x: Tensor, latents: SparseLatents) -> tuple[bool, int]:
    """(support equals fp64 wherever |z - θ| exceeds the dot's bound, number of pairs that differ from eager fp32).

    The bound is κ(‖w‖‖x‖ + |b|), κ that of op `encode`'s sum (`ops.encode.kappa`).
    """
    W, b = sae.W_enc.double(), sae.b_enc.double()
    tau = sae.threshold.double().clamp(min=0)
    norms, equal, flips = W.norm(dim=0), True, 0
    for start in range(0, x.shape[0], 64):
        part = x[start : start + 64]
        ours = latents[start : start + 64].to_dense() != 0
        z = part.double() @ W + b
        bound = kappa(sae.d_in) * (part.double().norm(dim=1, keepdim=True) * norms + b.abs())
        sure = (z - tau).abs() > bound
        equal &= bool((ours == (z > tau))[sure].all())
        dense = part.float() @ sae.W_enc.float() + sae.b_enc.float()
        flips += int((ours != (dense > sae.threshold.float().clamp(min=0))).sum())
    return equal, flips


def measure(*calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each call. Calls alternate after a warm-up, so that all run under the same conditions."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(REPEATS):
        for times, call in zip(taken, calls, strict=True):
            begin = time.perf_counter()
            call()
            if torch.cuda.is_initialized():  # a kernel returns before it is done
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
    return [sorted(times)[REPEATS // 2] for times in taken]


def _backend(device: torch.device) -> str:
    """The backend that runs `encode` here, with the instruction set if it is native."""
    chosen = backends.requested() or next(
        c.backend for c in backends.choices() if c.op == "encode" and c.device == device.type
    )
    return f"{chosen} ({backends.isa()})" if chosen == "native" else chosen


LABELS = {
    "tokens": "tokens read (BOS, EOS and PAD left out)",
    "d_in": "d_in",
    "d_sae": "d_sae",
    "l0": "L0: features that fire per token",
    "fvu": "FVU, against the mean of this text",
    "ce_base": "cross-entropy, model alone (nats per token)",
    "ce_spliced": "cross-entropy, SAE spliced in",
    "ce_mean_ablated": "cross-entropy, layer output replaced by its mean",
    "delta_loss": "delta_loss: cross-entropy, spliced - alone",
    "dead_fraction": "dead_fraction: features that never fire on this text",
    "support_equal": "support equals fp64 outside the error bound",
    "support_flips_vs_eager": "pairs that differ from eager fp32",
    "backend": "backend",
}
TIMES = {"model": "model", "sae_eager": "eager SAE", "sae": "this SAE"}
