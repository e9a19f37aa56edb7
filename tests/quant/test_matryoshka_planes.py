"""Ops `matryoshka_pack`, `matryoshka_slice` and `matryoshka_dequantize` in torch: schema, fake, compile, cost, and
which backend runs them.  test_matryoshka_codes.py tests their results for every code and width."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import backends, ops
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.ops._planes import EXTRA, MATQUANT, PREFIX
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.planes import Packed

OPS = torch.ops.gemmascope_fast


def case(rows=37, columns=70, group=32, mode="prefix"):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    codes = quantize(weight, group)
    return codes, Packed.of(codes, mode)


def calls(rule=PREFIX):
    codes, packed = case(mode="prefix" if rule == PREFIX else "matquant")
    read = list(packed.read(4))
    return (
        (ops.matryoshka_pack, (codes.q, 8)),
        (ops.matryoshka_slice, (read, 37, 70, 4, rule)),
        (ops.matryoshka_dequantize, (read, packed.scale, packed.zero_point, 37, 70, 32, 4, rule)),
    )


@pytest.mark.parametrize("rule", [PREFIX, MATQUANT, EXTRA])
@pytest.mark.parametrize("i", range(3))
def test_opcheck(i, rule):
    op, args = calls(rule)[i]
    torch.library.opcheck(op.dispatched, args)


@pytest.mark.parametrize("i", range(3))
def test_compiles_whole(i):
    op, args = calls()[i]
    want = op(*args)
    got = torch.compile(lambda *a: op(*a), fullgraph=True)(*args)
    assert same_bytes([got] if isinstance(got, torch.Tensor) else got, [want] if i else want)


@pytest.mark.parametrize("shape", [(0, 40), (20, 0), (1, 1), (13, 101)])
def test_shapes_and_views(shape):
    q = torch.randint(0, 256, shape[::-1], generator=torch.Generator().manual_seed(1)).to(torch.uint8).t()
    planes = ops.matryoshka_pack(q, 8)
    assert [tuple(p.shape) for p in planes] == [
        (-(-shape[0] // 16), -(-shape[1] // 32), 64 * w) for w in (2, 1, 1, 2, 2)
    ]
    assert torch.equal(ops.matryoshka_slice(planes, *shape, 8, PREFIX), q)


def test_costs_are_the_bytes_of_the_tensors():
    (pack, a), (slice_, b), (dequantize, c) = calls()
    weights = 37 * 70
    assert pack.cost(*a).bytes == 2 * weights
    planes = sum(p.numel() for p in b[0])
    assert planes == 48 * 96 // 2
    assert slice_.cost(*b).bytes == planes + weights
    assert dequantize.cost(*c).bytes == planes + 3 * 48 * 3 + 4 * weights
    assert dequantize.cost(*c).flops == 2 * weights


def test_a_backend_asked_for_by_name_serves_the_op_or_refuses_and_steps_of_others_go_on():
    codes, packed = case()
    for op, args in calls():
        with gsf.backend("native"), pytest.raises(gsf.BackendError, match=f"cannot run {op.name} on cpu"):
            op(*args)
    layer = MatryoshkaLinear(packed)
    want = layer.weight
    assert torch.equal(want, codes.dequantize())
    for name in ("native", "eager", "triton", "cuda"):
        with gsf.backend(name):
            assert torch.equal(layer.set_bits(8).weight, want)
            assert torch.equal(packed.codes().q, codes.q)
    x = torch.randn(2, 70, requires_grad=True)
    with gsf.backend("native"):
        layer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 37) @ want)


def test_info_says_what_serves():
    rows = {c.op: c for c in backends.choices() if c.device == "cpu"}
    for op in ("matryoshka_pack", "matryoshka_slice", "matryoshka_dequantize"):
        assert (rows[op].backend, rows[op].reason) == ("eager", "it has no native kernel")


def test_bad_input_is_named():
    codes, packed = case()
    planes = list(packed.planes)
    with pytest.raises(TypeError, match=r"codes: expected uint8, got torch\.float32"):
        ops.matryoshka_pack(torch.zeros(3, 3), 8)
    with pytest.raises(ValueError, match=r"codes: expected \[out_features, in_features\]"):
        ops.matryoshka_pack(codes.q[0], 8)
    with pytest.raises(ValueError, match="stored: expected a width from 1 to 8, got 0"):
        ops.matryoshka_pack(codes.q, 0)
    with pytest.raises(ValueError, match="bits: expected a width from 1 to the 4 stored, got 5"):
        ops.matryoshka_slice(planes[:3], 37, 70, 5, PREFIX)
    with pytest.raises(TypeError, match=r"planes: expected uint8, got torch\.int8"):
        ops.matryoshka_slice([p.view(torch.int8) for p in planes], 37, 70, 8, PREFIX)
    with pytest.raises(ValueError, match=r"zero_point: expected \(3, 3, 16\), got \(3, 1, 16\)"):
        ops.matryoshka_dequantize(planes, packed.scale, packed.zero_point[:, :1], 37, 70, 32, 8, PREFIX)
