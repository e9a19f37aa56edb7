"""`MatryoshkaLinear` at 8, 4 and 2 bits compared with bf16 `F.linear` and torch's own 8- and 4-bit products.

    python benchmarks/bench_matryoshka.py [--shape 9216x2304] [--tokens 1,4,16,64] [--json FILE]

All peers take turns in one process, so that a busy machine slows all of them equally; each is verified before timing.
For up to 16 tokens every call reads another copy of the weights, and the copies together exceed four times the
last-level cache.  The roof, this machine's read bandwidth, is measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gemmascope_fast.dev import roof
from gemmascope_fast.dev.bench import peers
from gemmascope_fast.dev.bench.cases import copy_count
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.dev.bench.timing import interleave, paired, percentiles_ms
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.planes import Packed

OURS = (8, 4, 2)  # bits
BASE = "bf16 F.linear"
Layer = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """How to make one more copy of a layer, the bytes of its weights, the dtype of its input, and the allowed relative
    error of its product against that of `exact`: its own weights and activations as rounded, or None for those
    before rounding."""

    make: Callable[[], Layer]
    nbytes: int
    dtype: torch.dtype
    allowed: float
    exact: Callable[[Layer, Tensor], Tensor] | None = None


def rounded_product(layer: Any, x: Tensor) -> Tensor:
    """The exact result of `MatryoshkaLinear`: int8 activations times the weights that it uses, in fp64."""
    step = x.abs().amax(1, keepdim=True) / 127
    return ((x / step).round() * step).double() @ layer.weight.double().t()


def peers_of(weight: Tensor, group_size: int | None) -> dict[str, Peer]:
    """One weight matrix [out, in] in every form that is timed; each returns [T, out]."""
    codes, half = quantize(weight, group_size), weight.bfloat16()
    found = {}
    for bits in OURS:
        held = Packed.of(codes).prefix(bits)

        def make(held: Packed = held, bits: int = bits) -> Layer:
            planes = tuple(p.clone() for p in held.planes)
            return MatryoshkaLinear(Packed(planes, held.scale, held.zero_point, *weight.shape, group_size, bits))

        found[f"ours {bits} bit"] = Peer(make, held.nbytes(), torch.float32, 1e-5, rounded_product)

    def linear() -> Layer:
        own = half.clone()
        return lambda x: torch.nn.functional.linear(x, own)

    # Gaussian rows reach four times their spread, so a step of the grid is 4 / levels of it, and its error a third
    found[BASE] = Peer(linear, 2 * weight.numel(), torch.bfloat16, 2 / 2**8)
    found["int8pack_mm"] = Peer(lambda: peers.int8_packed(weight), weight.numel(), torch.bfloat16, 2 / 2**7)
    found["int_mm"] = Peer(lambda: peers.int_mm(weight), weight.numel(), torch.float32, 2 / 2**7)
    if weight.shape[1] % 128 == 0:
        size = weight.numel() // 2 + 4 * weight.numel() // 128
        found["int4pack_mm"] = Peer(lambda: peers.int4_packed(weight, 128), size, torch.bfloat16, 2 / 2**3)
    return found


def verify(name: str, peer: Peer, layer: Layer, x: Tensor, weight: Tensor) -> None:
    """Raises AssertionError if the error of the product is larger than the peer's rounding explains."""
    exact = x.double() @ weight.double().t() if peer.exact is None else peer.exact(layer, x)
    error = float((layer(x.to(peer.dtype)).double() - exact).norm() / exact.norm())
    assert error <= peer.allowed, f"{name}: relative error {error:.2g}, expected at most {peer.allowed:.2g}"


def measure(weight: Tensor, found: dict[str, Peer], tokens: int, seconds: float) -> dict[str, dict[str, float]]:
    """Results of each for this number of tokens: median, p20, p80 in ms, times faster than bf16, bytes."""
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(tokens))
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, peer in found.items():
        layers, own = [peer.make() for _ in range(copy_count(peer.nbytes, tokens))], x.to(peer.dtype)
        verify(name, peer, layers[0], x, weight)
        following = itertools.cycle(layers).__next__
        calls[name] = lambda following=following, own=own: following()(own)
    times = interleave(calls, seconds)
    figures: dict[str, dict[str, float]] = {}
    for name, own in times.items():
        median, p20, p80 = percentiles_ms(own)
        ratio = paired(times[BASE], own).median
        figures[name] = {"ms": median, "p20": p20, "p80": p80, "vs_bf16": ratio, "bytes": found[name].nbytes}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="9216x2304", help="out x in (default: %(default)s)")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each number of tokens")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, columns = (int(n) for n in args.shape.split("x"))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    found, roofs = peers_of(weight, args.group_size), roof.measure()
    report: dict[str, Any] = {
        "machine": {**describe(torch.get_num_threads()), "roof": asdict(roofs)},
        "shape": [rows, columns],
        "group_size": args.group_size,
        "tokens": {},
    }
    machine = report["machine"]
    print(f"{machine['processor']}, {machine['threads']} threads, {machine['isa']}; reads {roofs.read_gb_s:.1f} GB/s")
    with torch.inference_mode():
        for tokens in map(int, args.tokens.split(",")):
            report["tokens"][tokens] = measure(weight, found, tokens, args.seconds)
            show(tokens, report["tokens"][tokens], roofs.read_gb_s)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show(tokens: int, figures: dict[str, dict[str, float]], roof_gb_s: float) -> None:
    print(f"T = {tokens}")
    for name, figure in figures.items():
        rate = figure["bytes"] / figure["ms"] / 1e6
        print(
            f"  {name:16} {figure['ms']:8.3f} ms   {figure['vs_bf16']:6.2f}x bf16"
            f"   {rate:6.1f} GB/s = {100 * rate / roof_gb_s:3.0f} % of the roof"
        )


if __name__ == "__main__":
    main()
