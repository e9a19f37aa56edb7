"""Every Triton kernel in every configuration it is launched in, with what one call moves and computes.

The cost is that of a Gemma 2 2B residual SAE: 2304 x 16,384, fp32 rows, L0 80, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemmascope_fast.backends.gpu import decode, encode, loop, matryoshka, planes, screen, tensor
from gemmascope_fast.ops._planes import WIDTHS

D, F, L0 = 2304, 16_384, 80
WORDS = F // 32


@dataclass(frozen=True)
class KernelSpec:
    """One compilation.  `args`: Triton types by argument; `aligned`: integers known to be multiples of 16."""

    label: str
    module: str
    function: str
    args: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    bytes: int
    ops: int
    kind: str  # of the operations: fp32, tf32, bf16 (fp16 too) or int8
    bandwidth_bound: bool
    aligned: tuple[str, ...] = field(default=("d", "words"))
    few_warps: str = ""  # why fewer warps a unit than the gate asks for are right; a kernel without a reason is gated


def _types(pointers: Mapping[str, str], integers: str, **more: str) -> dict[str, str]:
    return {
        **{f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()},
        **dict.fromkeys(integers.split(), "i32"),
        **more,
    }


def encode_specs() -> list[KernelSpec]:
    types = _types(
        {
            "x": "fp32",
            "w": "fp32",
            "bias": "fp32",
            "threshold": "fp32",
            "bitmap": "i32",
            "count": "i32",
            "slot": "fp32",
        },
        "T F d words",
        half_bandwidth="fp32",
    )
    specs = []
    for T in (1, 4, 16, 1024):
        c = encode.config_for(T)
        left = T * (WORDS * 8 + L0 * 4)
        for name, band in (("", False), (", bandwidth", True)):
            specs.append(
                KernelSpec(
                    f"encode exact, T {T}{name}", "encode", "encode_kernel", types,
                    {"HAS_BANDWIDTH": band, "SLOTS": encode.SLOTS, "BT": c.BT}, c.warps, c.stages,
                    4 * (D * F + T * D + 2 * F) + left, 2 * T * D * F, "fp32", T == 1,
                )
            )  # fmt: skip
    return specs


def gather_specs() -> list[KernelSpec]:
    types = _types(
        {
            "x": "fp32", "w": "fp32", "bias": "fp32", "threshold": "fp32", "bitmap": "i32", "count": "i32",
            "total": "i64", "slot": "fp32", "crow": "i64", "col": "i32", "value": "fp32",
        },
        "T F d words",
        capacity="i64",
    )  # fmt: skip
    return [
        KernelSpec(
            f"gather{' of tensor mode' if lift else ''}, T {T}", "compact", "gather_kernel", types,
            {"SCAN": scan, "LIFT": lift, "SLOTS": encode.SLOTS, "WORDS": encode.GATHER_WORDS}, encode.GATHER_WARPS, 2,
            T * (WORDS * (8 if scan else 16) + L0 * 12), 0, "fp32", True,
        )
        for T, scan, lift in ((1, True, False), (1024, False, False), (1, True, True))
    ]  # fmt: skip


def decode_specs() -> list[KernelSpec]:
    specs = []
    for N, rows, size in ((1, "fp32", 4), (1, "bf16", 2), (1, "i8", 1), (1024, "fp32", 4), (F, "fp32", 4)):
        types = _types(
            {
                "crow": "i64", "col": "i32", "values": "fp32", "w": rows, "scale": "fp32", "bias": "fp32",
                "order": "i64", "out": "fp32",
            },
            "N d",
            capacity="i64",
        )  # fmt: skip
        c = decode.config_for(N)
        touched = min(N * L0, F)
        specs.append(
            KernelSpec(
                f"decode {rows}, N {N}", "decode", "decode_kernel", types,
                {
                    "HAS_SCALE": rows == "i8", "HAS_BIAS": True, "HAS_ORDER": N >= decode.ORDERED_ROWS,
                    "BLOCK": c.BLOCK, "AHEAD": decode.AHEAD, "MANY": decode.MANY,
                },
                c.warps, 2,
                touched * D * size + N * (L0 * 8 + 8 + D * 4), 2 * N * L0 * D, "fp32", True,
            )
        )  # fmt: skip
    return specs


EDITS = 8


def splice_specs() -> list[KernelSpec]:
    """The fused loop's last launch."""
    pointers = {"x": "fp32", "crow": "i64", "col": "i32", "values": "fp32", "w": "fp32", "bias": "fp32"}
    pointers |= {"feature": "i32", "kind": "i32", "amount": "fp32", "out": "fp32"}
    types = _types(pointers, "T d edits", capacity="i64")
    return [
        KernelSpec(
            f"splice{' with the error term' if error else ''}, T 1", "splice", "splice_kernel", types,
            {"ERROR": error, "BLOCK": loop.BLOCK, "AHEAD": decode.AHEAD, "MANY": decode.MANY}, decode.CONFIGS[0].warps,
            3, ((EDITS if error else L0 + EDITS) + 2) * D * 4 + L0 * 8, 2 * (L0 + EDITS) * D, "fp32", True, ("d",),
        )
        for error in (False, True)
    ]  # fmt: skip


