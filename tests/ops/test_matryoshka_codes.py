"""Codes, slices and planes: every one of the 256 codes, every width, both modes."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops.codes import Codes, grid, quantize, quantize_alone, slice_codes
from gemmascope_fast.quant import storage
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.planes import WIDTHS, Packed, bits_read, pack, unpack

ALL = torch.arange(256, dtype=torch.uint8)
BITS = range(1, 9)


def paper_slice(q: int, r: int, clamp: bool) -> int:
    """Written from the formula, in Python's integers and floats: S(q, r) on the 8-bit grid."""
    s = math.floor(q / 2 ** (8 - r) + 0.5)
    if clamp:
        s = min(max(s, 0), 2**r - 1)
    return s * 2 ** (8 - r)


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_matquant_slice_is_the_papers_formula_for_every_code(bits, extra):
    got = grid(slice_codes(ALL, bits, "matquant", extra), bits, "matquant")
    # at 8 bits no code rounds up past the top, so leaving out the clamp changes nothing
    assert got.tolist() == [paper_slice(q, bits, not extra) for q in range(256)]


@pytest.mark.parametrize("bits", BITS)
def test_prefix_slice_is_the_middle_of_the_codes_that_share_the_prefix(bits):
    got = grid(slice_codes(ALL, bits, "prefix"), bits, "prefix")
    for q in range(256):
        step = 2 ** (8 - bits)
        first = q - q % step
        assert got[q] == sum(range(first, first + step)) / step


def test_rounding_twice_is_not_rounding_once():
    # the trap of the paper's slice: q = 24
    once = slice_codes(torch.tensor([24], dtype=torch.uint8), 2, "matquant").item()
    four = slice_codes(torch.tensor([24], dtype=torch.uint8), 4, "matquant") << 4
    twice = slice_codes(four, 2, "matquant").item()
    assert (once, twice) == (0, 1)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("mode", ["prefix", "matquant"])
@pytest.mark.parametrize("bits", BITS)
def test_planes_give_every_code_at_every_width(bits, mode, extra):
    if extra and mode == "prefix":
        with pytest.raises(ValueError, match="extra_precision"):
            slice_codes(ALL, bits, mode, extra)
        return
    codes = Codes(ALL.reshape(16, 16), torch.ones(16, 1), torch.zeros(16, 1, dtype=torch.uint8))
    packed = Packed.of(codes, mode)
    want = slice_codes(codes.q, bits, mode, extra)
    assert torch.equal(packed.sliced(bits, mode, extra), want)
    flat = packed.materialize(bits, mode, extra)
    assert flat.stored == bits
    assert torch.equal(flat.sliced(bits, mode, extra), want)
    assert torch.equal(flat.dequantize(), codes.dequantize(bits, mode, extra))


def test_a_prefix_read_touches_exactly_r_eighths_of_the_bytes():
    packed = Packed.of(quantize(matrix(64, 96)))
    whole = sum(p.numel() for p in packed.planes)
    assert whole == 64 * 96
    for bits in (2, 3, 4, 6, 8):
        assert sum(p.numel() for p in packed.read(bits)) * 8 == bits * whole
        assert packed.prefix(bits).nbytes() == packed.nbytes(bits)
    assert [bits_read(b) for b in BITS] == [2, 2, 3, 4, 6, 6, 8, 8]
    # the paper's slice needs the bit below, in whole planes
    assert [bits_read(b, "matquant") for b in BITS] == [2, 3, 4, 6, 6, 8, 8, 8]


def test_what_lies_below_the_prefix_is_not_read():
    packed = Packed.of(quantize(matrix(16, 32)))
    spoiled = list(packed.planes)
    spoiled[3:] = [torch.full_like(p, 0xA5) for p in spoiled[3:]]
    other = Packed(tuple(spoiled), packed.scale, packed.zero_point, 16, 32)
    for bits in (1, 2, 3, 4):
        assert torch.equal(packed.dequantize(bits), other.dequantize(bits))
    assert not torch.equal(packed.dequantize(6), other.dequantize(6))


def test_sizes_count_scales_zero_points_and_overflow():
    rows, columns = 48, 160
    packed = Packed.of(quantize(matrix(rows, columns), group_size=32), "matquant")
    groups = rows * columns // 32
    for bits in BITS:
        flat = packed.materialize(bits, extra_precision=True)
        crow, col = flat.overflow if flat.overflow else (torch.empty(0), torch.empty(0))
        lists = crow.numel() * 8 + col.numel() * 4
        assert flat.nbytes() == rows * columns * bits // 8 + 3 * groups + lists
    # 16 + 8 bits for 32 weights: 0.75 bit a weight
    assert (packed.nbytes() * 8 / (rows * columns)) == 8.75


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 10**6), st.sampled_from(sorted(WIDTHS)))
def test_packing_is_lossless_for_any_shape(rows, columns, seed, stored):
    code = torch.randint(0, 1 << stored, (rows, columns), generator=torch.Generator().manual_seed(seed))
    code = code.to(torch.uint8)
    back = unpack(pack(code, stored), WIDTHS[stored])
    assert torch.equal(back[:rows, :columns], code)
    assert int(back.sum()) == int(code.sum())  # the padding is code 0


