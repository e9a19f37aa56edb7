"""Suite `loop`: a model that generates and reads a prompt, with and without SAEs in it: Gemma 3 270M, and Gemma 2 2B's
shape with random weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach import Activations, Clamp, attach
from gemmascope_fast.checkpoints.bundled import load_demo, quiet_loading
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import WEIGHTS, Case
from gemmascope_fast.dev.bench.checks import Truth
from gemmascope_fast.dev.bench.engine import Bench, Candidate, Plan, Unavailable, Verdict
from gemmascope_fast.dev.bench.llama import LlamaCpp
from gemmascope_fast.dev.bench.shapes import LAYERS, fitted, gemma_2_2b
from gemmascope_fast.dev.bench.timing import Seconds
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

NEW_TOKENS, SHORT_TOKENS, PROMPT_TOKENS = 16, 16, 256
HOOK_TOKENS = 8  # generated in a call whose hooks are timed
TEXT = "The history of the sea is also a history of trade, and of the people who kept the books. "
L0, D_SAE = 76, 16384  # Gemma Scope's for 2B
SMALL_LAYERS = 18  # Gemma 3 270M's


@dataclass
class Loop:
    """A model, ids [1, n] to read, and an SAE for each layer that is read; `llama`: llama.cpp has the model too."""

    model: Any
    ids: Tensor
    saes: dict[int, JumpReLUSAE]
    llama: bool = False

    @functools.cached_property
    def dense(self) -> dict[int, peers.Dense]:
        """The SAEs laid out for dense products; those that share an encoder share its copy."""
        laid: dict[int, Tensor] = {}
        found = {}
        for layer, sae in self.saes.items():
            W_enc, *rest = (getattr(sae, name).detach() for name in WEIGHTS)
            found[layer] = peers.Dense(laid.setdefault(W_enc.data_ptr(), W_enc.contiguous()), *rest)
        return found


Making = Callable[[], Loop]
_HELD: dict[Making, Loop] = {}  # of the last model that was made: its benches share it


def loop_suite(cases: Sequence[Case], tokens: Sequence[int] | None = None) -> Iterator[Plan]:
    """Generation of 16 tokens and a prefill of 256 by a model with one SAE, timed whole; and the time inside the hooks
    per generated token, with an SAE at one layer and at all layers.  Needs the extra `demo`."""
    del cases, tokens  # the models' own
    models: tuple[tuple[Making, int, int, int], ...] = (
        (demo, 640, 4096, 1),
        (demo_every_layer, 640, D_SAE, SMALL_LAYERS),
        (two_b, 2304, D_SAE, 1),
        (two_b_every_layer, 2304, D_SAE, LAYERS),
    )
    for make, d_in, d_sae, layers in models:
        if layers == 1:
            for op, T in (("generate", NEW_TOKENS), ("prefill", PROMPT_TOKENS)):
                yield Plan("loop", op, T, d_in, d_sae, functools.partial(_whole, op, T, make))
        op = f"hooks, {layers} layer" + "s" * (layers > 1)
        yield Plan("loop", op, 1, d_in, d_sae, functools.partial(_hooks, op, d_in, d_sae, make))


def demo() -> Loop:
    """Gemma 3 270M in fp32 and the bundled SAE."""
    with quiet_loading():
        model, tokenizer, sae, layer = load_demo()
    ids = tokenizer(TEXT * 20, return_tensors="pt")["input_ids"]
    return Loop(model, ids, {layer: sae.requires_grad_(False).prepare()}, llama=True)


def demo_every_layer() -> Loop:
    """The same model with a random SAE of Gemma Scope's width at every layer."""
    loop, layers = demo(), list(range(SMALL_LAYERS))
    saes = fitted(loop.model, loop.ids[:, :SHORT_TOKENS], layers, D_SAE, L0, copies=SMALL_LAYERS)
    return Loop(loop.model, loop.ids, saes)


