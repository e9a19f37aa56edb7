"""Constants that are in both Python and the CUDA sources: each is read from the source and compared."""

import re
from pathlib import Path

import torch
from cuda_host import DTYPES

from gemmascope_fast.backends.gpu import encode, loop
from gemmascope_fast.dev.gpu import nvcc

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def source(name):
    return re.sub(r"//.*", "", (CSRC / name).read_text(encoding="utf-8"))


def members(text, enum):
    return {
        name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", re.search(enum + r"[^{]*{(.*?)}", text)[1])
    }


def test_slots_of_a_word():
    assert int(re.search(r"kSlots = (\d+);", source("cuda/kernels.h"))[1]) == encode.SLOTS


def test_kinds_of_edits():
    kinds = {"kScale": loop.SCALE, "kClamp": loop.CLAMP, "kAdd": loop.ADD, "kMinClamp": loop.MIN_CLAMP}
    assert members(source("cuda/kernels.h"), "enum EditKind") == kinds


def test_element_types():
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8"}
    assert members(source("cpu/kernels.h"), "enum class Dtype") == {names[t]: value for t, value in DTYPES.items()}


def test_warps_of_a_block():
    assert int(re.search(r"kThreads = (\d+);", source("cuda/launcher.h"))[1]) == 32 * nvcc.WARPS
