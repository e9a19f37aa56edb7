"""Architectures and devices as their vendors describe them: what limits a kernel, and the roof a model stands on.

Sources: NVIDIA's CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability", and the data
sheets of A100 SXM 80 GB, H100 SXM, B200 and RTX 4090 (dense peaks); AMD's CDNA3 ISA guide for gfx942.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """Limits of one compute unit.  `register_unit`: registers are handed out to a warp in multiples of it."""

    name: str
    warp: int
    warps: int  # resident on one unit
    blocks: int
    registers: int  # 32-bit, per unit
    register_unit: int
    shared: int  # bytes per unit
    shared_block: int  # bytes one block may take
    shared_reserved: int  # bytes that each block costs beside its own


ARCHS = {
    a.name: a
    for a in (
        Arch("sm_80", 32, 64, 32, 65536, 256, 164 << 10, 163 << 10, 1024),
        Arch("sm_86", 32, 48, 16, 65536, 256, 100 << 10, 99 << 10, 1024),
        Arch("sm_90", 32, 64, 32, 65536, 256, 228 << 10, 227 << 10, 1024),
        Arch("sm_100", 32, 64, 32, 65536, 256, 228 << 10, 227 << 10, 1024),
        Arch("sm_120", 32, 48, 24, 65536, 256, 100 << 10, 99 << 10, 1024),
        # 4 SIMDs of 512 x 64 vector registers (accumulation registers are the same file), 8 waves each
        Arch("gfx942", 64, 32, 32, 4 * 512 * 64, 8 * 64, 64 << 10, 64 << 10, 0),
    )
}


def occupancy(arch: Arch, warps: int, registers: int, shared: int) -> float:
    """Share of a unit's warps that are resident, from registers a thread and shared bytes a block; an estimate."""
    per_warp = -(-registers * arch.warp // arch.register_unit) * arch.register_unit
    by_registers = arch.registers // max(1, per_warp) // warps
    by_shared = arch.shared // max(1, shared + arch.shared_reserved)
    blocks = min(arch.blocks, arch.warps // warps, by_registers, by_shared)
    return blocks * warps / arch.warps


@dataclass(frozen=True)
class Device:
    """One device's roof.  bandwidth in bytes/s; peaks in operations/s, dense, a multiply-add being two.

    int32: instructions/s of 64 lanes a multiprocessor (the guide's table of arithmetic throughput; shifts, logic and
    dp4a alike), at the clock of the fp32 peak.
    """

    name: str
    arch: str  # whose binary it runs
    bandwidth: float
    fp32: float
    tf32: float
    bf16: float
    int8: float
    int32: float
    units: int  # multiprocessors
    lanes: int  # fp32 lanes of one
    launch: float = 3e-6  # seconds that a dependent launch costs

    @property
    def clock(self) -> float:
        """The clock in Hz that the fp32 peak stands on."""
        return self.fp32 / (2 * self.units * self.lanes)


DEVICES = (
    Device("A100", "sm_80", 2.039e12, 19.5e12, 156e12, 312e12, 624e12, 9.75e12, 108, 64),
    Device("H100", "sm_90", 3.35e12, 67e12, 494e12, 989e12, 1979e12, 16.75e12, 132, 128),
    Device("B200", "sm_100", 8.0e12, 75e12, 1125e12, 2250e12, 4500e12, 18.75e12, 148, 128),
    Device(
        "RTX 4090", "sm_86", 1.008e12, 82.6e12, 82.6e12, 165e12, 661e12, 20.6e12, 128, 128
    ),  # sm_89 runs sm_86 binaries
)


def roof_time(device: Device, bytes: int, ops: int, kind: str) -> float:
    """Model, in seconds: the larger of traffic at full bandwidth and operations at full peak; no launch."""
    return max(bytes / device.bandwidth, ops / getattr(device, kind))


def model_times(arch: str, bytes: int, ops: int, kind: str) -> dict[str, float]:
    """Model, in microseconds, by name of the devices that run this architecture's binary."""
    return {d.name: roof_time(d, bytes, ops, kind) * 1e6 for d in DEVICES if d.arch == arch}
