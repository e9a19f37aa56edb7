"""Where the time of a real loop goes, by torch.profiler, with every op of this package named."""

from __future__ import annotations

import bisect
import gzip
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gemmascope_fast import backends
from gemmascope_fast.dev.bench.machine import process_memory
from gemmascope_fast.dev.roof import Roof, measure
from gemmascope_fast.files.atomic import make_folder, replacing
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
    """Runs `loop` twice: first to warm up and to count the cost that our ops declare, then profiled.

    `layers` are the modules whose time is reported separately, in the order in which they run, none nested.
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
        make_folder(trace.parent)
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
    """(each part's share, total time of our ops).  An op within another of ours is not counted twice.

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
    """The vendor's bandwidth of the device with this name; None for an unknown device."""
    from gemmascope_fast.dev.gpu.devices import DEVICES

    words = set(name.replace("-", " ").split())
    return next((d.bandwidth / 1e9 for d in DEVICES if set(d.name.replace("-", " ").split()) <= words), None)


@contextmanager
def _named(layers: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Within the block each module's forward is a named range in the profile."""
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
    """The process's peak resident memory in bytes; None if the system does not report it."""
    try:
        return process_memory("VmHWM")
    except OSError:
        return None
