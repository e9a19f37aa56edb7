"""Models and SAEs of real shapes with random weights, for the loop: Gemma 2 2B, and SAEs calibrated on a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.attach import Activations, attach
from gemmascope_fast.dev.bench.machine import available_memory
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

LAYERS, VOCABULARY = 26, 256000
BLOCK_BYTES, EMBEDDING_BYTES = 156 << 20, 2 * VOCABULARY * 2304
# beside the weights: activations, an SAE with its screen and its peers, what the system needs
ROOM = 6 << 30
DECODED = 17  # tokens that SAEs are calibrated on


def _config(layers: int) -> Any:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=2304, intermediate_size=9216, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def gemma_2_2b(layers: int | None = None) -> Any:
    """Gemma 2 2B's shape in bf16 with random weights, those of every second block equal but not shared; `layers` of
    its 26, or None: all of them where memory allows, otherwise one."""
    import transformers

    if layers is None:
        whole = LAYERS * BLOCK_BYTES + EMBEDDING_BYTES + ROOM
        layers = LAYERS if whole <= available_memory() else 1
    config = _config(min(2, layers))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    # copies of the first two blocks, each with memory of its own: drawing billions of weights would take minutes
    blocks = list(model.model.layers)
    for index in range(2, layers):
        block = copy.deepcopy(blocks[index % 2], {id(config): config})
        block.self_attn.layer_idx = index
        blocks.append(block)
    model.model.layers = nn.ModuleList(blocks)
    config.num_hidden_layers, config.layer_types = layers, (list(config.layer_types) * layers)[:layers]
    return model


def fitted(model: Any, ids: Tensor, layers: list[int], d_sae: int, l0: int, copies: int) -> dict[int, JumpReLUSAE]:
    """An SAE a layer of which about l0 features fire there on the tokens that are decoded: bias and thresholds are its
    own, matrices are shared by every `copies`-th layer."""
    seen = {layer: Activations() for layer in layers}
    with torch.inference_mode(), attach(model, seen, tokens="content") as run:
        model.generate(ids, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False)
    matrices: dict[int, tuple[Tensor, Tensor]] = {}
    saes = {}
    for number, layer in enumerate(layers):
        x = run.activations[layer].float().clone()
        mean = x.mean(0)
        own = matrices.get(number % copies)
        if own is None:
            own = matrices[number % copies] = _matrices(number, x - mean, d_sae)
        rows, decoder = own
        z = (x - mean) @ rows.t()
        scale = z.std(0).clamp_min(1e-30)
        decoded = (z / scale)[1 - DECODED :].flatten()  # the last token is not fed back
        cut = decoded.kthvalue(decoded.numel() - l0 * (DECODED - 1)).values
        sae = JumpReLUSAE(rows.t(), decoder, -(rows @ mean), mean, cut.clamp_min(0) * scale)
        saes[layer] = sae.requires_grad_(False).prepare()
    return saes


def _matrices(seed: int, centred: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Encoder rows [d_sae, d] that lean on the activations' directions, and a decoder like them."""
    g = torch.Generator().manual_seed(seed)
    d = centred.shape[1]
    lean = torch.randn(d_sae, len(centred), generator=g) @ (centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-9))
    rows = torch.randn(d_sae, d, generator=g) / d**0.5 + lean / len(centred) ** 0.5
    rows /= rows.norm(dim=1, keepdim=True)
    return rows, (rows + 0.01 * torch.randn(d_sae, d, generator=g)).contiguous()
