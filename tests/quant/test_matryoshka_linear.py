"""MatryoshkaLinear and its op: the reference from the dequantised matrix, widths at run time, whole models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gemmascope_fast import backends
from gemmascope_fast import quant as matryoshka
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops import matryoshka_linear, matryoshka_linear_reference
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.ops.matryoshka_linear import quantize_tokens
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.model import matches
from gemmascope_fast.quant.planes import HUGE, Packed, in_huge_pages

SHAPES = [(16, 32), (50, 70), (1, 1), (33, 640), (130, 257)]


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(
    rows, columns, tokens, *, group_size=None, bits=8, mode="prefix", extra=False, flat=False, exact=False, seed=0
):
    """(arguments of the op, W_r fp64, the activations as rounded fp64, bias)."""
    packed = Packed.of(quantize(random(rows, columns, scale=0.05), group_size), mode)
    if flat:
        packed = packed.materialize(bits, mode, extra)
    x, bias, mean = random(tokens, columns, seed=1), random(rows, seed=2), random(columns, seed=3)
    layer = MatryoshkaLinear(packed, bias, bits, mode, extra and not flat, mean=mean)
    args = (
        x,
        list(packed.read(bits, mode)),
        packed.scale,
        packed.zero_point,
        bias,
        mean,
        layer.overflow_crow,
        layer.overflow_col,
        rows,
        group_size or 0,
        bits,
        layer._rule,
        exact,
    )
    return args, packed.dequantize(bits, mode, extra and not flat)


def exact_answer(args, weight):
    """fp64 on the activations as the op rounds them, and a bound of the fp32 evaluation's error."""
    x, bias, mean, exact = args[0], args[4], args[5], args[-1]
    centred = x - mean
    if not exact:
        q, s = quantize_tokens(centred)
        centred = q.double() * s.double()[:, None]
    centred = centred.double()
    # |level| <= 256 and |z| <= 255 before they cancel: what is rounded is of size α·256·Σ|v|; one rounding a product
    # of the exact path and a few a group
    columns = x.shape[1]
    alpha = args[2].double().amax()
    size = alpha * 256 * centred.abs().sum(1, keepdim=True) + bias.double().abs()
    bound = (columns + 8) * 2.0**-24 * size
    return centred @ weight.double().t() + bias.double(), bound


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", ["prefix", "matquant"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_op_and_reference_equal_the_dequantised_product(rows, columns, group_size, bits, mode, exact):
    for tokens in (1, 5):
        args, weight = case(rows, columns, tokens, group_size=group_size, bits=bits, mode=mode, exact=exact)
        want, bound = exact_answer(args, weight)
        for serve in (matryoshka_linear, matryoshka_linear_reference):
            assert bool(((serve(*args) - want).abs() <= bound).all())


def test_a_wrong_slice_would_show():
    # the bound above must be far below what one misread bit changes
    args, weight = case(50, 70, 5, bits=4)
    want, bound = exact_answer(args, weight)
    other = matryoshka_linear_reference(*case(50, 70, 5, bits=3)[0])
    assert bool(((other - want).abs() > 100 * bound).float().mean() > 0.9)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", ["prefix", "matquant"])
def test_opcheck(mode, exact):
    args, _ = case(33, 70, 3, group_size=32, bits=3, mode=mode, exact=exact)
    torch.library.opcheck(torch.ops.gemmascope_fast.matryoshka_linear.default, args)
    grad = (args[0].clone().requires_grad_(), *args[1:])
    torch.library.opcheck(torch.ops.gemmascope_fast.matryoshka_linear.default, grad)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_leading_dimensions_dtypes_and_strides(tokens):
    layer = MatryoshkaLinear.from_linear(nn.Linear(70, 50), activations="exact")
    x = random(2, 70, tokens).transpose(1, 2)
    y = layer(x)
    assert y.shape == (2, tokens, 50)
    assert torch.equal(y, layer(x.contiguous()))
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, layer(x.bfloat16().float()).bfloat16())


def test_compiles_whole():
    layer = MatryoshkaLinear.from_linear(nn.Linear(70, 50), 32, bits=4)
    x = random(3, 70)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_gradient_goes_through_the_served_weights():
    layer = MatryoshkaLinear.from_linear(nn.Linear(70, 50), 32, bits=2, mode="matquant")
    x = random(3, 70).requires_grad_()
    upstream = random(3, 50, seed=4)
    layer(x).backward(upstream)
    assert torch.allclose(x.grad, upstream @ layer.weight, rtol=1e-5, atol=1e-6)


