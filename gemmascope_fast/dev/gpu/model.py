"""Modelled time of whole calls on named devices: launches in a row, each at its roof.  A model, not a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gemmascope_fast.dev.gpu import nvcc
from gemmascope_fast.dev.gpu.devices import DEVICES, Device, roof_time
from gemmascope_fast.dev.gpu.specs import L0, OUT, D, F, KernelSpec, all_specs


class CudaWork(NamedTuple):
    """What a kernel of csrc/cuda moves and computes; as a KernelSpec has it."""

    bytes: int
    ops: int
    kind: str = "fp32"


def loops() -> list[dict[str, Any]]:
    """Per device: encode, decode and the fused loop of one token, against the least that any kernel could take."""
    specs = {s.label: s for s in all_specs()}
    fused = [CudaWork(*nvcc.cost(name)) for name in ("encode_few<1, true, float>", "splice_few<float>")]
    rows = []
    for device in DEVICES:
        rows.append(_row(device, "encode exact, T 1", [specs["encode exact, T 1"], specs["gather, T 1"]], 4 * D * F))
        names: tuple[str, ...] = ("digits, T 1", "screen int8, T 1", "refine, T 1", "gather, T 1")
        rows.append(_row(device, "encode screened, T 1", [specs[n] for n in names], D * F))
        names = ("encode exact, T 1", "gather, T 1", "splice, T 1")
        rows.append(_row(device, "fused loop in Triton, T 1", [specs[n] for n in names], 4 * D * (F + L0)))
        rows.append(_row(device, "fused loop in CUDA C++, T 1", fused, 4 * D * (F + L0)))
        for bits in (8, 4, 2):
            nested = [CudaWork(*nvcc.cost(name)) for name in ("round_token", f"matryoshka_few<{bits}, 1, true>")]
            name = f"matryoshka_linear in CUDA C++, {bits} bits, T 1"
            rows.append(_row(device, name, nested, OUT * D * bits // 8))
            weights = [specs[f"matryoshka_dequantize {bits} bits"]]
            rows.append(_row(device, f"matryoshka_dequantize, {bits} bits", weights, OUT * D * bits // 8 + 4 * OUT * D))
        rows.append(_row(device, "decode fp32, N 1", [specs["decode fp32, N 1"]], 4 * L0 * D))
    return rows


def _row(device: Device, name: str, parts: Sequence[KernelSpec | CudaWork], floor_bytes: int) -> dict[str, Any]:
    """`ratio`: modelled kernel time over the time that the weights alone take at full bandwidth, without launches."""
    kernels = sum(roof_time(device, s.bytes, s.ops, s.kind) for s in parts)
    floor = floor_bytes / device.bandwidth
    return {
        "call": name,
        "device": device.name,
        "launches": len(parts),
        "model_kernel_microseconds": kernels * 1e6,
        "model_with_launches_microseconds": (kernels + len(parts) * device.launch) * 1e6,
        "model_floor_microseconds": floor * 1e6,
        "model_ratio": kernels / floor,
    }