def sampled_dot_specs() -> list[KernelSpec]:
    types = _types(
        {"x": "fp32", "w": "fp32", "bias": "fp32", "crow": "i64", "col": "i32", "out": "fp32"}, "N F d shares"
    )
    return [
        KernelSpec(
            f"sampled_dot, N {N}", "sampled_dot", "sampled_dot_kernel", types,
            {"HAS_BIAS": True, "PAIRS": decode.PAIRS}, 4, 3,
            min(N * L0, F) * D * 4 + N * (D * 4 + L0 * 8), 2 * N * L0 * D, "fp32", True,
        )
        for N in (1, 1024)
    ]  # fmt: skip


OUT = 9216  # of a Gemma 2 2B gate projection, whose in_features are D
PLANES = dict.fromkeys(("p0", "p1", "p2", "p3", "p4"), "*u8")


def matryoshka_specs() -> list[KernelSpec]:
    types = {
        **_types(
            {"q": "i8", "s": "fp32", "qsum": "i32", "scale": "fp32", "zero": "u8", "bias": "fp32", "y": "fp32"}, ""
        ),
        **PLANES,
        **dict.fromkeys(["T", "out", "blocks", "units", "groups", "group_units", "top"], "i32"),
        "mid": "fp32",
    }
    specs = []
    for T, bits in ((1, 8), (1, 4), (1, 2), (64, 8), (64, 4), (64, 2)):
        c = matryoshka.config_for(T)
        constants = planes.widths_of(WIDTHS[bits]) | {
            "BITS": bits, "DROP": 0, "ROUNDS": False, "WIDE": True, "HAS_BIAS": False,
            "BLOCKS": c.BLOCKS, "UNITS": matryoshka.UNITS, "BT": c.BT,
        }  # fmt: skip
        specs.append(
            KernelSpec(
                f"matryoshka_linear {bits} bits, T {T}", "matryoshka_linear", "matryoshka_linear_kernel", types,
                constants, c.warps, 2, OUT * D * bits // 8 + 5 * OUT + T * (D + 4 * OUT), 2 * T * OUT * D, "int8",
                T == 1, ("out", "units"),
            )
        )  # fmt: skip
    return specs


def planes_specs() -> list[KernelSpec]:
    """Pack to 8 and to 4 bits; slice and dequantise at 8, 4 and 2, and the paper's 4 of 6 bits, which rounds."""
    weights, integers = OUT * D, dict.fromkeys(("out", "width", "blocks", "units", "top"), "i32")
    specs = [
        KernelSpec(
            f"matryoshka_pack {bits} bits", "matryoshka_pack", "matryoshka_pack_kernel",
            {"code_ptr": "*u8", **PLANES, **integers}, {**planes.widths_of(WIDTHS[bits]), "UNITS": planes.UNITS},
            planes.WARPS, 3, weights + weights * bits // 8, 0, "fp32", True, ("out", "width"),
        )
        for bits in (8, 4)
    ]  # fmt: skip
    for bits, read in ((8, 8), (4, 4), (4, 6), (2, 2)):
        constants = {
            **planes.widths_of(WIDTHS[read]), "DROP": read - bits, "ROUNDS": read > bits, "UNITS": planes.UNITS,
        }  # fmt: skip
        name = f"{bits} bits{' rounded' if read > bits else ''}"
        specs.append(
            KernelSpec(
                f"matryoshka_slice {name}", "matryoshka_slice", "matryoshka_slice_kernel",
                {**PLANES, "code_ptr": "*u8", **integers}, constants, planes.WARPS, 3,
                weights * read // 8 + weights, 0, "fp32", True, ("out", "width"),
            )
        )  # fmt: skip
        scales = {"scale_ptr": "*fp16", "zero_ptr": "*u8", "weight_ptr": "*fp32"}
        more = {"groups": "i32", "group_units": "i32", "mid": "fp32"}
        specs.append(
            KernelSpec(
                f"matryoshka_dequantize {name}", "matryoshka_dequantize", "matryoshka_dequantize_kernel",
                {**PLANES, **scales, **integers, **more}, {**constants, "BITS": bits}, planes.WARPS, 3,
                weights * read // 8 + weights // 32 * 3 + 4 * weights, 2 * weights, "fp32", True, ("out", "width"),
            )
        )  # fmt: skip
    return specs


