"""Nested codes on the device: products, planes and weights, byte for byte what the CPU gives."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.backends.gpu import register
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.planes import Packed

BACKENDS = ["triton", *(["cuda"] if register.compiled("matryoshka_linear") else [])]


def layer(rows, columns, group, mode="prefix", bits=8, extra=False):
    g = torch.Generator().manual_seed(rows)
    packed = Packed.of(quantize(torch.randn(rows, columns, generator=g) * 0.05, group), mode)
    mean, bias = torch.randn(columns, generator=g) / 4, torch.randn(rows, generator=g)
    return MatryoshkaLinear(packed, bias, bits, mode, extra, mean=mean).requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 3, 16])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("rows", "columns", "group"), [(9216, 2304, None), (2304, 9216, 32), (37, 1100, 96)])
def test_products_are_the_cpu_s(backend, T, bits, rows, columns, group):
    module, x = layer(rows, columns, group, bits=bits), torch.randn(T, columns)
    module(x)  # folds the mean into the bias on the CPU: its sum has no fixed order
    offset, want = module._offset, module(x)
    module = module.cuda()
    module._offset = offset.cuda()
    with gsf.backend(backend):
        assert same_bytes([module(x.cuda()).cpu()], [want])


@pytest.mark.parametrize(("mode", "extra"), [("prefix", False), ("matquant", False), ("matquant", True)])
@pytest.mark.parametrize(("rows", "columns", "group"), [(9216, 2304, None), (37, 1100, 96)])
def test_planes_and_weights_are_the_cpu_s(mode, extra, rows, columns, group):
    codes = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05, group)
    packed = Packed.of(codes, mode)
    there = packed.to("cuda")
    assert same_bytes([there.codes().q.cpu()], [codes.q])
    for bits in (8, 4, 2):
        assert same_bytes([there.dequantize(bits, mode, extra).cpu()], [packed.dequantize(bits, mode, extra)])
        flat, want = there.materialize(bits, mode, extra), packed.materialize(bits, mode, extra)
        assert same_bytes([p.cpu() for p in flat.planes], want.planes)
        assert same_bytes([flat.dequantize().cpu()], [want.dequantize()])
