"""GPU timings of the kernels, verified first, L2 flushed before each run, with clocks and the modelled roof.

python benchmarks/gpu.py [--json FILE] [--once]
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import loop, register
from gemmascope_fast.dev.bench.cases import GEMMA_SCOPE
from gemmascope_fast.dev.gpu.devices import DEVICES
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.files.results import write_json
from gemmascope_fast.quant.linear import MatryoshkaLinear

D, F = GEMMA_SCOPE.d_in, GEMMA_SCOPE.d_sae
ROWS, COLUMNS, GROUP = 9216, 2304, 32  # a feed-forward matrix of Gemma 2 2B
CUDA_TOKENS = 16  # maximum for the nested product in CUDA C++


def clocks() -> str | None:
    """Current SM and memory clock, temperature and power from nvidia-smi; None if it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def timed(call: Callable[[], Any], flush: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Microseconds by CUDA events; the flush writes four times L2 before each run."""
    for _ in range(3):
        call()
    times = []
    before = clocks()
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    low, median, high = (statistics.quantiles(times, n=10)[i] for i in (0, 4, 8))
    return {"p10": low, "median": median, "p90": high, "clocks_before": before, "clocks_after": clocks()}


def cases(T: int) -> dict[str, Callable[[], Any]]:
    """Calls at T tokens, each held against the native CPU kernel before it is handed out."""
    sae, x = GEMMA_SCOPE.sae, GEMMA_SCOPE.x(T)
    weights = [t.detach() for t in (sae.W_enc, sae.b_enc, sae.threshold)]
    decoder = [t.detach() for t in (sae.W_dec, sae.b_dec)]
    want = ops.encode(x, *weights, None)
    args, device_decoder = [t.cuda() for t in (x, *weights)], [t.cuda() for t in decoder]
    latents = [t.cuda() for t in want]
    found: dict[str, Callable[[], Any]] = {"encode eager": lambda: args[0] @ args[1] + args[2]}
    for backend in ("triton", *(["cuda"] if register.compiled("encode") else [])):

        def encode(backend: str = backend) -> Any:
            with gsf.backend(backend):
                return ops.encode(*args, None)

        def decode(backend: str = backend) -> Any:
            with gsf.backend(backend):
                return ops.decode(*latents, *device_decoder, None)

        if not same_bytes([t.cpu() for t in encode()], want):
            raise AssertionError(f"encode by {backend} at T = {T} differs from the native kernel")
        if not same_bytes([decode().cpu()], [ops.decode(*want, *decoder, None)]):
            raise AssertionError(f"decode by {backend} at T = {T} differs from the native kernel")
        found |= {f"encode {backend}": encode, f"decode {backend}": decode}
    found["encode tensor"] = lambda: ops.encode_tensor(*args)
    if T <= 16:
        found["splice"] = lambda: loop.splice(*args, *device_decoder)
    return found


def nested_cases(T: int, device: str = "cuda") -> dict[str, Callable[[], Any]]:
    """The nested layer at T tokens and 8, 4 and 2 bits, compared with the native CPU kernel; and F.linear in bf16."""
    g = torch.Generator().manual_seed(2)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight = torch.nn.Parameter(torch.randn(ROWS, COLUMNS, generator=g) / COLUMNS**0.5, requires_grad=False)
    x = torch.randn(T, COLUMNS, generator=g)
    there = x.to(device)
    half, weight = there.bfloat16(), linear.weight.to(device, torch.bfloat16)
    found: dict[str, Callable[[], Any]] = {"linear eager bf16": lambda: torch.nn.functional.linear(half, weight)}
    backends = ["triton"] if device == "cuda" else ["native"]
    if T <= CUDA_TOKENS and device == "cuda" and register.compiled("matryoshka_linear"):
        backends.append("cuda")
    for bits in (8, 4, 2):
        layer = MatryoshkaLinear.from_linear(linear, group_size=GROUP, bits=bits)
        want = layer(x)
        layer = layer.to(device)
        for backend in backends:

            def call(layer: MatryoshkaLinear = layer, backend: str = backend) -> Any:
                with gsf.backend(backend):
                    return layer(there)

            # the integers are the same; scaled sums of groups may be added in another order
            torch.testing.assert_close(call().cpu(), want, rtol=1e-4, atol=1e-4)
            found[f"linear {bits} bits {backend}"] = call
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--once", action="store_true", help="one call of each, for a profiler")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: expected a CUDA device, found none", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(4 * max(properties.L2_cache_size, 1 << 20), dtype=torch.int8, device="cuda")
    rows = []
    for T in (1, 4, 16, 256, 1024):
        for make, shape in ((cases, (D, F)), (nested_cases, (COLUMNS, ROWS))):
            for name, call in make(T).items():
                if options.once:
                    call()
                else:
                    rows.append({"call": name, "T": T, "d_in": shape[0], "d_out": shape[1], **timed(call, flush, 30)})
                    print(f"{name:22} T {T:5} {rows[-1]['median']:9.1f} us")
    torch.cuda.synchronize()
    if options.json:
        report = {
            "device": properties.name,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "version": gsf.__version__,
            "l2_flushed_bytes": flush.numel(),
            "model_devices": [vars(d) for d in DEVICES],
            "microseconds": rows,
        }
        write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