def test_the_layout_is_the_one_the_docstring_states():
    code = torch.randint(0, 256, (37, 70), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    planes = pack(code)
    for row, column in [(0, 0), (36, 69), (17, 45), (31, 31), (5, 64)]:
        block, lane, unit, k = row // 16, row % 16, column // 32, column % 32
        quad, c, value, left = k // 4, k % 4, 0, 8
        for plane, width in zip(planes, WIDTHS[8], strict=True):
            left -= width
            if width == 2:
                byte = plane[block, unit].reshape(2, 16, 4)[quad // 4, lane, c].item()
                field = byte >> (2 * (quad % 4)) & 3
            else:
                byte = plane[block, unit].reshape(16, 4)[lane, c].item()
                field = byte >> quad & 1
            value |= field << left
        assert value == code[row, column].item()


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("columns", [1, 31, 96, 130])
def test_min_max_codes_err_by_at_most_a_step(columns, group_size):
    weight = matrix(9, columns)
    codes = quantize(weight, group_size)
    error = (codes.dequantize() - weight).abs()
    # half a step by rounding the weight; at the ends of the range rounding the zero point clips by half a step more
    step = codes.per_weight(codes.scale.float())
    assert bool((error <= step * (1 + 1e-5)).all())
    inner = (codes.q > 0) & (codes.q < 255)
    assert bool((error <= step * (0.5 + 1e-5))[inner].all())
    assert int(codes.q.max()) - int(codes.q.min()) >= 1 or columns == 1


def test_zero_stays_zero_and_constant_rows_survive():
    weight = torch.tensor([[0.0, 1.0, -1.0, 0.5], [0, 0, 0, 0], [2, 2, 2, 2], [-3, -3, -3, -3]])
    for group_size in (None, 32):
        codes = quantize(weight, group_size)
        back = codes.dequantize()
        assert bool((back[weight == 0] == 0).all())
        assert bool(((back - weight).abs() <= codes.per_weight(codes.scale.float())).all())
        # one end of the range is a code, the other is within the scale's rounding
        assert torch.allclose(back[2:], weight[2:], rtol=2**-10)


def test_half_scales_are_rounded_up_and_never_to_zero():
    some = torch.cat([matrix(1, 32), torch.full((1, 32), 1e-9), torch.zeros(1, 32)], 1)
    codes = quantize(some, 32)
    assert codes.scale.dtype == torch.float16
    assert codes.scale[0, 1:].tolist() == [2**-24, 2**-24]  # beside the row's other weights they count for nothing
    weight = matrix(64, 64)
    codes = quantize(weight, 32)
    exact = (torch.stack([w.amax(-1).clamp(min=0) - w.amin(-1).clamp(max=0) for w in weight.split(32, 1)], 1)) / 255
    assert bool((codes.scale.float() >= exact).all())
    assert bool((codes.scale.float() <= exact * (1 + 2**-9)).all())


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-4, 1e-2, 1.0, 1e5, 1e9])
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_weights_of_every_size_keep_their_precision(size, group_size):
    """float16 scales end at 6e-8 and at 65504: a code of such weights has float32 scales."""
    weight = matrix(48, 96)
    unit, codes = quantize(weight, group_size), quantize(weight * size, group_size)
    for bits in (8, 4, 2):
        want = (unit.dequantize(bits) - weight).norm() / weight.norm()
        got = (codes.dequantize(bits) - weight * size).norm() / (weight * size).norm()
        assert got < 1.02 * want
    if group_size is None or size in (1.0, 1e-9, 1e-4, 1e9):
        assert codes.scale.dtype == (torch.float16 if group_size and size == 1 else torch.float32)
    alone = quantize_alone(weight * size, 4, group_size).dequantize(4, "matquant")
    assert (alone - weight * size).norm() < 0.2 * (weight * size).norm()
    layer = nn.Linear(96, 48, bias=False)
    layer.weight.data.copy_(weight * size)
    x = matrix(5, 96, seed=1)
    want = x @ codes.dequantize().t()
    for activations, slack in (("exact", 1e-5), ("int8", 0.03)):
        served = MatryoshkaLinear.from_linear(layer, group_size, activations=activations)
        assert (served(x) - want).norm() <= slack * want.norm()


