"""Removes every barrier, fence and wait of the compiled kernels in turn: the checks or the results must notice.

    python tests/ptx/mutations.py            sm_80: Triton's kernels, and those of csrc/cuda where nvcc is installed
    python tests/ptx/mutations.py 90         Triton's kernels for sm_90

Prints a line a kernel and ends with status 1 where a removal that is not listed in HARMLESS is not noticed.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import ptx_triton  # noqa: E402  before anything imports triton

ARCH = int(sys.argv[1]) if __name__ == "__main__" and len(sys.argv) > 1 else 80
ptx_triton.install(ARCH)

import torch  # noqa: E402
from ptx_library import LISTENERS, PtxFault, options  # noqa: E402

from gemmascope_fast import ops  # noqa: E402
from gemmascope_fast.backends.gpu import decode, encode, loop, matryoshka, planes, screen, tensor  # noqa: E402
from gemmascope_fast.dev.testing import same_bytes  # noqa: E402
from gemmascope_fast.ops.codes import quantize  # noqa: E402
from gemmascope_fast.quant.planes import Packed  # noqa: E402

# An instruction that orders something.
ORDERS = re.compile(
    r"^[ \t]*((?:bar|barrier)\.\S+|cp\.async\.wait\S+|fence\.\S+|wgmma\.(?:fence|wait)\S+)[^;\n]*;", re.M
)
SEEDS = (1, 2, 3)


class Harmless(NamedTuple):
    """A removal that changes nothing: in kernels whose label matches, instructions that match, at most so many."""

    kernel: str
    instruction: str
    most: int
    reason: str
    archs: tuple[int, ...] = (80, 90)


DRAINED = (
    "after the loop Triton waits for copies that nobody reads: those of the last step were waited for inside it,"
    " those beyond the last are of no bytes, and the kernel uses no shared memory afterwards"
)
BETWEEN = (
    "the barrier after the codes are stored, later in the same step, also stands between the reads of a step's copies"
    " and the next copies to their place"
)
STAGES = (
    "the copies after it go to the stage of the tokens that no product reads;"
    " the codes are stored behind another barrier"
)
TWICE = (
    "it stands between the two products of a step, which read the same memory and add to different registers: what"
    " comes before the first holds for the second, and the wait after the second is for both"
)
HARMLESS = [
    Harmless(r"screen_kernel .*BT=64", r"wgmma\.(wait|fence)|bar\.sync|fence\.proxy", 4, TWICE, (90,)),
    Harmless(r"matryoshka_linear_kernel groups=1 .*BT=64", r"bar\.sync", 1, STAGES, (90,)),
    Harmless(r"matryoshka_linear_kernel group_units=1 .*BT=64", r"bar\.sync", 2, f"{BETWEEN}; {STAGES}", (90,)),
    Harmless(r"matryoshka_linear_kernel groups=1 .*BT=16", r"cp\.async\.wait_group|bar\.sync", 2, DRAINED),
    Harmless(r"matryoshka_linear_kernel group_units=1 ", r"bar\.sync", 1, BETWEEN),
]


class Case(NamedTuple):
    name: str
    call: Callable[[], Any]


def problem(T: int, d: int = 200, F: int = 96) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(T + d)
    x, rows = torch.randn(T, d, generator=g), torch.randn(F, d, generator=g) / d**0.5
    return x, rows.t(), torch.randn(F, generator=g) * 0.1, torch.full((F,), 0.3)


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in flat(part)]


def nested(T: int, bits: int, group: int | None = None) -> Callable[[], Any]:
    g = torch.Generator().manual_seed(T + bits)
    packed = Packed.of(quantize(torch.randn(64, 200, generator=g) * 0.05, group), "prefix")
    x = torch.randn(T, 200, generator=g)
    args = (x, list(packed.read(bits)), packed.scale, packed.zero_point, None, None, None, None, 64, group or 0)
    return lambda: matryoshka.matryoshka_linear(*args, bits, 0, False)


def screened(T: int) -> Callable[[], Any]:
    x, W, b, theta = problem(T)
    made = ops.screen_rows(W, b, theta, None, True)
    return lambda: screen.encode_screened(x, W, b, theta, *made, None)[:3]


def decoded(N: int) -> Callable[[], Any]:
    x, W, b, theta = problem(N)
    csr = ops.encode(x, W, b, theta, None)
    return lambda: decode.decode(*csr, W.t().contiguous(), torch.ones(200))


def tensor_cores(T: int, dtype: torch.dtype) -> Callable[[], Any]:
    x, W, b, theta = (t.to(dtype) for t in problem(T))
    return lambda: tensor.encode_tensor(x, W, b, theta)


def spliced() -> Callable[[], Any]:
    x, W, b, theta = problem(3)
    edits = loop.EditTable.of((), 96)
    return lambda: loop.splice(x, W, b, theta, W.t().contiguous(), torch.ones(200), edits, False, 50)[0]


def sampled() -> Callable[[], Any]:
    x, W, b, _ = problem(5)
    crow, col, _ = ops.encode(x, W, b + 9, b, None)  # every feature: more than one step of a program
    return lambda: decode.sampled_dot(x, W.t().contiguous(), b, crow, col)


def of_planes() -> Callable[[], Any]:
    codes = torch.randint(0, 256, (40, 200), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = Packed.of(quantize(torch.randn(40, 200), 32), "prefix")
    return lambda: (
        planes.matryoshka_pack(codes, 8),
        planes.matryoshka_slice(list(packed.planes), 40, 200, 8, 0),
        planes.matryoshka_dequantize(list(packed.planes), packed.scale, packed.zero_point, 40, 200, 32, 8, 0),
    )


def cases() -> Iterator[Case]:
    for T in (1, 4, 18):
        args = problem(T)
        yield Case(f"encode, T {T}", lambda args=args: encode.encode(*args))
        yield Case(f"encode screened, T {T}", screened(T))
    many = problem(2, 64, 192)
    yield Case("encode, every feature", lambda: encode.encode(many[0], many[1], many[2] + 9, many[3]))
    for T, dtype in ((3, torch.bfloat16), (70, torch.bfloat16), (70, torch.float16), (70, torch.float32)):
        yield Case(f"encode on tensor cores, T {T}, {dtype}", tensor_cores(T, dtype))
    for N in (1, 40):
        yield Case(f"decode, N {N}", decoded(N))
    yield Case("splice", spliced())
    yield Case("sampled dot", sampled())
    for T, bits, group in ((8, 4, None), (8, 8, 32), (70, 4, None), (70, 8, 32)):
        yield Case(f"nested linear, T {T}, {bits} bits, groups of {group}", nested(T, bits, group))
    yield Case("planes", of_planes())


def cuda_cases() -> Iterator[Case]:
    import ptx_cuda

    ptx_cuda.install()
    host = ptx_cuda.PtxLibrary()
    for T in (1, 3, 8, 33):
        args = problem(T, 70)
        yield Case(f"CUDA encode, T {T}", lambda args=args: host.encode(*args))
    every = problem(2, 20, 32 * 260)
    yield Case("CUDA encode, every feature", lambda: host.encode(every[0], every[1], every[2] + 9, every[3]))
    x, W, b, theta = problem(3, 70, 320)
    csr = ops.encode(x, W, b + 9, theta, None)  # every feature: more than one stage of a block
    rows = W.t().contiguous()
    yield Case("CUDA decode", lambda: host.decode(*csr, rows, torch.ones(70)))
    table = (torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    wide = problem(2, 33, 32 * 300)
    dec = wide[1].t().contiguous()
    yield Case("CUDA splice", lambda: host.splice(*wide, dec, torch.ones(33), table, False)[0])
    for T, group in ((1, None), (3, None), (2, 32)):
        g = torch.Generator().manual_seed(T)
        packed = Packed.of(quantize(torch.randn(20, 2100, generator=g) * 0.05, group), "prefix")
        args = (torch.randn(T, 2100, generator=g), list(packed.read(4)), packed.scale, packed.zero_point, None, None)
        yield Case(f"CUDA nested linear, T {T}, groups of {group}",
                   lambda args=args, group=group: host.matryoshka_linear(*args, 20, group or 0, 4, 0))  # fmt: skip


def outcome(case: Case, want: list[torch.Tensor]) -> str | None:
    """What noticed, None where nothing did."""
    try:
        got = flat(case.call())
    except PtxFault as fault:
        return str(fault).split(": ", 1)[1][:60]
    except (RuntimeError, IndexError, ValueError) as error:  # of what came out
        return type(error).__name__
    return None if len(got) == len(want) and same_bytes(got, want) else "wrong bytes"


def kernels_of(case: Case) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Its result, and the PTX of every kernel that it launches by label."""
    found: dict[str, str] = {}
    listener = lambda label, text, counts: found.setdefault(text, label)  # noqa: E731
    LISTENERS.append(listener)
    try:
        want = [t.clone() for t in flat(case.call())]
    finally:
        LISTENERS.remove(listener)
    return want, found


