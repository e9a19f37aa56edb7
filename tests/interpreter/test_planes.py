"""Triton pack, slice and dequantise against the references: every code, width and rule, byte for byte."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import planes as gpu
from gemmascope_fast.ops._planes import EXTRA, MATQUANT, PREFIX, WIDTHS
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.ops.matryoshka_slice import resliced
from gemmascope_fast.quant.planes import Packed

ALL = torch.arange(256, dtype=torch.uint8)
SHAPES = [(1, 1), (16, 32), (17, 33), (5, 257), (50, 70), (33, 600)]
RULES = (PREFIX, MATQUANT, EXTRA)


def random_codes(rows, columns, bits=8):
    g = torch.Generator().manual_seed(rows * columns + bits)
    return torch.randint(0, 1 << bits, (rows, columns), generator=g).to(torch.uint8)


def scales(rows, columns, group, dtype):
    """Scale and zero point [out/16, groups, 16] with something in the padding, which nobody may use."""
    g = torch.Generator().manual_seed(columns)
    shape = (-(-rows // 16), -(-columns // group) if group else 1, 16)
    return torch.rand(shape, generator=g).to(dtype), torch.randint(0, 256, shape, generator=g).to(torch.uint8)


@pytest.mark.parametrize("stored", WIDTHS)
def test_every_code_and_what_becomes_of_it_at_every_width(stored, same_bytes):
    codes = ALL[: 1 << stored].repeat(-(-256 // (1 << stored))).reshape(4, 64)
    planes = gpu.matryoshka_pack(codes, stored)
    same_bytes(planes, ops.matryoshka_pack_reference(codes, stored))
    scale, zero = scales(4, 64, 32, torch.float32)
    for bits in range(1, stored + 1):
        for rule in RULES:
            got = gpu.matryoshka_slice(planes, 4, 64, bits, rule)
            same_bytes(got, resliced(codes, stored, bits, rule))
            args = planes, scale, zero, 4, 64, 32, bits, rule
            same_bytes(gpu.matryoshka_dequantize(*args), ops.matryoshka_dequantize_reference(*args))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("stored", [1, 2, 4, 7, 8])
def test_odd_shapes(rows, columns, stored, same_bytes):
    codes = random_codes(rows, columns, stored)
    planes = gpu.matryoshka_pack(codes, stored)
    same_bytes(planes, ops.matryoshka_pack_reference(codes, stored))
    same_bytes(gpu.matryoshka_slice(planes, rows, columns, stored, PREFIX), codes)
    for group, dtype in ((0, torch.float32), (32, torch.float16), (96, torch.float16), (320, torch.float32)):
        args = planes, *scales(rows, columns, group, dtype), rows, columns, group, max(1, stored - 1), MATQUANT
        same_bytes(gpu.matryoshka_dequantize(*args), ops.matryoshka_dequantize_reference(*args))


def test_high_bits_of_a_narrow_code_do_not_reach_a_plane(same_bytes):
    codes = random_codes(20, 40)
    same_bytes(gpu.matryoshka_pack(codes, 3), ops.matryoshka_pack_reference(codes & 7, 3))


def test_views_and_matrices_of_nothing(same_bytes):
    codes = random_codes(70, 50).t()
    planes = gpu.matryoshka_pack(codes, 8)
    same_bytes(planes, ops.matryoshka_pack_reference(codes, 8))
    strided = [p.transpose(0, 1).contiguous().transpose(0, 1) for p in planes]
    same_bytes(gpu.matryoshka_slice(strided, 50, 70, 8, PREFIX), codes.contiguous())
    for shape in ((0, 40), (20, 0), (0, 0)):
        empty = torch.zeros(shape, dtype=torch.uint8)
        planes = gpu.matryoshka_pack(empty, 8)
        same_bytes(planes, ops.matryoshka_pack_reference(empty, 8))
        same_bytes(gpu.matryoshka_slice(planes, *shape, 4, PREFIX), empty)
        args = planes, *scales(*shape, 0, torch.float32), *shape, 0, 4, PREFIX
        same_bytes(gpu.matryoshka_dequantize(*args), ops.matryoshka_dequantize_reference(*args))


@pytest.mark.parametrize(("mode", "extra"), [("prefix", False), ("matquant", False), ("matquant", True)])
def test_a_packed_matrix_is_sliced_and_materialised_by_the_kernels(mode, extra, same_bytes):
    """Through the op, as a GPU would: what serves is asked for by name."""
    codes = quantize(torch.randn(37, 100, generator=torch.Generator().manual_seed(3)), 32)
    want = Packed.of(codes, mode)
    with gsf.backend("triton"):
        planes = ops.matryoshka_pack(codes.q, 8)
        same_bytes(planes, want.planes)
        for bits in (2, 4, 8):
            rule = EXTRA if extra else MATQUANT if mode == "matquant" else PREFIX
            read = list(want.read(bits, mode))
            code = ops.matryoshka_slice(read, 37, 100, bits, rule)
            same_bytes(code, want.sliced(bits, mode, extra))
            weight = ops.matryoshka_dequantize(read, want.scale, want.zero_point, 37, 100, 32, bits, rule)
            same_bytes(weight, codes.dequantize(bits, mode, extra))
            flat = ops.matryoshka_pack(code.clamp(max=(1 << bits) - 1), bits)
            same_bytes(flat, want.materialize(bits, mode, extra).planes)


def test_what_does_not_fit_is_refused_with_the_reference_s_words():
    planes = gpu.matryoshka_pack(random_codes(16, 32), 8)
    scale, zero = scales(16, 32, 0, torch.float32)
    for bad, words in (((planes[:1], 16, 32, 4, 0), "bits"), ((planes, 17, 32, 4, 0), "planes"),
                       ((planes, 16, 32, 4, 3), "rule")):  # fmt: skip
        for function in (gpu.matryoshka_slice, ops.matryoshka_slice_reference):
            with pytest.raises(ValueError, match=f"^{words}: expected"):
                function(*bad)
    for function in (gpu.matryoshka_dequantize, ops.matryoshka_dequantize_reference):
        with pytest.raises(ValueError, match="group_size: expected"):
            function(planes, scale, zero, 16, 32, 16, 4, 0)
        with pytest.raises(ValueError, match="scale: expected"):
            function(planes, scale[:, :, :8], zero, 16, 32, 0, 4, 0)
        with pytest.raises(TypeError, match="zero_point: expected uint8"):
            function(planes, scale, zero.int(), 16, 32, 0, 4, 0)
    for function in (gpu.matryoshka_pack, ops.matryoshka_pack_reference):
        with pytest.raises(TypeError, match="codes: expected uint8"):
            function(torch.zeros(3, 3), 8)
        with pytest.raises(ValueError, match="stored: expected"):
            function(random_codes(3, 3), 9)


def test_offsets_beyond_2_to_the_31(last_program, same_bytes):
    """A matrix of 2^31 weights and more; pages that nobody touches are never there."""
    columns, rows = 2**17, 2**14 + 16
    codes, block = torch.empty(rows, columns, dtype=torch.uint8), random_codes(16, 256)
    codes[-16:, -256:] = block
    planes = gpu.matryoshka_pack(codes, 8)
    small = ops.matryoshka_pack_reference(block, 8)
    same_bytes([p[-1:, -8:] for p in planes], small)
    got = gpu.matryoshka_slice(planes, rows, columns, 8, PREFIX)
    same_bytes(got[-16:, -256:], block)
    scale, zero = scales(rows, columns, 0, torch.float32)
    weight = gpu.matryoshka_dequantize(planes, scale, zero, rows, columns, 0, 8, PREFIX)
    want = ops.matryoshka_dequantize_reference(small, scale[-1:], zero[-1:], 16, 256, 0, 8, PREFIX)
    same_bytes(weight[-16:, -256:], want)
