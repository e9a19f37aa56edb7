"""Removes every barrier of the CUDA sources in turn, and shifts bounds and lanes by one: a test must fail each time."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from cuda_host import ORDERS, ROOT, build_program, run_program

FILES = ("encode.cu", "compact.cu", "decode.cu", "splice.cu", "matryoshka.cu", "block.h")
BARRIERS = [
    (file, number)
    for file in FILES
    for number in range((ROOT / "csrc" / "cuda" / file).read_text().count("sync_block();"))
]
# file, text that stands there once, what it becomes, the build that must notice
EDITS = [
    ("encode.cu", "inside = k0 + c < a.d", "inside = k0 + c <= a.d", "address"),
    ("encode.cu", "t0 + r < a.T ? a.x", "t0 + r <= a.T ? a.x", "address"),
    ("encode.cu", "inside && f0 + r < a.F", "inside && f0 + r <= a.F", "address"),
    ("encode.cu", "out[i] = i < left", "out[i] = i <= left", "address"),
    ("encode.cu", "t < a.T && word < a.words", "t < a.T && word <= a.words", "address"),
    ("encode.cu", "f < a.F ? f : a.F - 1", "f <= a.F ? f : a.F - 1", "address"),
    ("encode.cu", "rank < kSlots", "rank <= kSlots", "address"),
    ("encode.cu", "ballot(hit)", "ballot(hit && lane() != 0)", "plain"),
    ("encode.cu", "ballot(hit)", "ballot(hit && lane() != 31)", "plain"),
    ("encode.cu", "int half = 8; half > 0", "int half = 4; half > 0", "plain"),
    ("encode.cu", "k < kChunk && k0 + k < a.d", "k < kChunk && k0 + k + 16 < a.d", "plain"),
    ("compact.cu", "there = word < e.words", "there = word <= e.words", "address"),
    ("compact.cu", "i < row + first", "i <= row + first", "plain"),
    ("compact.cu", "if (at >= a.capacity) break;", "", "address"),
    ("compact.cu", "mine < kSlots ||", "mine <= kSlots ||", "plain"),
    ("block.h", "lane() == 31) part", "lane() == 30) part", "plain"),
    ("compact.cu", "ballot(count > kSlots)", "ballot(count > kSlots && lane() != 5)", "plain"),
    ("decode.cu", "inside = k < a.d", "inside = k <= a.d", "address"),
    ("decode.cu", "if (k >= a.d) return;", "if (k > a.d) return;", "address"),
    ("decode.cu", "r < count; ++r", "r < count - 1; ++r", "plain"),
    ("splice.cu", "word < e.words", "word <= e.words", "address"),
    ("splice.cu", "inside ? k : a.d_out - 1", "k", "address"),
    ("splice.cu", "at >= kSpliceStage", "at > kSpliceStage", "address"),
    ("splice.cu", "popcount(bits & (bit - 1))", "popcount(bits & bit)", "plain"),
    ("splice.cu", "r < count; ++r", "r < count - 1; ++r", "plain"),
    ("splice.cu", "i < t * e.words", "i <= t * e.words", "plain"),
    ("splice.cu", "i < a.edits", "i <= a.edits", "address"),
    ("splice.cu", "rank < kSlots", "rank <= kSlots", "plain"),
    ("splice.cu", " && start + s0 + thread() < a.g.capacity", "", "address"),
    ("splice.cu", "start <= a.g.capacity", "start <= a.g.capacity + 1", "plain"),
    ("splice.cu", "thread() < count", "thread() < count - 1", "plain"),
    ("splice.cu", "r = warp(); sums_rows && r < count", "r = warp(); sums_rows && r < count - 1", "plain"),
    ("splice.cu", "rows[r][lane()] = widened", "if (lane() != 31) rows[r][lane()] = widened", "plain"),
    ("splice.cu", "uint32_t left = bits", "uint32_t left = bits & ~(1u << 31)", "plain"),
    ("splice.cu", "uint32_t left = bits", "uint32_t left = thread() % 32 != 17 ? bits : 0", "plain"),
    ("splice.cu", "changed ? canonical(", "changed || k >= 0 ? canonical(", "plain"),
    ("splice.cu", "!(old < amount)", "old >= amount", "plain"),
    ("splice.cu", "amount == 1.0f ? 0.0f : ", "", "plain"),
    ("splice.cu", "if (delta == 0.0f) continue;", "", "plain"),
    ("matryoshka.cu", "if (k >= a.d) return 0.0f;", "if (k > a.d) return 0.0f;", "address"),
    ("matryoshka.cu", "u < a.units) add_unit", "u <= a.units) add_unit", "address"),
    ("matryoshka.cu", "t0 + t < a.T ? t0 + t : a.T - 1", "t0 + t", "address"),
    ("matryoshka.cu", "finishes && o < a.out", "finishes && o <= a.out", "address"),
    ("matryoshka.cu", "t < TT && t0 + t < a.T", "t < TT && t0 + t <= a.T", "address"),
    ("matryoshka.cu", "t < TT && t0 + t < a.T", "t < TT - (TT > 1) && t0 + t < a.T", "plain"),
    ("matryoshka.cu", "end < words ? end : words", "end", "address"),
    ("matryoshka.cu", "w < last; w += 32", "w + 1 < last; w += 32", "plain"),
    ("matryoshka.cu", "half = 16; half >= 4;", "half = 8; half >= 4;", "plain"),
    ("matryoshka.cu", "if (lane() < 4) parts", "if (lane() < 3) parts", "plain"),
    ("matryoshka.cu", "other > v ? other : v", "other > v && lane() != 0 ? other : v", "plain"),
    ("matryoshka.cu", "i < kWarps; ++i) v =", "i < kWarps - 1; ++i) v =", "plain"),
    ("matryoshka.cu", "(size < kInfinity ? size : kInfinity)", "size", "plain"),
    ("matryoshka.cu", "exact > kTiny ? exact", "exact >= 0.0f ? exact", "plain"),
    ("matryoshka.cu", "a.group_units > 16", "a.group_units > 15", "plain"),
    ("matryoshka.cu", "add_rn(whole, mul_rn(a.mid, sum))", "whole", "plain"),
    ("matryoshka.cu", "if (units < f.end) return;", "if (units <= f.end) return;", "plain"),
    ("matryoshka.cu", "  f.dot = 0;", "", "plain"),
    ("matryoshka.cu", "        dot[i / 4][i % 4] = 0;", "", "plain"),
    ("matryoshka.cu", "i < count; ++i) add_part", "i < count - 1; ++i) add_part", "plain"),
    ("matryoshka.cu", "a.rounds ? drop - 1 : drop", "drop", "plain"),
    ("matryoshka.cu", ", in_bytes(a.top))", ", in_bytes(255))", "plain"),
    (
        "matryoshka.cu",
        "(c >> 1 & in_bytes(127)) + (c & in_bytes(1))",
        "(c + in_bytes(1)) >> 1 & in_bytes(127)",
        "plain",
    ),
    ("matryoshka.cu", "high << 1 & in_bytes(0xAA)", "high & in_bytes(0xAA)", "plain"),
    ("matryoshka.cu", "moved<from - low>", "moved<from>", "plain"),
    ("matryoshka.cu", "a.stored > a.bits) code", "a.stored > a.bits + 1) code", "plain"),
    ("matryoshka.cu", "a.half_scale)", "!a.half_scale)", "address"),
    ("block.h", "inside = k + j < d", "inside = k + j <= d", "address"),
    ("block.h", "k < d; k += 16", "k + 16 < d; k += 16", "plain"),
    ("block.h", "fold<8>(acc)", "fold<4>(acc)", "plain"),
    ("block.h", "int half = 16; half > 0", "int half = 8; half > 0", "plain"),
    ("block.h", "i < kWarps; ++i", "i < kWarps - 1; ++i", "plain"),
    ("block.h", "i < warp(); ++i", "i <= warp(); ++i", "plain"),
    ("block.h", "lane() >= step) inclusive", "lane() > step) inclusive", "plain"),
    ("block.h", "step < 32", "step < 16", "plain"),
    ("block.h", "canonical(add_rn(", "(add_rn(", "plain"),
]


def notice(sources, sanitizer, tmp_path):
    program = build_program(tmp_path / "mutant", sanitizer, sources)
    return any(run_program(program, order).returncode != 0 for order in ORDERS)


@pytest.fixture
def sources(tmp_path):
    return Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))


@pytest.mark.parametrize(("file", "number"), BARRIERS)
def test_a_removed_barrier_is_noticed(file, number, sources, tmp_path):
    path = sources / "cuda" / file
    parts = path.read_text().split("sync_block();")
    path.write_text("sync_block();".join(parts[: number + 1]) + ";" + "sync_block();".join(parts[number + 1 :]))
    assert notice(sources, "thread", tmp_path)


@pytest.mark.parametrize(("file", "before", "after", "sanitizer"), EDITS)
def test_an_edit_is_noticed(file, before, after, sanitizer, sources, tmp_path):
    path = sources / "cuda" / file
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    assert notice(sources, sanitizer, tmp_path)


# 32-bit offsets where 64 are needed: file, text, what it becomes
NARROW = [
    ("encode.cu", "const int64_t at = t * a.words + word;", "const int at = static_cast<int>(t * a.words + word);"),
    (
        "matryoshka.cu",
        "a.planes[p] + (tile * plane_width(R, p) + v) * 64 + first * 4",
        "a.planes[p] + static_cast<int>((tile * plane_width(R, p) + v) * 64 + first * 4)",
    ),
    ("decode.cu", "a.out[n * a.d + k] = fits", "a.out[static_cast<int>(n * a.d + k)] = fits"),
    ("compact.cu", "e.slots[(row + word) * kSlots + rank]", "e.slots[static_cast<int>((row + word) * kSlots + rank)]"),
]


@pytest.mark.parametrize(("file", "before", "after"), NARROW)
def test_a_narrow_offset_is_noticed(file, before, after, sources):
    """By tests/test_cuda_host*.py, in a copy and a process of its own: what it then reads may not be there."""
    tree = sources.parent
    shutil.copytree(ROOT / "tests", tree / "tests")
    (tree / "gemmascope_fast").symlink_to(ROOT / "gemmascope_fast")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/backends/test_cuda_host.py",
        "tests/backends/test_cuda_host_matryoshka.py",
        "-k",
        "beyond",
    ]
    assert subprocess.run(command, cwd=tree, capture_output=True, check=False).returncode == 0
    path = sources / "cuda" / file
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    assert subprocess.run(command, cwd=tree, capture_output=True, check=False).returncode not in (0, 5)