def test_one_row_of_tiny_weights_is_enough():
    weight = matrix(16, 64)
    weight[3] *= 1e-7
    codes = quantize(weight, 32)
    assert codes.scale.dtype == torch.float32
    assert (codes.dequantize()[3] - weight[3]).norm() < 0.01 * weight[3].norm()
    weight[3] = 0
    assert quantize(weight, 32).scale.dtype == torch.float16


def test_rows_read_alone_equal_the_matrix():
    weight = matrix(50, 70)
    for group_size in (None, 32):
        packed = Packed.of(quantize(weight, group_size))
        index = torch.tensor([49, 3, 3, 17])
        for bits in BITS:
            for mode in ("prefix", "matquant"):
                assert torch.equal(packed.rows(index, bits, mode), packed.dequantize(bits, mode)[index])
        flat = Packed.of(quantize(weight, group_size), "matquant").materialize(2, extra_precision=True)
        assert flat.overflow is not None
        assert flat.overflow[1].numel() > 0
        assert torch.equal(flat.rows(index, 2), flat.dequantize()[index])


@pytest.mark.parametrize("group_size", [None, 32])
def test_files_give_back_the_same_bytes(tmp_path, group_size):
    packed = Packed.of(quantize(matrix(33, 70), group_size), "matquant")
    flat = packed.materialize(2, extra_precision=True)
    bias = torch.randn(33)
    size = storage.save(tmp_path / "m.safetensors", {"a": packed, "b": flat}, {"a.bias": bias}, {"note": 1})
    assert size == (tmp_path / "m.safetensors").stat().st_size
    matrices, beside, about = storage.load(tmp_path / "m.safetensors")
    assert about == {"note": 1}
    assert torch.equal(beside["a.bias"], bias)
    for name, want in (("a", packed), ("b", flat)):
        got = matrices[name]
        assert all(torch.equal(p, w) for p, w in zip(got.planes, want.planes, strict=True))
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.zero_point, want.zero_point)
        assert torch.equal(got.dequantize(), want.dequantize())
    assert torch.equal(matrices["a"].codes().q, packed.codes().q)


def test_a_two_bit_file_is_two_bits_a_weight(tmp_path):
    rows, columns = 512, 512
    packed = Packed.of(quantize(matrix(rows, columns), 32))
    size = storage.save(tmp_path / "m.safetensors", {"w": packed.prefix(2)}, {}, {})
    assert rows * columns * 2.75 / 8 <= size <= rows * columns * 2.75 / 8 + 1024
    assert torch.equal(storage.load(tmp_path / "m.safetensors")[0]["w"].dequantize(2), packed.dequantize(2))


def test_files_get_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        storage.save(tmp_path / "m.safetensors", {"w": Packed.of(quantize(matrix(32, 64), 32))}, {}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    storage.save(path, {"w": Packed.of(quantize(matrix(32, 64), 32))}, {}, {})
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)

    def attempt(changed, meta=metadata):
        save_file(changed, path, metadata=meta)
        with pytest.raises(CheckpointError):
            storage.load(path)

    attempt(tensors | {"w.scale": tensors["w.scale"][:1].contiguous()})
    attempt(tensors | {"w.scale": torch.full_like(tensors["w.scale"], float("nan"))})
    attempt(tensors | {"w.zero_point": tensors["w.zero_point"].float()})
    attempt({n: t for n, t in tensors.items() if n != "w.plane3"})
    wrong = json.loads(metadata["matryoshka"])
    wrong["layers"]["w"]["shape"] = [32, 65]
    attempt(tensors, {"matryoshka": json.dumps(wrong)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        storage.load(path)


def test_bad_input_names_the_argument():
    packed = Packed.of(quantize(matrix(16, 32)), "matquant")
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match="from 1 to 8"):
            packed.dequantize(bits)
    with pytest.raises(TypeError, match="integer"):
        packed.dequantize(2.0)
    with pytest.raises(ValueError, match="mode"):
        packed.dequantize(2, "other")
    with pytest.raises(ValueError, match="group_size"):
        quantize(matrix(4, 64), 20)
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ValueError, match="float16 scale"):
        quantize(torch.full((1, 32), 1e10), 32, torch.float16)
    with pytest.raises(ValueError, match=r"too narrow for float16 scales; pass scale_dtype=torch\.float32"):
        quantize(torch.full((1, 32), 1e-9), 32, torch.float16)
    with pytest.raises(ValueError, match="scale"):
        Codes(packed.codes().q, torch.ones(16, 2), torch.zeros(16, 2, dtype=torch.uint8))
    flat = packed.materialize(4)
    with pytest.raises(ValueError, match="flat"):
        flat.dequantize(2)
    with pytest.raises(ValueError, match="8-bit code"):
        flat.codes()
    with pytest.raises(ValueError, match="needs 5 bits"):
        Packed.of(quantize(matrix(16, 32))).prefix(4).dequantize(4 + 1)