def test_a_token_that_is_not_finite_gives_nan_and_spares_its_neighbours():
    layer = MatryoshkaLinear.from_linear(nn.Linear(70, 50))
    x = random(4, 70)
    clean = layer(x)
    x[1, 3], x[2, 69] = float("nan"), float("-inf")
    y = layer(x)
    assert bool(y[1:3].isnan().all())
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[3], clean[3])
    assert torch.equal(layer(torch.zeros(1, 70)), layer.bias[None])


def test_the_mean_moves_the_rounding_and_not_the_result():
    linear = nn.Linear(256, 64)
    x = random(64, 256)
    x[:, 7] += 300  # one massive dimension, as in Gemma's residual stream
    plain = MatryoshkaLinear.from_linear(linear)
    centred = MatryoshkaLinear.from_linear(linear, mean=x.mean(0))
    want = x @ plain.weight.t() + linear.bias
    assert (centred(x) - want).norm() < 0.05 * (plain(x) - want).norm()


def test_widths_change_without_touching_the_codes():
    linear = nn.Linear(96, 40)
    layer = MatryoshkaLinear.from_linear(linear, 32, activations="exact")
    before = [p.clone() for p in layer.packed.planes]
    addresses = [p.data_ptr() for p in layer.packed.planes]
    x = random(3, 96)
    for bits in (2, 8, 5, 1, 3):
        layer.set_bits(bits)
        assert torch.allclose(layer(x), x @ layer.weight.t() + linear.bias, atol=1e-5)
        assert torch.equal(layer.weight, layer.packed.dequantize(bits))
    layer.set_bits(2, "matquant", True)
    assert torch.allclose(layer(x), x @ layer.packed.dequantize(2, "matquant", True).t() + linear.bias, atol=1e-5)
    assert [p.data_ptr() for p in layer.packed.planes] == addresses
    assert all(torch.equal(p, b) for p, b in zip(layer.packed.planes, before, strict=True))