def without(text: str, at: re.Match) -> str:
    return text[: at.start(1)] + text[at.end() :]


def excused(label: str, instruction: str) -> Harmless | None:
    return next(
        (
            h
            for h in HARMLESS
            if ARCH in h.archs and re.search(h.kernel, label) and re.search(h.instruction, instruction)
        ),
        None,
    )


def check(case: Case, seen: set[str]) -> list[str]:
    """The removals that nobody notices and that are not excused."""
    want, found = kernels_of(case)
    missed = []
    for text, label in found.items():
        if text in seen:
            continue
        seen.add(text)
        sites = list(ORDERS.finditer(text))
        reached, excuses = 0, {}
        for site in sites:
            broken, used = without(text, site), []
            rewrite = lambda t, text=text, broken=broken, used=used: used.append(1) or broken if t == text else t  # noqa: E731
            for seed in SEEDS:
                with options(rewrite=rewrite, seed=seed):
                    noticed = outcome(case, want)
                if noticed is not None:
                    break
            reached += noticed is not None
            if noticed is None:
                excuse = excused(label, site[1])
                if excuse is not None:
                    excuses[excuse] = excuses.get(excuse, 0) + 1
                if excuse is None or excuses[excuse] > excuse.most:
                    line = text.count("\n", 0, site.start(1)) + 1
                    missed.append(f"{case.name}: {label}: line {line}: {site[1]} was removed and nothing noticed")
        print(
            f"{case.name}: {label[:60]}: {reached} of {len(sites)} noticed, {sum(excuses.values())} harmless",
            flush=True,
        )
    return missed


def main() -> int:
    chosen = list(cases())
    if ARCH == 80 and shutil.which("nvcc"):
        chosen += cuda_cases()
    seen: set[str] = set()
    missed = [line for case in chosen for line in check(case, seen)]
    print("\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
