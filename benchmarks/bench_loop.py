"""Overhead of an SAE in a generating model: time inside the hooks per token divided by the model's own time.

    python benchmarks/bench_loop.py --case 270m            # Gemma 3 270M, fp32, the bundled SAE at its layer
    python benchmarks/bench_loop.py --case 270m-16k        # one layer at d_sae 16,384
    python benchmarks/bench_loop.py --case 270m-all        # all 18 layers at d_sae 16,384
    python benchmarks/bench_loop.py --case 2b --case 2b-all    # Gemma 2 2B's shape in bf16, random weights

Every variant generates the same number of tokens greedily, in turns (A/B interleaved, several rounds).  In each step
the run reports the time inside its hooks, and the rest of the step is the model's; the result is the median of the
first divided by the median of the second.  The A/B column compares whole steps with and without hooks, as a check; it
is as noisy as the machine.  Peers use hand-written hooks at the same places: dense eager fp32, and SAELens if
installed.

Random SAEs are calibrated on the model's own activations to an L0 of about 76.  In the 2B cases each of the 26 blocks
has its own weights (5.2 GB in total), and the SAEs share the matrices of four, to fit in memory. Every SAE's screen is
read from memory again if the last-level cache is smaller than four of them (some virtual machines report the cache of
a whole processor).  Observed latents are verified against fp64 before timing, and observing must not change a token.
The clamp is at the last layer with an SAE: at an earlier one, later layers would leave the range that their SAEs
are calibrated for.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations, Clamp
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.dev.bench.shapes import DECODED, LAYERS, fitted, gemma_2_2b
from gemmascope_fast.dev.testing import compare_support

L0, D_SAE = 76, 16384
PROMPT = "In the winter of 1911 two expeditions were racing across the Antarctic ice. Roald Amundsen travelled with"


# ---- models and SAEs ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A model, the ids it starts from, and an SAE for each layer that is read."""

    name: str
    model: Any
    ids: Tensor
    saes: dict[int, gsf.JumpReLUSAE]

    @functools.cached_property
    def dense(self) -> dict[int, peers.Dense]:
        """The SAEs laid out for dense products; shared matrices stay shared."""
        laid: dict[int, Tensor] = {}
        found = {}
        for layer, sae in self.saes.items():
            at = sae.W_enc.data_ptr()
            if at not in laid:
                laid[at] = sae.W_enc.detach().contiguous()
            rest = (getattr(sae, name).detach() for name in ("W_dec", "b_enc", "b_dec", "threshold"))
            found[layer] = peers.Dense(laid[at], *rest)
        return found


def small(layers: int | None, d_sae: int) -> Bench:
    """Gemma 3 270M in fp32.  layers None: the SAE's own layer; d_sae 4096: the bundled SAE."""
    model, tokenizer, bundled, layer = gsf.load_demo()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    if d_sae == bundled.d_sae:
        return Bench("Gemma 3 270M, bundled SAE", model, ids, {layer: bundled.requires_grad_(False)})
    chosen = [layer] if layers is None else list(range(layers))
    saes = fitted(model, ids, chosen, d_sae, L0, copies=18)
    return Bench(f"Gemma 3 270M, {len(chosen)} x 640x{d_sae}", model, ids, saes)


def two_b(layers: list[int], d_sae: int = D_SAE) -> Bench:
    """Gemma 2 2B's shape in bf16 with random weights."""
    model = gemma_2_2b(LAYERS)
    ids = torch.randint(3, 256000, (1, 24))
    name = f"Gemma 2 2B's shape (bf16, random), {len(layers)} x 2304x{d_sae}"
    return Bench(name, model, ids, fitted(model, ids, layers, d_sae, L0, copies=4))


# ---- variants -------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds inside the hooks so far."""

    seconds: float = 0.0


Variant = Callable[[Bench], Any]  # a context manager that yields something with `seconds`


def ours(mode: str, clamped: int = 0) -> Variant:
    def enter(bench: Bench) -> Any:
        edits = {}
        if clamped:
            layer, sae = list(bench.saes.items())[-1]
            edits = {layer: [Clamp(f, 5.0 * float(sae.threshold[f])) for f in range(clamped)]}
        return gsf.attach(bench.model, bench.saes, mode=mode, edits=edits, tokens="all")

    return enter


def by_hand(read: Callable[[peers.Dense], Callable[[Tensor], Tensor | None]]) -> Variant:
    """Forward hooks at the same places; `read` makes from an SAE the function that a hook calls with x [1, S, d]."""

    @contextmanager
    def enter(bench: Bench) -> Iterator[Clock]:
        clock = Clock()
        with ExitStack() as stack:
            for layer, sae in bench.dense.items():
                block = gsf.attach(bench.model, {layer: Activations()}, tokens="all")._taps[0].reads.module
                handle = block.register_forward_hook(_timed(read(sae), clock))
                stack.callback(handle.remove)
            yield clock

    return enter


def _timed(work: Callable[[Tensor], Tensor | None], clock: Clock) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        begin = time.perf_counter()
        x = output[0] if isinstance(output, tuple) else output
        new = work(x)
        if new is not None:
            new = (new, *output[1:]) if isinstance(output, tuple) else new
        clock.seconds += time.perf_counter() - begin
        return new

    return hook


def eager(sae: peers.Dense, with_error: bool = False) -> Callable[[Tensor], Tensor | None]:
    """The usual PyTorch code: dense, in fp32; with the error term, decode and add it back."""

    def work(x: Tensor) -> Tensor | None:
        wide = x[0].float()
        f = peers.eager_encode(sae, wide)
        if not with_error:
            return None
        x_hat = peers.eager_decode(sae, f)
        return (x_hat + (wide - x_hat)).to(x.dtype)[None]

    return work


