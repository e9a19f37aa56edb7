"""Suite `loop`: Gemma 3 270M for real, with and without an SAE at its layer 12."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach import attach
from gemmascope_fast.bench import peers
from gemmascope_fast.bench.cases import Case
from gemmascope_fast.bench.checks import Truth
from gemmascope_fast.bench.engine import Bench, Candidate, Plan, Verdict
from gemmascope_fast.demo_model import load_demo, quiet_loading

NEW_TOKENS, PROMPT_TOKENS = 16, 256
TEXT = "The history of the sea is also a history of trade, and of the people who kept the books. "


def loop_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    """Decoding of 16 tokens and a prefill of 256; times are of the whole, model and SAE.  Needs the extra `demo`."""
    del cases, tokens  # the model's own
    for op, T in (("generate", NEW_TOKENS), ("prefill", PROMPT_TOKENS)):
        yield Plan("loop", op, T, 640, 4096, functools.partial(_build, op, T))


def _build(op: str, T: int) -> Bench:
    with quiet_loading():
        model, tokenizer, sae, layer = load_demo()
    sae.requires_grad_(False).prepare()
    ids = tokenizer(TEXT * 20, return_tensors="pt")["input_ids"]
    short, long = ids[:, :16], ids[:, :PROMPT_TOKENS]

    def generate() -> Tensor:
        return model.generate(
            short, attention_mask=torch.ones_like(short), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip

    def prefill() -> Tensor:
        return model(input_ids=long).logits

    act = {"generate": generate, "prefill": prefill}[op]
    return _bench(op, T, act, model, sae, layer, long)


def _bench(op: str, T: int, act: Callable[[], Tensor], model: Any, sae: Any, layer: int, ids: Tensor) -> Bench:
    with attach(model, sae, tokens="content") as run:
        activations = _activations(model, layer, ids)
        plain = act()
        latents = run.latents[layer]
    truth = Truth(sae, activations[1:])  # BOS is no content
    verdict = truth.ours(sae.encode_sparse(activations[1:]))
    if not torch.equal(plain, act()):
        raise AssertionError(f"{op}: observing changed the model's output")
    bench = Bench("loop", op, T, sae.d_in, sae.d_sae, latents.nnz / max(1, len(latents)))

    def attached(mode: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with attach(model, sae, mode=mode, tokens="all"):
                return act()

        return call

    wide = peers.Dense.of(sae)

    def eager() -> Tensor:
        """The dense SAE in a forward hook, as one writes it by hand."""

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output if isinstance(output, Tensor) else output[0]
            flat = hidden.reshape(-1, hidden.shape[-1])
            spliced = peers.eager_sae(wide, flat).reshape(hidden.shape)
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


def _activations(model: Any, layer: int, ids: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    handle = model.model.layers[layer].register_forward_hook(keep)
    try:
        model(input_ids=ids)
    finally:
        handle.remove()
    return kept[0][0].float()
