"""`gemmascope-fast dev profile`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemmascope_fast.cli import arguments as common

if TYPE_CHECKING:
    from gemmascope_fast.dev.profile import Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Where the time of a model with an SAE goes.  --sae none: the model alone."
    common.add_pair(parser)
    modes = ("observe", "splice", "splice+error")
    parser.add_argument("--mode", choices=modes, default="observe", help="what the SAE does in the model")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens generated")
    common.add_prompt(parser, "the text that the model continues", "The history of the sea is also a history of trade.")
    common.add_output(parser, "--trace", "write a Chrome trace, for chrome://tracing or ui.perfetto.dev")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.pair import load_model
    from gemmascope_fast.attach import attach
    from gemmascope_fast.attach.transformers.structure import Structure
    from gemmascope_fast.dev.profile import profile_loop

    common.check_least(args, "tokens")
    if args.sae == "none":
        model, tokenizer = load_model(args.model, args.device, args.dtype)
        attached: Callable[[], Any] = nullcontext
    else:
        model, tokenizer, sae, layer = common.load_pair(args)
        sae.requires_grad_(False).prepare()
        attached = lambda: attach(model, {layer: sae}, mode=args.mode, tokens="all")  # noqa: E731
    prompt = tokenizer(args.prompt, return_tensors="pt").to(model.device)

    def loop() -> Any:
        with attached():
            return model.generate(**prompt, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)

    layers = {str(i): block for i, block in enumerate(Structure(model).stack()[1])}
    head = model.get_output_embeddings()
    if head is not None:
        layers["output head"] = head
    found = profile_loop(loop, layers, args.trace)
    _show(found, args)
    common.write_figures(args, asdict(found))
    return 0


def _inside(found: Profile) -> float:
    return sum(part.sae_ms for part in found.layers.values())


def _time(ms: float, whole: float, shown: bool) -> tuple[str, str]:
    return (f"{ms:.1f}", f"{ms / whole:.1%}") if shown else ("", "")


def _show(found: Profile, args: argparse.Namespace) -> None:
    from gemmascope_fast.dev.profile import LayerShare

    print(
        f"{args.tokens} tokens in {found.wall_ms:.0f} ms under the profiler, which slows small ops;"
        f" ops of this package {found.sae_ms:.1f} ms ({found.sae_ms / found.wall_ms:.1%});"
        f" peak memory {(found.peak_memory or 0) / 1e9:.2f} GB"
    )
    rest = found.wall_ms - found.sae_ms - sum(part.model_ms for part in found.layers.values())
    parts = {**found.layers, "all else (embedding, sampling, Python)": LayerShare(rest, found.sae_ms - _inside(found))}
    rows = []
    for name, part in parts.items():
        cells = ((part.model_ms, True), (part.sae_ms, bool(part.sae_ms)))
        rows.append((name, *(c for ms, shown in cells for c in _time(ms, found.wall_ms, shown))))
    common.print_table(("part of the model", "model ms", "share", "SAE ms", "share"), rows, "where the time went")
    on_gpu = any(op.device_ms is not None for op in found.ops)
    gpu = ["GPU ms", "GB/s achieved", "GB/s modelled"] if on_gpu else []
    rows = []
    for op in found.ops:
        share = "-" if op.roof_share is None else f"{op.roof_share:.0%}"
        figures = (op.device_ms, op.achieved_gb_s, op.modelled_gb_s) if on_gpu else ()
        own = (op.name, str(op.calls), f"{op.ms:.2f}", f"{op.bytes / 1e6:.1f}", f"{op.flops / 1e6:.1f}", share)
        rows.append((*own, *("-" if f is None else f"{f:.2f}" for f in figures)))
    common.print_table(["op", "calls", "ms", "MB", "Mflop", "roof", *gpu], rows, "ops of this package")
    if found.kernels:
        longest = sorted(found.kernels, key=lambda k: -k["ms"])[:30]
        common.print_table(
            ("kernel", "calls", "ms"), [(k["name"], str(k["calls"]), f"{k['ms']:.2f}") for k in longest], "CUDA kernels"
        )
    if args.trace:
        print(f"trace: {args.trace} (chrome://tracing or ui.perfetto.dev)")