def saelens(sae: peers.Dense, with_error: bool = False) -> Callable[[Tensor], Tensor | None]:
    """SAELens's own module with the same weights, called from the same hook."""
    theirs = peers.saelens_sae(sae)
    theirs.use_error_term = with_error

    def work(x: Tensor) -> Tensor | None:
        wide = x.float()
        if with_error:
            return theirs(wide).to(x.dtype)
        theirs.encode(wide)
        return None

    return work


VARIANTS: dict[str, Variant] = {
    "observe": ours("observe"),
    "splice+error": ours("splice+error"),
    "clamp of three": ours("splice+error", 3),
    "eager, observe": by_hand(eager),
    "eager, splice+error": by_hand(lambda sae: eager(sae, True)),
}
if importlib.util.find_spec("sae_lens"):
    VARIANTS["SAELens, observe"] = by_hand(saelens)
    VARIANTS["SAELens, splice+error"] = by_hand(lambda sae: saelens(sae, True))


# ---- timing ---------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Seconds per generated token: the whole step, and the part inside the hooks."""

    whole: list[float] = field(default_factory=list)
    hooks: list[float] = field(default_factory=list)

    def summary(self, base: Steps | None) -> dict[str, float]:
        model = statistics.median(w - h for w, h in zip(self.whole, self.hooks, strict=True))
        hooks = statistics.median(self.hooks)
        out = {"hooks_ms": 1e3 * hooks, "model_ms": 1e3 * model, "overhead_percent": 100 * hooks / model}
        out["step_ms_p10"], out["step_ms_p90"] = (1e3 * q for q in _deciles(self.whole))
        if base is not None:
            out["ab_percent"] = 100 * (statistics.median(self.whole) / statistics.median(base.whole) - 1)
        return out


def _deciles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=10)
    return cuts[0], cuts[-1]


def decode(bench: Bench, variant: Variant | None, tokens: int, steps: Steps) -> Tensor:
    """Greedy decoding; each step after the prefill is one entry.  Returns the sequence."""
    marks: list[tuple[float, float]] = []
    with torch.inference_mode(), variant(bench) if variant else _nothing() as clock:

        def mark(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            marks.append((time.perf_counter(), clock.seconds))
            return torch.zeros(len(ids), dtype=torch.bool)

        out = bench.model.generate(
            bench.ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, stopping_criteria=[mark]
        )
    for (t0, h0), (t1, h1) in itertools.pairwise(marks):
        steps.whole.append(t1 - t0)
        steps.hooks.append(h1 - h0)
    return out


@contextmanager
def _nothing() -> Iterator[Clock]:
    yield Clock()


def verify(bench: Bench) -> float:
    """Compare the latents of every layer with fp64, and the tokens with an unobserved run; returns the mean L0 of
    generated tokens (not BOS, on which thousands fire)."""
    tokens, prompt = DECODED, bench.ids.shape[1]
    plain = decode(bench, None, tokens, Steps())
    with torch.inference_mode():
        outer = gsf.attach(bench.model, {layer: Activations() for layer in bench.saes}, tokens="all")
        with outer, gsf.attach(bench.model, bench.saes, tokens="all") as run:
            out = bench.model.generate(bench.ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    assert torch.equal(out, plain), "observing changed a token"
    fired = []
    for layer, sae in bench.saes.items():
        latents, x = run.latents[layer], outer.activations[layer].float()
        latents, x = latents[prompt:], x[prompt:]
        check = compare_support(latents, x, sae)
        assert check.equal, (layer, check)
        fired.append(latents.nnz / latents.n_rows)
    return statistics.mean(fired)


CASES: dict[str, Callable[[], Bench]] = {
    "270m": lambda: small(None, 4096),
    "270m-16k": lambda: small(None, D_SAE),
    "270m-all": lambda: small(18, D_SAE),
    "2b": lambda: two_b([12]),
    "2b-all": lambda: two_b(list(range(26))),
}


def measure(bench: Bench, tokens: int, rounds: int) -> dict[str, Any]:
    l0 = verify(bench)
    steps = {name: Steps() for name in ("without", *VARIANTS)}
    for turn in range(rounds + 1):
        for name, own in steps.items():
            # the first round warms up
            decode(bench, VARIANTS.get(name), tokens if turn else 3, own if turn else Steps())
    base = steps["without"]
    return {
        "case": bench.name,
        "l0": l0,
        "tokens": tokens * rounds,
        "variants": {name: own.summary(None if own is base else base) for name, own in steps.items()},
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "variant", "hooks ms", "model ms", "overhead %", "A/B %", title=f"{result['case']}, L0 {result['l0']:.0f}"
    )
    for name, own in result["variants"].items():
        ab = f"{own['ab_percent']:.1f}" if "ab_percent" in own else ""
        table.add_row(name, f"{own['hooks_ms']:.3f}", f"{own['model_ms']:.1f}", f"{own['overhead_percent']:.2f}", ab)
    Console().print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: 270m")
    parser.add_argument("--tokens", type=int, default=16, help="decoded per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every variant (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    for name in list(VARIANTS):
        if args.variants and name not in args.variants:
            del VARIANTS[name]
    results = []
    for case in args.case or ["270m"]:
        results.append(measure(CASES[case](), args.tokens, args.rounds))
        show(results[-1])
    if args.json:
        found = {"machine": describe(torch.get_num_threads()), "results": results}
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
