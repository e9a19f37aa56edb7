"""Triton matryoshka_linear against the native kernel: every width and slicing, byte for byte."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import matryoshka as gpu
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.planes import Packed


def layer_args(rows, columns, tokens, bits, mode="prefix", extra=False, group_size=None, exact=False, flat=False):
    g = torch.Generator().manual_seed(rows + columns + bits)
    packed = Packed.of(quantize(torch.randn(rows, columns, generator=g) * 0.05, group_size), mode)
    if flat:
        packed = packed.materialize(bits, mode, extra)
    bias, mean = torch.randn(rows, generator=g), torch.randn(columns, generator=g)
    layer = MatryoshkaLinear(packed, bias, bits, mode, extra and not flat, mean=mean)
    x = torch.randn(tokens, columns, generator=g)
    return (
        x, list(packed.read(bits, mode)), packed.scale, packed.zero_point, bias, mean, layer.overflow_crow,
        layer.overflow_col, rows, group_size or 0, bits, layer._rule, exact,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("rows", "columns", "tokens", "group"), [(16, 32, 1, None), (50, 70, 3, 32), (33, 200, 2, 96)])
def test_prefix_slices(bits, rows, columns, tokens, group, same_bytes):
    args = layer_args(rows, columns, tokens, bits, group_size=group)
    same_bytes(gpu.matryoshka_linear(*args), ops.matryoshka_linear(*args))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("extra", [False, True])
def test_the_paper_s_slices(bits, extra, same_bytes):
    args = layer_args(40, 70, 3, bits, "matquant", extra)
    same_bytes(gpu.matryoshka_linear(*args), ops.matryoshka_linear(*args))


def test_all_planes_given_a_slice_reads_what_it_needs(same_bytes):
    packed = Packed.of(quantize(torch.randn(40, 70), None), "prefix")
    for bits in (2, 4, 6):
        args = list(layer_args(40, 70, 3, bits))
        args[1], args[2], args[3] = list(packed.planes), packed.scale, packed.zero_point
        same_bytes(gpu.matryoshka_linear(*args), ops.matryoshka_linear(*args))
    assert gpu.planes_of([2, 1, 1, 2, 2], 8, 2, 0) == (2, 1)
    assert gpu.planes_of([2, 1, 1, 2, 2], 8, 4, 1) == (6, 4)


def test_wide_groups_many_tokens_and_tokens_that_are_not_finite(same_bytes):
    args = list(layer_args(20, 600, 18, 4))
    args[0][3, 5], args[0][7, 0] = float("nan"), float("inf")
    got, want = gpu.matryoshka_linear(*args), ops.matryoshka_linear(*args)
    good = torch.isfinite(args[0]).all(1)
    same_bytes(got[good], want[good])
    assert bool(got[~good].isnan().all())


def test_what_has_no_kernel_is_served_by_the_reference_or_refused():
    args = layer_args(20, 70, 2, 4, exact=True)
    torch.testing.assert_close(gpu.matryoshka_linear(*args), ops.matryoshka_linear(*args))
    with gsf.backend("triton"), pytest.raises(gsf.BackendError, match="fp32 activations"):
        gpu.matryoshka_linear(*args)
