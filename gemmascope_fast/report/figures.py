"""What an SAE makes of one text: latents and the figures by which one judges them, each from its formula."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import backends
from gemmascope_fast.latents import SparseLatents
from gemmascope_fast.sae import JumpReLUSAE

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

    L0, FVU, dead fraction and support are over the content tokens (no BOS, EOS, PAD); cross-entropies are in
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
    if int(content.sum()) < 2:
        raise ValueError(f"text: expected at least two tokens besides the special ones, got {int(content.sum())}")
    block = decoder_layer(model, layer)
    with torch.inference_mode():
        x, ce_base = _base(model, block, ids, content)
        rows = x[content]
        read = sae.encode_sparse(rows)
        mean = rows.double().mean(0)
        ce_spliced = _replaced(model, block, ids, content, sae(rows))
        ce_ablated = _replaced(model, block, ids, content, mean.float().expand_as(rows))
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
    return Reading(pieces, content.tolist(), _spread(read, content), figures, every.shape[1] - ids.shape[1])


def decoder_layer(model: Any, layer: int) -> Any:
    """The module `…layers.{layer}` of a transformers text decoder.  ValueError where there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if layers is None or not 0 <= layer < len(layers):
        count = "no layers found" if layers is None else f"{len(layers)} layers"
        raise ValueError(f"layer: expected a layer of {type(model).__name__} ({count}), got {layer}")
    return layers[layer]


@contextmanager
def _hooked(block: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block the layer gives change(output), whether it returns a tensor or a tuple that starts with one."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _base(model: Any, block: Any, ids: Tensor, content: Tensor) -> tuple[Tensor, float]:
    seen: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        seen.append(h[0].float().clone())
        return h

    with _hooked(block, keep):
        loss = cross_entropy(model, ids, content)
    return seen[0], loss


def _replaced(model: Any, block: Any, ids: Tensor, content: Tensor, rows: Tensor) -> float:
    """Cross-entropy with the content rows of the layer's output replaced; the others pass as they are."""

    def change(h: Tensor) -> Tensor:
        h = h.clone()
        h[0, content] = rows.to(h.dtype)
        return h

    with _hooked(block, change):
        return cross_entropy(model, ids, content)


def cross_entropy(model: Any, ids: Tensor, content: Tensor) -> float:
    """Mean of -log p(token | before) in nats over content tokens from the second position on; ids [1, S]."""
    logits = model(ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return float(losses[content[1:]].double().mean())


def eager(sae: JumpReLUSAE, x: Tensor) -> Tensor:
    """The dense fp32 SAE as one writes it in PyTorch: what ours is timed against."""
    z = x @ sae.W_enc + sae.b_enc
    return (torch.relu(z) * (z > sae.threshold)) @ sae.W_dec + sae.b_dec


def check_support(sae: JumpReLUSAE, x: Tensor, latents: SparseLatents) -> tuple[bool, int]:
    """(equal to fp64 wherever |z - θ| exceeds the dot's bound, pairs that differ from eager fp32).

    The bound is κ(‖w‖‖x‖ + |b|) with κ = 1.01 (⌈d_in/16⌉ + 6) 2⁻²⁴, for 16 lanes folded 8-4-2-1 (design section 4).
    """
    W, b = sae.W_enc.double(), sae.b_enc.double()
    tau = sae.threshold.double().clamp(min=0)
    kappa = 1.01 * (math.ceil(sae.d_in / 16) + 6) * 2.0**-24
    norms, equal, flips = W.norm(dim=0), True, 0
    for start in range(0, x.shape[0], 64):
        part = x[start : start + 64]
        ours = latents[start : start + 64].to_dense() != 0
        z = part.double() @ W + b
        bound = kappa * (part.double().norm(dim=1, keepdim=True) * norms + b.abs())
        sure = (z - tau).abs() > bound
        equal &= bool((ours == (z > tau))[sure].all())
        dense = part.float() @ sae.W_enc.float() + sae.b_enc.float()
        flips += int((ours != (dense > sae.threshold.float().clamp(min=0))).sum())
    return equal, flips


def measure(*calls: Callable[[], Any]) -> list[float]:
    """Median milliseconds of each call, taken in turn after a warm-up, so that all see the same machine."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(REPEATS):
        for times, call in zip(taken, calls, strict=True):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return [sorted(times)[REPEATS // 2] for times in taken]


def _backend(device: torch.device) -> str:
    """The backend that serves `encode` here, with the instruction set where it is native."""
    chosen = backends.requested() or next(
        c.backend for c in backends.choices() if c.op == "encode" and c.device == device.type
    )
    return f"{chosen} ({backends.isa()})" if chosen == "native" else chosen


def _spread(read: SparseLatents, content: Tensor) -> SparseLatents:
    """Rows of content tokens → rows of all tokens, the others empty."""
    counts = torch.zeros(content.numel(), dtype=torch.int64)
    counts[content] = read.crow_indices.diff()
    crow = torch.zeros(content.numel() + 1, dtype=torch.int64)
    crow[1:] = counts.cumsum(0)
    return SparseLatents(crow, read.col_indices, read.values, (content.numel(), read.d_sae))
