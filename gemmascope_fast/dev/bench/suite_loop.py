"""Suite `loop`: a model that decodes and reads a prompt, with and without an SAE: Gemma 3 270M for real, and Gemma 2
2B's shape with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach import Activations, attach
from gemmascope_fast.checkpoints.bundled import load_demo, quiet_loading
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import Case
from gemmascope_fast.dev.bench.checks import Truth
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Verdict
from gemmascope_fast.dev.bench.llama import LlamaCpp
from gemmascope_fast.dev.bench.shapes import LAYERS, fitted, gemma_2_2b
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

NEW_TOKENS, SHORT_TOKENS, PROMPT_TOKENS = 16, 16, 256
TEXT = "The history of the sea is also a history of trade, and of the people who kept the books. "
L0, D_SAE = 76, 16384  # Gemma Scope's for 2B


@dataclass
class Pair:
    """A model, ids [1, n] to read, and an SAE of the output of `layer`; `llama`: llama.cpp has the model too."""

    model: Any
    ids: Tensor
    sae: JumpReLUSAE
    layer: int
    llama: bool = False


def loop_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    """Decoding of 16 tokens and a prefill of 256; times are of the whole, model and SAE.  Needs the extra `demo`."""
    del cases, tokens  # the models' own
    models: tuple[tuple[Callable[[], Pair], int, int], ...] = ((demo, 640, 4096), (two_b, 2304, D_SAE))
    for make, d_in, d_sae in models:
        made = functools.cache(make)  # both benches of a model share it, and nothing else holds it
        for op, T in (("generate", NEW_TOKENS), ("prefill", PROMPT_TOKENS)):
            yield Plan("loop", op, T, d_in, d_sae, functools.partial(_build, op, T, made))


def demo() -> Pair:
    """Gemma 3 270M in fp32 and the bundled SAE."""
    with quiet_loading():
        model, tokenizer, sae, layer = load_demo()
    ids = tokenizer(TEXT * 20, return_tensors="pt")["input_ids"]
    return Pair(model, ids, sae.requires_grad_(False).prepare(), layer, llama=True)


def two_b() -> Pair:
    """Gemma 2 2B's shape in bf16, and an SAE of Gemma Scope's width in its middle; one block where memory has no room
    for 26."""
    model = gemma_2_2b()
    layer = len(model.model.layers) // 2 if len(model.model.layers) == LAYERS else 0
    ids = torch.randint(3, 256000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    sae = fitted(model, ids[:, :SHORT_TOKENS], [layer], D_SAE, L0, copies=1)[layer]
    return Pair(model, ids, sae, layer)


def _build(op: str, T: int, make: Callable[[], Pair]) -> Bench:
    pair = make()
    model, short, long = pair.model, pair.ids[:, :SHORT_TOKENS], pair.ids[:, :PROMPT_TOKENS]

    def generate() -> Tensor:
        return model.generate(
            short, attention_mask=torch.ones_like(short), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip

    def prefill() -> Tensor:
        return model(input_ids=long).logits

    bench = _bench(op, T, {"generate": generate, "prefill": prefill}[op], pair, long)
    if op == "generate" and pair.llama:
        bench.add("llama.cpp q4_k_m, model alone", functools.partial(_llama, short[0].tolist()))
    return bench


def _llama(ids: list[int]) -> Candidate:
    """llama.cpp's process: it reads the same prompt and decodes as many tokens; the last of ours is not fed back."""
    process = LlamaCpp(torch.get_num_threads())
    return Candidate("llama.cpp q4_k_m, model alone", "q4_k_m", lambda: process(ids, NEW_TOKENS - 1), None)


def _bench(op: str, T: int, act: Callable[[], Tensor], pair: Pair, ids: Tensor) -> Bench:
    model, sae, layer = pair.model, pair.sae, pair.layer
    with attach(model, {layer: Activations()}, tokens="all") as read:
        model(input_ids=ids)
    activations = read.activations[layer].float()[1:]  # BOS is no content
    truth = Truth(sae, activations)
    verdict = truth.ours(sae.encode_sparse(activations))
    with attach(model, {layer: sae}, tokens="content") as run:
        observed = act()
        latents = run.latents[layer]
    if not torch.equal(observed, act()):
        raise AssertionError(f"{op}: observing changed the model's output")
    bench = Bench("loop", op, T, sae.d_in, sae.d_sae, latents.nnz / max(1, len(latents)))

    def attached(mode: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with attach(model, {layer: sae}, mode=mode, tokens="all"):
                return act()

        return call

    wide = peers.Dense.of(sae)

    def eager() -> Tensor:
        """The dense SAE in a forward hook, as one writes it by hand."""

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            flat = hidden.reshape(-1, hidden.shape[-1]).float()
            spliced = peers.eager_sae(wide, flat).reshape(hidden.shape).to(hidden.dtype)
            return spliced if isinstance(output, Tensor) else (spliced, *output[1:])

        handle = model.model.layers[layer].register_forward_hook(hook)
        try:
            return act()
        finally:
            handle.remove()

    calls = {
        "model alone": (act, Verdict()),
        "ours, observe": (attached("observe"), verdict),
        "ours, splice": (attached("splice"), verdict),
        "ours, splice+error": (attached("splice+error"), verdict),
        "eager fp32": (eager, Verdict()),
    }
    for name, (call, found) in calls.items():
        bench.candidates.append(Candidate(name, "fp32", call, None, found))
    return bench
