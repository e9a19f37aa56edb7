"""`gemmascope-fast dev profile`: where the time of a real loop goes, by torch.profiler with every op of ours named."""

from __future__ import annotations

import argparse
import bisect
import gzip
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from gemmascope_fast import backends
from gemmascope_fast.cli.arguments import add_anywhere_argument, check_outputs
from gemmascope_fast.dev.bench.machine import process_memory
from gemmascope_fast.dev.roof import Roof, measure
from gemmascope_fast.files.atomic import replacing
from gemmascope_fast.files.results import write_json
from gemmascope_fast.ops._library import OPS

PREFIX = "gemmascope_fast::"


@dataclass
class OpShare:
    """One op of ours over the whole loop: calls, time, declared bytes and operations, share of the roof.

    bytes and flops are the cost that the op declares (each input read once).  roof_share is None without a measured
    roof or a declared cost; it may exceed 1 where the weights stay in the cache.
    """

    name: str
    calls: int = 0
    ms: float = 0.0
    bytes: int = 0
    flops: int = 0
    roof_share: float | None = None
    device_ms: float | None = None
    achieved_gb_s: float | None = None
    modelled_gb_s: float | None = None


@dataclass
class LayerShare:
    """Milliseconds of one part of the model over the whole loop: its own forward, and the ops of this package that ran
    in it or in the hooks behind it, before the next part began."""

    model_ms: float = 0.0
    sae_ms: float = 0.0


@dataclass
class Profile:
    """Milliseconds of the loop, of each part of the model, of the SAEs; memory in bytes."""

    wall_ms: float
    layers: dict[str, LayerShare]
    sae_ms: float
    ops: list[OpShare]
    roof: dict[str, Any] | None
    peak_memory: int | None
    kernels: list[dict[str, Any]] = field(default_factory=list)


def profile_loop(loop: Callable[[], Any], layers: dict[str, torch.nn.Module], trace: Path | None = None) -> Profile:
    """Runs `loop` twice: once to warm up and to count what our ops declare, once profiled.

    `layers` are the modules whose time is told apart, in the order in which they run; none within another.
    With `trace` the Chrome trace is written there (chrome://tracing, ui.perfetto.dev).
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes of its own starts and stops
    roof = None if backends._C is None else measure()
    with _costs() as costs:
        loop()
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _named(layers), profile(activities=activities, profile_memory=True) as found:
        start = time.perf_counter()
        loop()
        wall = (time.perf_counter() - start) * 1e3
    if trace is not None:
        with replacing(trace) as temporary:
            found.export_chrome_trace(str(temporary))
            if trace.suffix == ".gz":
                temporary.write_bytes(gzip.compress(temporary.read_bytes()))
    averages = {event.key: event for event in found.key_averages()}
    spent, sae_ms = _layers(found.events(), layers)
    ours = [event for key, event in averages.items() if key.removeprefix(PREFIX) in OPS and key.startswith(PREFIX)]
    shares = sorted((_share(event, costs, roof) for event in ours), key=lambda s: -s.ms)
    kernels = [
        {"name": e.key, "calls": e.count, "ms": e.device_time_total / 1e3}
        for e in averages.values()
        if cuda and str(e.device_type).endswith("CUDA")
    ]
    return Profile(wall, spent, sae_ms, shares, None if roof is None else asdict(roof), _peak_memory(), kernels)


def _layers(events: Any, names: Iterable[str]) -> tuple[dict[str, LayerShare], float]:
    """Each part's share, and the time of our ops over all, those within another of ours not counted again.

    A hook that was registered before ours runs after the range of its layer has ended, so an op belongs to the part
    that began last before it.
    """
    spans = sorted((e.time_range.start, e.time_range.end, e.name[6:]) for e in events if e.name.startswith("layer "))
    found = {name: LayerShare() for name in names if any(span[2] == name for span in spans)}
    for start, end, name in spans:
        found[name].model_ms += (end - start) / 1e3
    starts, total = [span[0] for span in spans], 0.0
    for event in events:
        if not _is_ours(event) or any(_is_ours(parent) for parent in _parents(event)):
            continue
        start, ms = event.time_range.start, event.time_range.elapsed_us() / 1e3
        total += ms
        at = bisect.bisect_right(starts, start) - 1
        if at >= 0:
            _, end, name = spans[at]
            found[name].sae_ms += ms
            if start < end:
                found[name].model_ms -= ms
    return found, total


def _is_ours(event: Any) -> bool:
    return event.name.startswith(PREFIX) and event.name.removeprefix(PREFIX) in OPS


def _parents(event: Any) -> Iterator[Any]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def _share(event: Any, costs: dict[str, tuple[int, int]], roof: Roof | None) -> OpShare:
    name = event.key.removeprefix(PREFIX)
    moved, flops = costs.get(name, (0, 0))
    ms = event.cpu_time_total / 1e3
    share = None
    if roof is not None and moved and ms:
        integer = name in ("encode_screened", "matryoshka_linear")
        share = roof.share(ms / 1e3, moved, 0 if integer else flops, flops if integer else 0)
    result = OpShare(name, event.count, ms, moved, flops, share)
    if torch.cuda.is_available():
        result.device_ms = event.device_time_total / 1e3
        if result.device_ms and moved:
            result.achieved_gb_s = moved / result.device_ms / 1e6
        result.modelled_gb_s = _modelled_gb_s(torch.cuda.get_device_name())
    return result


def _modelled_gb_s(name: str) -> float | None:
    """The vendor's bandwidth of the device whose name is in this one, None of one that is not known."""
    from gemmascope_fast.dev.gpu.devices import DEVICES

    words = set(name.replace("-", " ").split())
    return next((d.bandwidth / 1e9 for d in DEVICES if set(d.name.replace("-", " ").split()) <= words), None)