def test_large_planes_move_to_huge_pages_and_stay_the_same():
    plane = torch.randint(0, 256, (3, 1000, 3000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = in_huge_pages(plane)
    assert torch.equal(moved, plane)
    assert moved.is_contiguous()
    assert moved.data_ptr() % HUGE == 0
    small = plane[:1, :10].contiguous()
    assert in_huge_pages(small) is small
    again = pickle.loads(pickle.dumps(moved))
    assert torch.equal(again, plane)
    assert torch.equal(copy.deepcopy(moved), plane)


def test_casting_a_model_leaves_scales_alone():
    layer = MatryoshkaLinear.from_linear(nn.Linear(96, 40), 32, mean=random(96))
    want = layer.weight
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert cast.scale.dtype == torch.float16
    assert cast.mean.dtype == torch.float32
    assert torch.equal(cast.weight, want)


def test_state_dict_round_trip():
    layer = MatryoshkaLinear.from_linear(nn.Linear(96, 40), 32, bits=4, mean=random(96))
    other = MatryoshkaLinear.from_linear(nn.Linear(96, 40), 32, bits=4, mean=random(96, seed=5))
    x = random(2, 96)
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


# ---- models ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(32, 32)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(32, 64), "down_proj": nn.Linear(64, 32)})

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


class Tiny(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.lm_head.weight = self.embed.weight  # tied

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(10)[None]


def test_scopes_name_the_layers_they_say():
    model = Tiny()
    ffn = {f"layers.{i}.mlp.{n}_proj" for i in range(3) for n in ("up", "down")}
    every = ffn | {f"layers.{i}.attn" for i in range(3)}
    assert set(matryoshka.targets(model)) == ffn
    assert set(matryoshka.targets(model, "all-linear")) == every
    assert set(matryoshka.targets(model, "all-linear", head=True)) == every | {"lm_head"}


def test_a_quantised_model_answers_as_its_dequantised_weights_do():
    model = Tiny()
    table = model.embed.weight.clone()
    twin = copy.deepcopy(model)
    matryoshka.quantize_(model, "all-linear", group_size=32, head=True, activations="exact")
    assert torch.equal(model.embed.weight, table)
    for widths in (8, 3, {"layers.0-1": 4, "…down_proj": 2}):
        matryoshka.set_bits(model, widths)
        twin = Tiny()
        twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
        for name, layer in matryoshka.layers(model).items():
            twin.get_submodule(name).weight.data = layer.weight
        assert torch.allclose(model(IDS), twin(IDS), atol=1e-4)


def test_patterns():
    names = [f"model.layers.{i}.mlp.{n}_proj" for i in range(12) for n in ("up", "gate", "down")]

    def hits(pattern):
        return [n for n in names if matches(pattern, n)]

    assert len(hits("model.layers.0-5")) == 18
    assert hits("model.layers.1") == names[3:6]  # and not layer 11
    assert len(hits("…mlp.down_proj")) == 12
    assert len(hits("...down_proj")) == 12
    assert len(hits("model.layers.*.mlp.*_proj")) == 36
    assert len(hits("…")) == 36
    assert hits("layers.1") == []
    assert hits("mlp.down_proj") == []
    assert hits("…proj") == []


def test_widths_by_pattern_later_over_earlier():
    model = matryoshka.quantize_(Tiny(), "all-linear")
    matryoshka.set_bits(model, {"…": 8, "layers.0-1": 4, "…mlp.down_proj": 2})
    widths = {name: layer.bits for name, layer in matryoshka.layers(model).items()}
    assert widths["layers.0.attn"] == 4
    assert widths["layers.1.mlp.down_proj"] == 2
    assert widths["layers.2.attn"] == 8
    assert widths["layers.2.mlp.down_proj"] == 2
    assert matryoshka.nbytes(model) == sum(layer.nbytes() for layer in matryoshka.layers(model).values())


def test_bad_input_changes_nothing():
    model = Tiny()
    with pytest.raises(ValueError, match="no quantised layer"):
        matryoshka.set_bits(model, 4)
    with pytest.raises(ValueError, match="scope"):
        matryoshka.quantize_(model, "everything")
    with pytest.raises(ValueError, match="has no linear layer"):
        matryoshka.quantize_(nn.Sequential(nn.ReLU()), "all-linear")
    with pytest.raises(ValueError, match="from 1 to 8"):
        matryoshka.quantize_(model, bits=9)
    assert not matryoshka.layers(model)
    matryoshka.quantize_(model)
    with pytest.raises(ValueError, match="already quantised"):
        matryoshka.quantize_(model)
    for widths, message in [
        ({"layers.0": 4, "layers.7": 2}, "matches none"),
        ({"layers.0": 4, "layers.1": 0}, "1 to 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            matryoshka.set_bits(model, widths)
    with pytest.raises(ValueError, match="1 to 8"):
        matryoshka.set_bits(model, 9)
    assert {layer.bits for layer in matryoshka.layers(model).values()} == {8}
    with pytest.raises(ValueError, match="in_features = 32"):
        next(iter(matryoshka.layers(model).values()))(torch.zeros(1, 31))


@pytest.mark.parametrize("bits", [8, 2])
def test_saved_models_answer_the_same(tmp_path, bits):
    model = matryoshka.quantize_(Tiny(), group_size=32)
    matryoshka.set_bits(model, bits)
    path = tmp_path / "codes.safetensors"
    size = matryoshka.save(model, path, bits)
    weights = sum(layer.in_features * layer.out_features for layer in matryoshka.layers(model).values())
    biases = sum(4 * layer.out_features for layer in matryoshka.layers(model).values())
    assert weights * (bits + 0.75) / 8 <= size - biases <= weights * (bits + 0.75) / 8 + 10_000
    back = matryoshka.load_(Tiny(), path)
    assert torch.equal(back(IDS), model(IDS))
    assert matryoshka.save(back, tmp_path / "again.safetensors") == size  # what was narrowed stays so
    with pytest.raises(ValueError, match="already quantised"):
        matryoshka.load_(back, path)
    with pytest.raises(CheckpointError, match="no linear layer"):
        matryoshka.load_(Tiny(2), path)


def test_eager_backend_serves():
    layer = MatryoshkaLinear.from_linear(nn.Linear(96, 40))
    with backends.backend("eager"):
        assert layer(random(2, 96)).shape == (2, 40)