def two_b() -> Loop:
    """Gemma 2 2B's shape in bf16, and an SAE of Gemma Scope's width in its middle; one block where memory has no room
    for 26."""
    model = gemma_2_2b()
    return _with_saes(model, [len(model.model.layers) // 2])


def two_b_every_layer() -> Loop:
    """The same with an SAE at every layer; every fourth has the same matrices.  Raises Unavailable where memory has no
    room for all blocks."""
    model = gemma_2_2b()
    if len(model.model.layers) < LAYERS:
        raise Unavailable(f"memory has no room for {LAYERS} blocks of Gemma 2 2B's shape")
    return _with_saes(model, list(range(LAYERS)))


def _with_saes(model: Any, layers: list[int]) -> Loop:
    ids = torch.randint(3, 256000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return Loop(model, ids, fitted(model, ids[:, :SHORT_TOKENS], layers, D_SAE, L0, copies=4))


def _shared(make: Making) -> Loop:
    """What `make` gives, made once for benches that follow each other; the one before is let go first."""
    if make not in _HELD:
        _HELD.clear()
        _HELD[make] = make()
    return _HELD[make]


# ---- the candidates ---------------------------------------------------------------------------------


Hook = Callable[[Tensor], Tensor | None]  # what a hook does with x fp32 [tokens, d]: gives what replaces it, or None
Way = Callable[[], AbstractContextManager[Any]]  # within it the model has hooks


def by_hand(loop: Loop, read: Callable[[peers.Dense, str], Hook], mode: str) -> Way:
    """Forward hooks at the same layers, as one writes them; `read` makes an SAE's."""

    def hook_of(work: Hook, clock: Any) -> Callable[..., Any]:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            begin = time.perf_counter()
            x = output if isinstance(output, Tensor) else output[0]
            new: Any = work(x.reshape(-1, x.shape[-1]).float())
            if new is not None:
                new = new.reshape(x.shape).to(x.dtype)
                new = new if isinstance(output, Tensor) else (new, *output[1:])
            clock.seconds += time.perf_counter() - begin
            return new

        return hook

    hooks = {layer: read(sae, mode) for layer, sae in loop.dense.items()}

    @contextmanager
    def enter() -> Iterator[SimpleNamespace]:
        clock = SimpleNamespace(seconds=0.0)  # inside the hooks so far, as a run of `attach` has them
        with ExitStack() as stack:
            for layer, work in hooks.items():
                handle = loop.model.model.layers[layer].register_forward_hook(hook_of(work, clock))
                stack.callback(handle.remove)
            yield clock

    return enter


def eager(sae: peers.Dense, mode: str) -> Hook:
    """The dense SAE in PyTorch."""

    def work(x: Tensor) -> Tensor | None:
        latents = peers.eager_encode(sae, x)
        if mode == "observe":
            return None
        x_hat = peers.eager_decode(sae, latents)
        return x_hat if mode == "splice" else x_hat + (x - x_hat)

    return work


def saelens(sae: peers.Dense, mode: str) -> Hook:
    """SAELens's own module on the same weights."""
    theirs = peers.saelens_sae(sae)
    theirs.use_error_term = mode == "splice+error"

    def work(x: Tensor) -> Tensor | None:
        if mode != "observe":
            return theirs(x)
        theirs.encode(x)
        return None

    return work


def ours(loop: Loop, mode: str, clamped: int = 0) -> Way:
    """`attach`; `clamped` features of the last SAE are set to five times their thresholds.  (At an earlier layer this
    would drive the later ones out of the range that their SAEs are calibrated to.)"""
    layer, sae = list(loop.saes.items())[-1]
    edits = {layer: [Clamp(f, 5.0 * float(sae.threshold[f])) for f in range(clamped)]} if clamped else {}
    return lambda: attach(loop.model, loop.saes, mode=mode, edits=edits, tokens="all")


def verified(loop: Loop, act: Callable[[], Tensor]) -> tuple[Verdict, float]:
    """Latents of every layer against fp64, and the model's output against that without hooks; gives the verdict on the
    first layer, and features that fire per token.  BOS, of which thousands fire, is left out."""
    outer = attach(loop.model, {layer: Activations() for layer in loop.saes}, tokens="all")
    with outer, attach(loop.model, loop.saes, tokens="all") as run:
        observed = act()
    if not torch.equal(observed, act()):
        raise AssertionError("observing changed the model's output")
    found, fired = [], []
    for layer, sae in loop.saes.items():
        latents = run.latents[layer][1:]
        found.append(Truth(sae, outer.activations[layer].float()[1:]).ours(latents))
        fired.append(latents.nnz / max(1, latents.n_rows))
    return found[0], sum(fired) / len(fired)


def generated(loop: Loop, tokens: int) -> Tensor:
    short = loop.ids[:, :SHORT_TOKENS]
    return loop.model.generate(
        short, attention_mask=torch.ones_like(short), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )


def seconds_a_token(model: Any, ids: Tensor, tokens: int, clock: Callable[[], float] = time.perf_counter) -> Seconds:
    """Of so many generated tokens after the first, whose step reads the prompt."""
    marks: list[float] = []

    def mark(now: Tensor, _scores: Any, **_: Any) -> Tensor:
        marks.append(clock())
        return torch.zeros(len(now), dtype=torch.bool)

    more = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1, "stopping_criteria": [mark]}
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **more)
    return Seconds((marks[-1] - marks[0]) / tokens)


# ---- the benches ------------------------------------------------------------------------------------


def _whole(op: str, T: int, make: Making) -> Bench:
    """All of a generation or a prefill, model and SAE."""
    loop = _shared(make)

    def act() -> Tensor:
        if op == "generate":
            return generated(loop, NEW_TOKENS)
        return loop.model(input_ids=loop.ids[:, :PROMPT_TOKENS]).logits

    verdict, l0 = verified(loop, act)
    bench = _empty(op, T, loop, l0)

    def within(way: Way) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with way():
                return act()

        return call

    bench.candidates.append(Candidate("model alone", "fp32", act, None))
    for mode in ("observe", "splice", "splice+error"):
        bench.candidates.append(Candidate(f"ours, {mode}", "fp32", within(ours(loop, mode)), None, verdict))
    bench.candidates.append(Candidate("eager fp32", "fp32", within(by_hand(loop, eager, "splice")), None))
    if op == "generate" and loop.llama:
        bench.add("llama.cpp q4_k_m, model alone", functools.partial(_llama, loop.ids[0, :SHORT_TOKENS].tolist()))
    return bench


def _hooks(op: str, d_in: int, d_sae: int, make: Making) -> Bench:
    """Per generated token: the time inside the hooks, and the model's own time ("model alone").  One over the other is
    the overhead of an SAE, which the machine's noise disturbs less than the difference of two generations."""
    try:
        loop = _shared(make)
    except Unavailable as error:
        return Bench("loop", op, 1, d_in, d_sae, None, missing={"ours, observe": str(error)})
    verdict, l0 = verified(loop, lambda: generated(loop, HOOK_TOKENS))
    bench = _empty(op, 1, loop, l0)

    def add(impl: str, way: Callable[[], Way], verdict: Verdict | None = None) -> None:
        def build() -> Candidate:
            own = way()

            def call() -> Seconds:
                with own() as run:
                    clock = time.perf_counter if run is None else lambda: run.seconds
                    return seconds_a_token(loop.model, loop.ids[:, :SHORT_TOKENS], HOOK_TOKENS, clock)

            return Candidate(impl, "fp32", call, None, verdict or Verdict())

        bench.add(impl, build)

    add("model alone", lambda: nullcontext)
    add("ours, observe", lambda: ours(loop, "observe"), verdict)
    add("ours, splice+error", lambda: ours(loop, "splice+error"), verdict)
    add("ours, clamp of three", lambda: ours(loop, "splice+error", 3), verdict)
    add("eager fp32", lambda: by_hand(loop, eager, "observe"))
    add("eager fp32, splice+error", lambda: by_hand(loop, eager, "splice+error"))
    add("SAELens fp32", lambda: by_hand(loop, saelens, "observe"))
    add("SAELens fp32, splice+error", lambda: by_hand(loop, saelens, "splice+error"))
    return bench


def _empty(op: str, T: int, loop: Loop, l0: float) -> Bench:
    sae = next(iter(loop.saes.values()))
    return Bench("loop", op, T, sae.d_in, sae.d_sae, l0)


def _llama(ids: list[int]) -> Candidate:
    """llama.cpp's process: it reads the same prompt and decodes as many tokens; the last of ours is not fed back."""
    process = LlamaCpp(torch.get_num_threads())
    return Candidate("llama.cpp q4_k_m, model alone", "q4_k_m", lambda: process(ids, NEW_TOKENS - 1), None)