@contextmanager
def _named(layers: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Within the block each module's forward is a range of its own in the profile."""
    open_: dict[str, list[Any]] = {name: [] for name in layers}
    handles = []
    for name, module in layers.items():

        def enter(_m: Any, _a: Any, name: str = name) -> None:
            span = record_function(f"layer {name}")
            span.__enter__()
            open_[name].append(span)

        def leave(_m: Any, _a: Any, _o: Any, name: str = name) -> None:
            open_[name].pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _costs() -> Iterator[dict[str, tuple[int, int]]]:
    """Sums the declared bytes and operations of every call of our ops within the block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    total: dict[str, tuple[int, int]] = {}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.name().removeprefix(PREFIX) if func.namespace == "gemmascope_fast" else None
            if name in OPS:
                cost = OPS[name].cost(*args, **(kwargs or {}))
                before = total.get(name, (0, 0))
                total[name] = (before[0] + cost.bytes, before[1] + cost.flops)
            return func(*args, **(kwargs or {}))

    with Counting():
        yield total


def _peak_memory() -> int | None:
    """The process's peak resident bytes, None where the system does not tell."""
    try:
        return process_memory("VmHWM")
    except OSError:
        return None


# ---- the command ------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="a transformers model or folder; 'demo' is Gemma 3 270M")
    parser.add_argument("--sae", default="demo", help="an SAE's file, folder or repository; 'none' for the model alone")
    parser.add_argument("--sae-id", help="which SAE of a repository")
    parser.add_argument("--layer", type=int, help="default: the SAE's own")
    add_anywhere_argument(parser)
    parser.add_argument("--mode", choices=("observe", "splice", "splice+error"), default="observe")
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated (default: %(default)s)")
    parser.add_argument("--prompt", default="The history of the sea is also a history of trade.")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.pair import load_model, load_pair
    from gemmascope_fast.attach import attach
    from gemmascope_fast.attach.transformers.structure import Structure

    check_outputs(args)
    if args.tokens < 1:
        raise ValueError(f"--tokens: expected at least 1, got {args.tokens}")
    if args.sae == "none":
        model, tokenizer = load_model(args.model)
        attached: Callable[[], Any] = nullcontext
    else:
        model, tokenizer, sae, layer = load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere)
        sae.requires_grad_(False).prepare()
        attached = lambda: attach(model, {layer: sae}, mode=args.mode, tokens="all")  # noqa: E731
    prompt = tokenizer(args.prompt, return_tensors="pt")

    def loop() -> Tensor:
        with attached():
            return model.generate(**prompt, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)

    layers = {str(i): block for i, block in enumerate(Structure(model).stack()[1])}
    head = model.get_output_embeddings()
    if head is not None:
        layers["output head"] = head
    found = profile_loop(loop, layers, args.trace)
    _show(found, args)
    if args.json:
        write_json(args.json, asdict(found))
    return 0


def _time(ms: float, whole: float, shown: bool) -> tuple[str, str]:
    return (f"{ms:.1f}", f"{ms / whole:.1%}") if shown else ("", "")


def _show(found: Profile, args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{args.tokens} tokens in {found.wall_ms:.0f} ms under the profiler, which slows small ops;"
        f" ops of this package {found.sae_ms:.1f} ms ({found.sae_ms / found.wall_ms:.1%});"
        f" peak memory {(found.peak_memory or 0) / 1e9:.2f} GB"
    )
    table = Table("part of the model", "model ms", "share", "SAE ms", "share", title="where the time went")
    outside = found.sae_ms - sum(part.sae_ms for part in found.layers.values())
    rest = found.wall_ms - found.sae_ms - sum(part.model_ms for part in found.layers.values())
    parts = {**found.layers, "all else (embedding, sampling, Python)": LayerShare(rest, outside)}
    for name, part in parts.items():
        cells = ((part.model_ms, True), (part.sae_ms, bool(part.sae_ms)))
        table.add_row(name, *(c for ms, shown in cells for c in _time(ms, found.wall_ms, shown)))
    console.print(table)
    titles = ["op", "calls", "ms", "MB", "Mflop", "roof"]
    on_gpu = any(op.device_ms is not None for op in found.ops)
    gpu = ["GPU ms", "GB/s achieved", "GB/s modelled"] if on_gpu else []
    ops = Table(*titles, *gpu, title="ops of this package")
    for op in found.ops:
        share = "-" if op.roof_share is None else f"{op.roof_share:.0%}"
        cells_ = [op.name, str(op.calls), f"{op.ms:.2f}", f"{op.bytes / 1e6:.1f}", f"{op.flops / 1e6:.1f}", share]
        figures = (op.device_ms, op.achieved_gb_s, op.modelled_gb_s) if on_gpu else ()
        ops.add_row(*cells_, *("-" if f is None else f"{f:.2f}" for f in figures))
    console.print(ops)
    if found.kernels:
        kernels = Table("kernel", "calls", "ms", title="CUDA kernels")
        for kernel in sorted(found.kernels, key=lambda k: -k["ms"])[:30]:
            kernels.add_row(kernel["name"], str(kernel["calls"]), f"{kernel['ms']:.2f}")
        console.print(kernels)
    if args.trace:
        console.print(f"trace: {args.trace} (chrome://tracing or ui.perfetto.dev)")