def tensor_specs() -> list[KernelSpec]:
    specs = []
    for T, kind, size in ((1, "bf16", 2), (1024, "bf16", 2), (1024, "fp16", 2), (1, "fp32", 4), (1024, "fp32", 4)):
        types = _types(
            {
                "x": kind, "w": kind, "bias": "fp32", "threshold": "fp32", "scale": "fp32", "bitmap": "i32",
                "count": "i32", "slot": "fp32",
            },
            "T F d words",
        )  # fmt: skip
        c = tensor.config_for(T)
        specs.append(
            KernelSpec(
                f"encode tensor {'tf32' if kind == 'fp32' else kind}, T {T}", "encode_tensor", "encode_tensor_kernel",
                types,
                {
                    "HAS_SCALE": kind == "fp16", "SLOTS": encode.SLOTS, "BT": c.BT, "BF": c.BF, "BK": c.step // size,
                    "UPCAST": False,
                },
                c.warps, c.stages,
                size * (D * F + T * D) + 8 * F + T * (WORDS * 8 + L0 * 4), 2 * T * D * F,
                "tf32" if kind == "fp32" else "bf16", T == 1,
            )
        )  # fmt: skip
    return specs


LEFT = 0.025  # of pairs that two digits of activation and one of weights leave to refine


def screen_specs() -> list[KernelSpec]:
    """The three launches of the screened encode before the gather."""
    vectors = dict.fromkeys(("scale", "error", "norm", "bias", "slack", "threshold"), "fp32")
    digits = {"high": "i8", "low": "i8", "sum": "i32", "token": "fp32"}
    vectors_of_x = {"x": "fp32", "centre": "fp32", "scale": "fp32"}
    types = _types({**vectors_of_x, **digits}, "d padded", kappa="fp32", root="fp32", grow="fp32")
    specs = [
        KernelSpec(
            "digits, T 1", "screen", "digits_kernel", types,
            {"HAS_CENTRE": True, "HAS_SCALES": True, "BLOCK": screen.DIGITS_BLOCK}, 4, 3, 24 * D + 20, 16 * D,
            "fp32", False, ("d", "padded"),
        )
    ]  # fmt: skip
    pairs = {"bitmap": "i32", "guess": "fp32"}
    types = _types(
        {**digits, "code": "i8", **vectors, "zero": "i32", **pairs}, "T F d padded words", half_bandwidth="fp32"
    )
    for T in (1, 1024):
        c = screen.config_for(T)
        specs.append(
            KernelSpec(
                f"screen int8, T {T}", "screen", "screen_kernel", types,
                {"HAS_BANDWIDTH": False, "SLOTS": encode.SLOTS, "BT": c.BT, "BF": c.BF, "BK": c.BK}, c.warps, c.stages,
                D * F + 28 * F + T * (2 * D + 20 + WORDS * 4 + int(4 * LEFT * F)), 4 * T * D * F, "int8", T == 1,
                ("d", "padded", "words"), "" if T == 1 else screen.FEW_WARPS,
            )
        )  # fmt: skip
    types = _types(
        {
            "x": "fp32", "w": "fp32", "code": "i8", "error2": "fp32", "candidate": "i32", "count": "i32",
            "slot": "fp32", "stale": "i32", "left": "i32", **digits, **vectors, **pairs,
        },
        "T F d padded words",
        half_bandwidth="fp32",
    )  # fmt: skip
    for T, second in ((1, False), (1024, False), (1, True)):
        rows = min(int(LEFT * F * T), F)
        specs.append(
            KernelSpec(
                f"refine, T {T}{', second digit' if second else ''}", "screen", "refine_kernel", types,
                {
                    "HAS_BANDWIDTH": False, "HAS_SECOND": second, "COUNTS": False, "SLOTS": encode.SLOTS,
                    "WORDS": screen.REFINE_WORDS, "PAIRS": screen.PAIRS, "BK": 64,
                },
                4, 3, rows * D * (4 + second) + T * (D * 4 + WORDS * 12 + int(LEFT * F) * 28),
                int(2 * LEFT * F) * T * D, "fp32", True, ("d", "padded", "words"),
            )
        )  # fmt: skip
    return specs


def all_specs() -> list[KernelSpec]:
    return [
        *encode_specs(),
        *gather_specs(),
        *tensor_specs(),
        *screen_specs(),
        *decode_specs(),
        *splice_specs(),
        *sampled_dot_specs(),
        *matryoshka_specs(),
        *planes_specs(),
    ]
