"""What kernels executed, for the models of gemmascope_fast/dev/gpu/model.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ptx_library import LISTENERS, Counts, opcode, options

from gemmascope_fast.dev.gpu.model import Executed


@contextlib.contextmanager
def executed() -> Iterator[dict[str, Executed]]:
    """Within it every launch is counted; the dict has the sums by kernel.

    with executed() as kernels:
        encode.encode(x, W_enc, b_enc, threshold)
    kernels["encode_kernel"].sectors_per_request
    """
    found: dict[str, Executed] = {}

    def listen(label: str, text: str, counts: list[Counts]) -> None:
        kernel = label.split(" ")[0]
        found[kernel] = added(found.get(kernel, Executed()), of(counts))

    LISTENERS.append(listen)
    try:
        with options(counts=True):
            yield found
    finally:
        LISTENERS.remove(listen)


def added(a: Executed, b: Executed) -> Executed:
    return Executed(*(x + y for x, y in zip(a, b, strict=True)))


def of(counts: list[Counts]) -> Executed:
    """The sums of one launch.  Asynchronous copies count as global accesses alone."""
    out = dict.fromkeys(Executed._fields, 0)
    for c in counts:
        name = opcode(c.text)
        out["instructions"] += c.warps
        if name.startswith("fma.rn.f32"):
            out["fma"] += c.lanes
        if ".global" in name:
            out["global_requests"] += c.requests
            out["global_bytes"] += c.bytes
            out["sectors"] += c.sectors
        elif ".shared" in name:
            out["shared_requests"] += c.requests
            out["wavefronts"] += c.wavefronts
            out["ideal_wavefronts"] += c.ideal
    return Executed(**out)
