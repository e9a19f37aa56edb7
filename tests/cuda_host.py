"""Builds and calls the CUDA sources compiled for the CPU (csrc/cuda/host.h): a helper, no tests."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from gemmascope_fast.backends.gpu.matryoshka import planes_of
from gemmascope_fast.backends.gpu.planes import middle, top_code
from gemmascope_fast.ops._planes import PREFIX, stored_bits

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "tests" / "cuda" / "host_build.cpp"
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "plain": [],
    "thread": ["-g", "-fsanitize=thread"],
    "address": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
SLOTS = 4


def build_program(
    out: Path, sanitizer: str, sources: Path = ROOT / "csrc", main: Path = MAIN, define: str = "GSF_MAIN"
) -> Path:
    """The self-checking program of tests/cuda/host_build.cpp, or of another file."""
    # -O0: with AddressSanitizer the compiler takes 25 s at -O1 and 8 s without, the program 25 s and 30 s in all orders
    command = [
        "g++",
        *FLAGS,
        "-O0",
        *SANITIZERS[sanitizer],
        f"-D{define}",
        "-I",
        str(sources),
        str(main),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


def run_program(program: Path, order: str) -> subprocess.CompletedProcess:
    # ThreadSanitizer cannot place its shadow where addresses are randomised over more than 28 bits
    fixed = [shutil.which("setarch"), platform.machine(), "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(program), str(ORDERS[order])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def caught(name, mutations, tmp_path):
    """Builds the sources with one line changed; the output of the run that noticed, None where none did."""
    file, before, after, sanitizer = mutations[name]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / "cuda" / file).read_text()
    assert text.count(before) == 1, f"{name}: the line to change is there {text.count(before)} times"
    (sources / "cuda" / file).write_text(text.replace(before, after))
    program = build_program(tmp_path / "mutant", sanitizer, sources)
    for order in ORDERS:
        done = run_program(program, order)
        if done.returncode != 0:
            return done.stdout + done.stderr
    return None


class EncodeArgs(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("x", "w", "bias", "threshold", "bitmap", "count", "slots")]
        + [(n, ctypes.c_int64) for n in ("T", "F", "d", "words")]
        + [("half_bandwidth", ctypes.c_float)]
    )  # fmt: skip


class GatherArgs(ctypes.Structure):
    _fields_ = (
        ("e", EncodeArgs),
        *((n, ctypes.c_void_p) for n in ("total", "crow", "col", "values")),
        ("capacity", ctypes.c_int64),
    )


class DecodeArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("crow", "col", "values", "w", "row_scale", "bias", "out")),
        *((n, ctypes.c_int64) for n in ("N", "d", "capacity")),
    )


class SpliceArgs(ctypes.Structure):
    _fields_ = (
        ("g", GatherArgs),
        *((n, ctypes.c_void_p) for n in ("x", "w", "bias", "features", "kind", "amount", "out")),
        *((n, ctypes.c_int64) for n in ("d_out", "edits")),
    )


class TokensArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("x", "mean", "q", "s", "qsum")),
        *((n, ctypes.c_int64) for n in ("T", "d", "units", "groups", "group_units")),
    )


class MatryoshkaArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q", "s", "qsum")),
        ("planes", ctypes.c_void_p * 5),
        *((n, ctypes.c_void_p) for n in ("scale", "zero", "bias", "y")),
        *((n, ctypes.c_int64) for n in ("T", "out", "units", "groups", "group_units")),
        *((n, ctypes.c_int32) for n in ("half_scale", "stored", "bits", "rounds", "top")),
        ("mid", ctypes.c_float),
    )


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class HostLibrary:
    """The ops as the device would run them, on CPU tensors."""

    def __init__(self, folder: Path) -> None:
        out = folder / "libhost.so"
        command = ["g++", *FLAGS, "-shared", "-fPIC", "-I", str(ROOT / "csrc"), str(MAIN), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        self.library = ctypes.CDLL(str(out))

    @contextlib.contextmanager
    def last_block_alone(self):
        """Within it only the last block of each grid runs."""
        self.library.gsf_host_last_alone(1)
        try:
            yield
        finally:
            self.library.gsf_host_last_alone(0)

    def call(self, name: str, args: ctypes.Structure, dtype: torch.dtype, order: str) -> None:
        call = getattr(self.library, f"gsf_host_{name}")
        call(ctypes.byref(args), DTYPES[dtype], ORDERS[order], ctypes.c_uint64(7))

    def encode(self, x, W_enc, b_enc, threshold, bandwidth=None, order="ascending", scan=True, capacity=None):
        """crow, col, values; with a capacity, as many entries as fit it."""
        rows, xs = W_enc.t().contiguous(), x.float().contiguous()
        (T, d), F = x.shape, rows.shape[0]
        bias, theta = b_enc.float(), threshold.float()
        words = -(-F // 32)
        bitmap = torch.full((T, words), -1, dtype=torch.int32)
        count = torch.full((T, words), -1, dtype=torch.int32)
        slots = torch.full((T, words, SLOTS), float("nan"))
        held = [pointer(t) for t in (xs, rows, bias, theta, bitmap, count, slots)]
        e = EncodeArgs(*held, T, F, d, words, 0.0 if bandwidth is None else bandwidth / 2)
        self.call("encode", e, rows.dtype, order)
        total = count.flatten().cumsum(0)
        nnz = int(total[-1])
        capacity = nnz if capacity is None else capacity
        crow = torch.full((T + 1,), -1, dtype=torch.int64)
        col = torch.full((capacity,), -1, dtype=torch.int32)
        values = torch.full((capacity,), float("inf"))
        g = GatherArgs(e, None if scan else pointer(total), pointer(crow), pointer(col), pointer(values), capacity)
        self.call("gather", g, rows.dtype, order)
        return crow, col, values

    def decode(self, crow, col, values, W_dec, b_dec=None, row_scale=None, order="ascending", capacity=None):
        out = torch.full((crow.numel() - 1, W_dec.shape[1]), float("inf"))
        held = [pointer(t) for t in (crow, col, values, W_dec, row_scale, b_dec, out)]
        capacity = col.numel() if capacity is None else capacity
        args = DecodeArgs(*held, crow.numel() - 1, W_dec.shape[1], capacity)
        self.call("decode", args, W_dec.dtype, order)
        return out

    def matryoshka_linear(self, x, planes, scale, zero, bias, mean, out, group_size, bits, rule, order="ascending"):
        """Op `matryoshka_linear` with int8 activations: the two launches of csrc/cuda/ops_matryoshka.cpp."""
        (T, d), groups = x.shape, scale.shape[1]
        units = -(-d // 32)
        group_units = group_size // 32 if group_size else max(1, units)
        q = torch.full((T, units * 8), -1, dtype=torch.int32)
        sums, s = torch.full((T, groups), -1, dtype=torch.int32), torch.full((T,), float("inf"))
        xs, y = x.float().contiguous(), torch.full((T, out), float("inf"))
        shape = T, d, units, groups, group_units
        self.call("round_tokens", TokensArgs(*[pointer(t) for t in (xs, mean, q, s, sums)], *shape), x.dtype, order)
        read, used = planes_of([p.shape[2] // 64 for p in planes], stored_bits(planes), bits, rule)
        held = (ctypes.c_void_p * 5)(*[pointer(p) for p in planes[:used]])
        what = scale.dtype == torch.float16, read, bits, rule != PREFIX and read > bits, top_code(bits, rule)
        args = MatryoshkaArgs(
            pointer(q), pointer(s), pointer(sums), held, pointer(scale), pointer(zero), pointer(bias), pointer(y),
            T, out, units, groups, group_units, *what, middle(bits, rule),
        )  # fmt: skip
        self.call("matryoshka", args, x.dtype, order)
        return y

    def splice(self, x, W_enc, b_enc, threshold, W_dec, b_dec, table, error, order="ascending", capacity=None):
        """out and (crow, col, values): the two launches of the fused loop; table: features, kind, amount."""
        rows, xs, bias, theta = W_enc.t().contiguous(), x.float().contiguous(), b_enc.float(), threshold.float()
        (T, d), F, d_out = x.shape, rows.shape[0], W_dec.shape[1]
        words = -(-F // 32)
        bitmap, count = (torch.full((T, words), -1, dtype=torch.int32) for _ in range(2))
        slots = torch.full((T, words, SLOTS), float("nan"))
        e = EncodeArgs(*[pointer(t) for t in (xs, rows, bias, theta, bitmap, count, slots)], T, F, d, words, 0.0)
        self.call("encode", e, rows.dtype, order)
        capacity = T * F if capacity is None else capacity
        crow = torch.full((T + 1,), -1, dtype=torch.int64)
        col, values = torch.full((capacity,), -1, dtype=torch.int32), torch.full((capacity,), float("inf"))
        out, dec_bias = torch.full((T, d_out), float("inf")), b_dec.float()
        g = GatherArgs(e, None, pointer(crow), pointer(col), pointer(values), capacity)
        held = [pointer(t) for t in (xs if error else None, W_dec, dec_bias, *table, out)]
        self.call("splice", SpliceArgs(g, *held, d_out, table[0].numel()), rows.dtype, order)
        return out, (crow, col, values)
