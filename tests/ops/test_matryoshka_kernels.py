"""The native matryoshka kernels: the same results on every instruction set and for any other tokens in the batch."""

import pytest
import torch

from gemmascope_fast import backends
from gemmascope_fast.ops import matryoshka_linear_reference
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.ops.matryoshka_linear import quantize_tokens
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.planes import Packed

pytestmark = pytest.mark.skipif(backends.isa() is None, reason="the extension is not built")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(rows, columns, group_size=None, **options):
    packed = Packed.of(quantize(random(rows, columns) * 0.05, group_size), options.get("mode", "prefix"))
    return MatryoshkaLinear(packed, random(rows, seed=2), mean=random(columns, seed=3), **options)


def by_isa(layer, x):
    answers = {}
    for isa in backends.supported_isas():
        with backends.forced_isa(isa):
            assert backends.isa() == isa
            answers[isa] = layer(x)
    return answers


@pytest.mark.parametrize("activations", ["int8", "exact"])
@pytest.mark.parametrize("mode", ["prefix", "matquant"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [None, 32, 1024])
def test_every_instruction_set_gives_the_same_bytes(group_size, bits, mode, activations):
    layer = layer_of(37, 1100, group_size, bits=bits, mode=mode, activations=activations)
    for tokens in (1, 3, 6, 19):
        answers = by_isa(layer, random(tokens, 1100, seed=tokens))
        for isa, y in answers.items():
            assert torch.equal(y, answers["plain"]), isa


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", range(1, 8))
def test_flat_copies_and_extra_precision(bits, group_size):
    packed = Packed.of(quantize(random(50, 70), group_size), "matquant")
    x = random(5, 70, seed=1)
    nested = MatryoshkaLinear(packed, None, bits, "matquant", True)
    flat = MatryoshkaLinear(packed.materialize(bits, "matquant", True))
    assert flat.overflow_col.numel() > 0
    assert nested.nbytes() >= packed.nbytes(bits, "matquant")
    for isa, y in by_isa(flat, x).items():
        # the same integers either way: a code above the top is read in the planes or added from the list
        assert torch.equal(y, by_isa(nested, x)[isa])
    clamped = MatryoshkaLinear(packed.materialize(bits, "matquant"))
    assert not torch.equal(clamped(x), flat(x))


@pytest.mark.parametrize("activations", ["int8", "exact"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_a_token_depends_on_nothing_but_itself(group_size, activations):
    layer = layer_of(37, 200, group_size, bits=3, activations=activations)
    x = random(40, 200, seed=5)
    whole = layer(x)
    for first, last in [(0, 1), (1, 4), (4, 10), (10, 25), (25, 40)]:
        assert torch.equal(layer(x[first:last]), whole[first:last])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 2, 4, 17])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("isa", backends.supported_isas())
def test_integers_at_their_limits_do_not_saturate(isa, bits, tokens):
    # every code the greatest or 0 and every activation ±127: maddubs would saturate, int16 sums would wrap
    columns = 4096
    weight = torch.full((16, columns), 1.0)
    weight[1::2] = -1.0
    weight[2] = torch.where(torch.arange(columns) % 2 == 0, 1.0, -1.0)
    packed = Packed.of(quantize(weight), "matquant")
    x = torch.full((tokens, columns), 127.0)
    x[1:][-1:, ::2] = -127.0  # of several tokens the last
    served = [MatryoshkaLinear(packed, None, bits, "prefix"), MatryoshkaLinear(packed, None, bits, "matquant")]
    if bits < 8:  # one above the greatest: 16 of 4 bits
        served.append(MatryoshkaLinear(packed.materialize(bits, "matquant", True)))
        assert served[-1].overflow_col.numel() > 0
    for layer in served:
        want = x.double() @ layer.weight.double().t()
        with backends.forced_isa(isa):
            got = layer(x)
        error = (got - want).abs()
        # sums of at most 255·127·4096 < 2^27 of a scale of 2/255, rounded to fp32 five times before they cancel: 0.25;
        # one pair that saturates is 250 away
        assert bool((error <= 0.25).all())
        if bits == 8:  # nothing cancels: one rounding to fp32, one by α, one by the token's scale
            assert bool((error <= 4 * 2.0**-24 * want.abs()).all())


@pytest.mark.parametrize("isa", backends.supported_isas())
def test_activations_are_rounded_as_the_reference_rounds_them(isa):
    # an identity read at 8 bits shows the tokens' codes themselves
    columns = 64
    packed = Packed.of(quantize(torch.eye(columns)))
    x = random(9, columns, seed=8) * torch.logspace(-42, 37, 9)[:, None]
    x[4] = torch.arange(columns) - 32.0
    x[4, 0] = 127.0  # scale 1: halves and integers meet the rounding exactly
    x[4, 1:8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    q, s = quantize_tokens(x)
    with backends.forced_isa(isa):
        got = MatryoshkaLinear(packed)(x)
    codes = torch.round(got.double() / s.double()[:, None])
    assert torch.equal(codes, q.double())


def test_the_reference_is_asked_for_by_name():
    layer = layer_of(20, 64, 32)
    x = random(3, 64)
    args = (
        x,
        list(layer.packed.planes),
        layer.scale,
        layer.zero_point,
        layer._offset,
        layer.mean,
        None,
        None,
        20,
        32,
        8,
        0,
        False,
    )
    layer(x)
    with backends.backend("eager"):
        assert torch.equal(layer(x), matryoshka_linear_reference(*args[:4], layer._offset, *args[5:]))


def test_bad_tensors_are_refused_by_the_kernel():
    layer = layer_of(20, 64)
    x = random(2, 64)

    def call(**changed):
        args = {
            "x": x,
            "planes": list(layer.packed.planes),
            "scale": layer.scale,
            "zero_point": layer.zero_point,
            "bias": None,
            "mean": None,
            "crow": None,
            "col": None,
            "out": 20,
            "group_size": 0,
            "bits": 8,
            "rule": 0,
            "exact": False,
        }
        return torch.ops.gemmascope_fast.matryoshka_linear.default(*(args | changed).values())

    call()
    for changed, error, message in [
        ({"x": x.int()}, TypeError, "floating"),
        ({"x": x[:, :30]}, ValueError, "planes"),
        ({"planes": layer.packed.planes[:4]}, ValueError, "bits"),
        ({"planes": [p.int() for p in layer.packed.planes]}, TypeError, "uint8"),
        ({"planes": [*layer.packed.planes[:4], layer.packed.planes[4][:, :, :64]]}, ValueError, "planes|bits"),
        ({"bits": 9}, ValueError, "bits"),
        ({"rule": 3}, ValueError, "rule"),
        ({"out": 40}, ValueError, "planes"),
        ({"group_size": 20}, ValueError, "group_size"),
        ({"scale": layer.scale.double()}, TypeError, "scale"),
        ({"bias": torch.zeros(3)}, ValueError, "bias"),
        ({"mean": torch.zeros(3)}, ValueError, "mean"),
        ({"crow": torch.zeros(21, dtype=torch.int64)}, ValueError, "overflow"),
        (
            {"crow": torch.tensor([0] * 20 + [1]), "col": torch.tensor([64], dtype=torch.int32)},
            IndexError,
            "col_indices",
        ),
    ]:
        with pytest.raises(error, match=message):
            call(**changed)
