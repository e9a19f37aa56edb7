"""`MatryoshkaLinear` at 8, 4 and 2 bits against bf16 `F.linear` and torch's own 8- and 4-bit products.

    python benchmarks/bench_matryoshka.py [--shape 9216x2304] [--tokens 1,4,16,64] [--json FILE]

All peers take turns in one process, so that a busy machine slows them alike; each is verified before it is timed.
For up to 16 tokens every call reads another copy of the weights, out of enough copies to exceed four times the
last-level cache.  The roof, this machine's read bandwidth, is measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import backends
from gemmascope_fast.bench.cases import copy_count
from gemmascope_fast.matryoshka import MatryoshkaLinear, Packed, quantize

WIDTHS = (8, 4, 2)
Call = Callable[[], Tensor]


def rotate(make: Callable[[], Any], nbytes: int, tokens: int) -> Callable[[], Any]:
    """Each call gives the next of enough weights to miss the cache."""
    return itertools.cycle([make() for _ in range(copy_count(nbytes, tokens))]).__next__


class Peers:
    """One weight matrix [out, in] in every form that is timed; each peer gives [T, out]."""

    def __init__(self, rows: int, columns: int, group_size: int | None) -> None:
        self.weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
        self.codes = quantize(self.weight, group_size)
        self.group_size = group_size

    def ours(self, bits: int, x: Tensor) -> tuple[Call, int]:
        held = Packed.of(self.codes).prefix(bits)

        def make() -> MatryoshkaLinear:
            planes = tuple(p.clone() for p in held.planes)
            own = Packed(planes, held.scale, held.zero_point, *self.weight.shape, self.group_size, bits)
            return MatryoshkaLinear(own)

        layer = make()
        rounded = (x / (s := x.abs().amax(1, keepdim=True) / 127)).round() * s
        verify(layer(x), rounded.double() @ layer.weight.double().t(), 1e-5, f"ours, {bits} bits")
        following = rotate(make, held.nbytes(), x.shape[0])
        return lambda: following()(x), held.nbytes()

    def bf16(self, x: Tensor) -> tuple[Call, int]:
        y, weight = x.bfloat16(), self.weight.bfloat16()
        verify(torch.nn.functional.linear(y, weight), x.double() @ self.weight.double().t(), 2e-2, "bf16")
        following = rotate(weight.clone, 2 * weight.numel(), x.shape[0])
        return lambda: torch.nn.functional.linear(y, following()), 2 * weight.numel()

    def int8pack(self, x: Tensor) -> tuple[Call, int]:
        scale = self.weight.abs().amax(1) / 127
        code = (self.weight / scale[:, None]).round().to(torch.int8)
        y, s = x.bfloat16(), scale.bfloat16()
        verify(torch._weight_int8pack_mm(y, code, s), x.double() @ self.weight.double().t(), 3e-2, "int8pack")
        following = rotate(code.clone, code.numel(), x.shape[0])
        return lambda: torch._weight_int8pack_mm(y, following(), s), code.numel()

    def int4pack(self, x: Tensor) -> tuple[Call, int]:
        rows, columns = self.weight.shape
        group = 128
        grouped = self.weight.reshape(rows, -1, group)
        scale = grouped.abs().amax(-1).clamp(min=1e-8) / 7
        code = ((grouped / scale[..., None]).round() + 8).clamp(0, 15).to(torch.int32).reshape(rows, columns)
        packed = torch._convert_weight_to_int4pack_for_cpu(code, 1)
        zeros = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().bfloat16()
        y = x.bfloat16()
        product = torch._weight_int4pack_mm_for_cpu(y, packed, group, zeros)
        level = ((code - 8).reshape(grouped.shape) * scale[..., None]).reshape(rows, columns)
        verify(product, x.double() @ level.double().t(), 3e-2, "int4pack")
        following = rotate(packed.clone, packed.numel() * packed.element_size(), x.shape[0])
        size = packed.numel() * packed.element_size() + 2 * zeros.numel()
        return lambda: torch._weight_int4pack_mm_for_cpu(y, following(), group, zeros), size

    def int_mm(self, x: Tensor) -> tuple[Call, int]:
        code = (self.weight / self.weight.abs().max() * 127).round().to(torch.int8)
        y = (x / x.abs().max() * 127).round().to(torch.int8)
        assert torch.equal(torch._int_mm(y, code.t()), (y.long() @ code.long().t()).int())
        following = rotate(code.clone, code.numel(), x.shape[0])
        return lambda: torch._int_mm(y, following().t()), code.numel()

    def all(self, x: Tensor) -> dict[str, tuple[Call, int]]:
        found = {f"ours {bits} bit": self.ours(bits, x) for bits in WIDTHS}
        others = {"bf16 F.linear": self.bf16, "int8pack_mm": self.int8pack, "int_mm": self.int_mm}
        if self.weight.shape[1] % 128 == 0:
            others["int4pack_mm"] = self.int4pack
        return found | {name: make(x) for name, make in others.items()}


def verify(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    """Relative error of the whole product; the tolerance is the operands' rounding (2^-8 in bf16, 1/254 in int8)."""
    error = float((got.double() - want).norm() / want.norm())
    assert error <= tolerance, f"{name}: relative error {error}, expected at most {tolerance}"


def interleaved(calls: dict[str, Call], seconds: float, least: int = 15) -> dict[str, list[float]]:
    """Seconds a call, every peer in turn, until the time is up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second of summing 512 MiB of fp32 on all threads: the best of several passes."""
    data = torch.ones(1 << 27)
    best = min(interleaved({"sum": data.sum}, seconds, 5)["sum"])
    return data.numel() * 4 / best


def percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    at = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {name: ordered[int(q * (len(ordered) - 1))] for name, q in at.items()} | {"rounds": len(ordered)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="9216x2304", help="out x in (default: %(default)s)")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each number of tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, columns = (int(n) for n in args.shape.split("x"))
    peers = Peers(rows, columns, args.group_size)
    roof = read_bandwidth()
    report: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "isa": backends.isa()},
        "torch": torch.__version__,
        "shape": [rows, columns],
        "group_size": args.group_size,
        "read_bandwidth": roof,
        "tokens": {},
    }
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {backends.isa()}; reads {roof / 1e9:.1f} GB/s")
    with torch.inference_mode():
        for tokens in map(int, args.tokens.split(",")):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
            found = peers.all(x)
            times = interleaved({name: call for name, (call, _) in found.items()}, args.seconds)
            figures = {n: percentiles(t) | {"bytes": found[n][1]} for n, t in times.items()}
            report["tokens"][tokens] = figures
            show(tokens, figures, roof)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(tokens: int, figures: dict[str, Any], roof: float) -> None:
    base = figures["bf16 F.linear"]["p50"]
    print(f"T = {tokens}")
    for name, figure in figures.items():
        rate = figure["bytes"] / figure["p50"]
        print(
            f"  {name:16} {1e3 * figure['p50']:8.3f} ms   {base / figure['p50']:6.2f}x bf16"
            f"   {rate / 1e9:6.1f} GB/s = {100 * rate / roof:3.0f} % of the roof"
        )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
