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


class Executed(NamedTuple):
    """What a kernel executed, as the PTX interpreter counts it (tests/ptx/ptx_counts.py); instructions of a warp."""

    instructions: int = 0
    fma: int = 0  # of fp32, by lane
    global_requests: int = 0
    global_bytes: int = 0  # that lanes asked for
    sectors: int = 0  # of 32 bytes, summed over requests
    shared_requests: int = 0
    wavefronts: int = 0  # passes over the banks of shared memory
    ideal_wavefronts: int = 0  # the fewest that the words need

    @property
    def sectors_per_request(self) -> float:
        return self.sectors / max(1, self.global_requests)

    @property
    def bank_conflicts(self) -> float:
        """Passes over the banks for each that was needed; 1 is none."""
        return self.wavefronts / max(1, self.ideal_wavefronts)


def executed_times(device: Device, work: Executed, bytes: int) -> dict[str, float]:
    """Model, in seconds: what each part of the device needs alone; the kernel takes at least the largest.

    issue: four warp instructions a multiprocessor and clock, PTX instructions standing for machine instructions;
    shared: one wavefront a multiprocessor and clock; memory: `bytes`, which memory must deliver at least once.
    """
    return {
        "issue": work.instructions / (4 * device.units * device.clock),
        "shared": work.wavefronts / (device.units * device.clock),
        "memory": bytes / device.bandwidth,
    }


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
