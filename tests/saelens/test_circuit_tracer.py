"""Accelerated circuit-tracer transcoders compared with the original ones."""

import copy

import pytest
import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_relu_transcoder,
)
from lens_saes import D_IN as D
from lens_saes import D_SAE as WIDTH
from lens_saes import LargestTensor, fill, tokens
from torch.nn import functional as F

import gemmascope_fast as gsf
from gemmascope_fast.dropin import circuit_tracer as ours

LAYERS, POSITIONS = 3, 40
CPU = torch.device("cpu")


def single(layer=0, skip=False, relu=False, dtype=torch.float32):
    activation = F.relu if relu else JumpReLU(torch.zeros(WIDTH, dtype=dtype), 0.1)
    made = SingleLayerTranscoder(D, WIDTH, activation, layer, skip_connection=skip, device=CPU, dtype=dtype)
    return fill(made, layer).requires_grad_(False)


def cross(skip=False, relu=False):
    kind = "relu" if relu else "jump_relu"
    more = {"skip_connection": skip, "lazy_decoder": False, "device": CPU, "dtype": torch.float32}
    return fill(CrossLayerTranscoder(LAYERS, WIDTH, D, activation_function=kind, **more)).requires_grad_(False)


def inputs(layers=LAYERS, seed=9):
    return tokens(layers, POSITIONS, D, seed=seed)


def assert_same(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            assert_same(got[key], wanted[key])
    elif isinstance(wanted, tuple):
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    elif wanted.is_sparse:
        got, wanted = got.coalesce(), wanted.coalesce()
        assert got.shape == wanted.shape
        assert torch.equal(got.indices(), wanted.indices())
        torch.testing.assert_close(got.values(), wanted.values())
    else:
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_single_layer(skip, relu):
    plain, x = single(skip=skip, relu=relu), inputs(1)[0]
    fast = gsf.accelerate(copy.deepcopy(plain))
    assert isinstance(fast, SingleLayerTranscoder)
    for zero in (slice(0, 1), slice(0, 4), slice(0, 0), [1, 7]):
        acts, rows = fast.encode_sparse(x, zero_positions=zero)
        assert_same((acts, rows), plain.encode_sparse(x, zero_positions=zero))
        assert_same(fast.decode_sparse(acts, x), plain.decode_sparse(acts, x))
    assert_same(fast.encode(x), plain.encode(x))
    assert_same(fast.encode(x, apply_activation_function=False), plain.encode(x, apply_activation_function=False))
    assert_same(fast(x), plain(x))


def test_gradients_reach_inputs_and_encoder():
    plain = single(skip=True).requires_grad_(True)
    fast, grads = gsf.accelerate(copy.deepcopy(plain)), []
    for each in (fast, plain):
        x = inputs(1)[0].requires_grad_()
        acts, _ = each.encode_sparse(x)
        (each(x).pow(2).sum() + acts.coalesce().values().pow(2).sum()).backward()
        grads.append([x.grad, each.W_enc.grad, each.b_enc.grad, each.W_dec.grad, each.b_dec.grad, each.W_skip.grad])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_set_of_transcoders():
    plain = TranscoderSet({i: single(i) for i in range(LAYERS)}, "hook_resid_mid", "hook_mlp_out")
    fast, x = gsf.accelerate(copy.deepcopy(plain)), inputs()
    assert all(isinstance(t, ours.AcceleratedTranscoder) for t in fast)
    for zero in (slice(0, 1), slice(0, 4)):
        assert_same(fast.compute_attribution_components(x, zero), plain.compute_attribution_components(x, zero))
    matrix = fast.compute_attribution_components(x)["activation_matrix"]
    assert_same(fast.select_decoder_vectors(matrix), plain.select_decoder_vectors(matrix))
    assert_same(fast.encode_layer(x[1], 1), plain.encode_layer(x[1], 1))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_cross_layer(skip, relu):
    plain, x = cross(skip, relu), inputs()
    fast = gsf.accelerate(copy.deepcopy(plain))
    assert isinstance(fast, CrossLayerTranscoder)
    for zero in (slice(0, 1), slice(0, 4)):
        assert_same(fast.encode_sparse(x, zero), plain.encode_sparse(x, zero))
        assert_same(fast.compute_attribution_components(x, zero), plain.compute_attribution_components(x, zero))
    assert_same(fast.encode(x), plain.encode(x))
    assert_same(fast.encode_layer(x[2], 2), plain.encode_layer(x[2], 2))
    assert_same(fast(x), plain.decode(plain.encode(x).to_sparse(), x))


def test_positions_where_nothing_fires():
    fast, x = gsf.accelerate(cross()), inputs()
    x[:, -3:] = 0
    components = fast.compute_attribution_components(x)
    assert components["reconstruction"].shape == x.shape
    torch.testing.assert_close(components["reconstruction"][:, -1], fast.b_dec.detach())
    nothing = fast.compute_attribution_components(torch.zeros_like(x))
    assert nothing["activation_matrix"]._nnz() == 0
    assert nothing["decoder_vecs"].shape == (0, D)
    assert nothing["decoder_locations"].shape == (2, 0)


def test_attribution_holds_nothing_dense():
    x = inputs().repeat(1, 8, 1)
    sources = {i: single(i) for i in range(LAYERS)}
    for fast in (gsf.accelerate(TranscoderSet(sources, "a", "b")), gsf.accelerate(cross())):
        with torch.no_grad():  # so few fire that what it gives is smaller than one layer's [n_pos, d_transcoder]
            for name, t in (*fast.named_parameters(), *fast.named_buffers()):
                if "threshold" in name:
                    t.add_(1.0)
        assert fast.compute_attribution_components(x)["decoder_vecs"].numel() > 0
        with LargestTensor() as largest:
            fast.compute_attribution_components(x)
        assert largest.elements < x.shape[1] * WIDTH


def test_weights_read_lazily(tmp_path):
    single(relu=True).to_safetensors(tmp_path / "one.safetensors")
    cross().to_safetensors(tmp_path / "cross")
    x = inputs()
    for lazy in (False, True):
        how = {"device": CPU, "dtype": torch.float32, "lazy_encoder": lazy, "lazy_decoder": lazy}
        plain = load_relu_transcoder(str(tmp_path / "one.safetensors"), 0, **how).requires_grad_(False)
        wanted = plain.encode_sparse(x[0])
        assert_same(gsf.accelerate(plain).encode_sparse(x[0]), wanted)
        clt = load_clt(str(tmp_path / "cross"), **how).requires_grad_(False)
        wanted = clt.compute_attribution_components(x)
        assert_same(gsf.accelerate(clt).compute_attribution_components(x), wanted)


def test_weights_that_change_are_noticed():
    for plain, x in ((single(), inputs(1)[0]), (cross(), inputs())):
        fast = gsf.accelerate(copy.deepcopy(plain))
        fast.encode_sparse(x)
        for each in (plain, fast):
            each.W_enc.mul_(1.25)
            each.b_enc.data = each.b_enc.data + 0.125
        assert_same(fast.encode_sparse(x), plain.encode_sparse(x))


def test_made_from_this_packages_transcoders(tmp_path):
    def own(seed, skip):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"W_enc": (D, WIDTH), "W_dec": (WIDTH, D), "b_enc": (WIDTH,), "b_dec": (D,)}
        weights = {name: torch.randn(shape, generator=generator) / D**0.5 for name, shape in shapes.items()}
        weights["threshold"] = torch.full((WIDTH,), 1.75)
        if not skip:
            return gsf.JumpReLUTranscoder(**weights)
        return gsf.JumpReLUSkipTranscoder(**weights, W_skip=torch.randn(D, D, generator=generator))

    x = inputs()
    for skip in (False, True):
        sources = {i: own(i, skip) for i in range(LAYERS)}
        made = ours.transcoder_set(sources, "hook_resid_mid", "hook_mlp_out", scan="tiny")
        assert isinstance(made, TranscoderSet)
        got = made.compute_attribution_components(x, slice(0, 0))["reconstruction"]
        torch.testing.assert_close(got, torch.stack([sources[i](x[i]) for i in range(LAYERS)]))
        assert made[0].W_enc.data_ptr() == sources[0].W_enc.data_ptr()
        made.to_safetensors(tmp_path / str(skip))
        torch.testing.assert_close(
            load_relu_transcoder(str(tmp_path / str(skip) / "layer_1.safetensors"), 1, CPU)(x[1]), sources[1](x[1])
        )
    plain = cross(skip=True)
    source = gsf.CrossLayerTranscoder.from_weights(
        W_enc=[w.t() for w in plain.W_enc],
        W_dec=list(plain.W_dec),
        b_enc=list(plain.b_enc),
        b_dec=list(plain.b_dec),
        threshold=[t[0] for t in plain.activation_function.threshold],
        W_skip=list(plain.W_skip),
    )
    made = ours.cross_layer_transcoder(source, "hook_resid_mid", "hook_mlp_out")
    assert_same(made.compute_attribution_components(x), plain.compute_attribution_components(x))
    torch.testing.assert_close(made(x), source(x))


def test_what_is_refused():
    with pytest.raises(TypeError, match="activation_function"):
        gsf.accelerate(SingleLayerTranscoder(D, WIDTH, F.gelu, 0, device=CPU))
    with pytest.raises(ValueError, match="inplace"):
        gsf.accelerate(single(), inplace=False)
    negative = gsf.accelerate(single())
    negative.activation_function.threshold.data[3] = -1.0
    with pytest.raises(ValueError, match="threshold"):
        negative.encode_sparse(inputs(1)[0])
    with pytest.raises(TypeError, match="JumpReLUTranscoder"):
        ours.transcoder(torch.nn.Linear(2, 2), 0)


def ranked(k=7, skip=False, layer=0):
    made = SingleLayerTranscoder(D, WIDTH, TopK(k), layer, skip_connection=skip, device=CPU, dtype=torch.float32)
    return fill(made, layer).requires_grad_(False)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("k", [1, 7, 120, WIDTH])
def test_top_k(skip, k):
    """With a large k negative pre-activations are among the greatest: circuit-tracer keeps them."""
    plain, x = ranked(k, skip), inputs()[0]
    fast = gsf.accelerate(copy.deepcopy(plain))
    wanted = plain.encode(x)
    assert bool((wanted < 0).any()) == (k > 100)
    assert torch.equal(fast.encode(x) != 0, wanted != 0)
    torch.testing.assert_close(fast.encode(x), wanted)
    torch.testing.assert_close(fast(x), plain(x))
    assert_same(fast.encode_sparse(x), plain.encode_sparse(x))
    fast.activation_function.k = k = max(1, k // 2)
    plain.activation_function.k = k
    torch.testing.assert_close(fast.encode(x), plain.encode(x))


def test_top_k_gradients():
    plain, x = ranked(), inputs()[0]
    grads = []
    for each in (plain, gsf.accelerate(copy.deepcopy(plain))):
        at = x.clone().requires_grad_()
        each.encode(at).square().sum().backward()
        grads.append(at.grad)
    torch.testing.assert_close(*grads)


def test_sets_of_top_k_transcoders():
    plain = TranscoderSet({i: ranked(layer=i) for i in range(LAYERS)}, "hook_in", "hook_out")
    fast = gsf.accelerate(copy.deepcopy(plain))
    assert_same(fast.compute_attribution_components(inputs()), plain.compute_attribution_components(inputs()))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("k", [7, WIDTH])
def test_this_packages_top_k_transcoders(skip, k):
    weights = {name: p.detach() for name, p in fill(single()).named_parameters() if name.startswith(("W", "b_"))}
    given = weights | {"W_enc": weights["W_enc"].t(), "threshold": torch.zeros(WIDTH)}
    if skip:
        own = gsf.TopKSkipTranscoder.from_weights(**given, k=k, W_skip=torch.eye(D))
    else:
        own = gsf.TopKTranscoder.from_weights(**given, k=k)
    made, x = ours.transcoder(own, 3), inputs()[0]
    torch.testing.assert_close(made.encode(x), own.encode(x))
    torch.testing.assert_close(made(x), own(x))


def test_a_cross_layer_transcoder_takes_no_top_k():
    with_top_k = cross()
    with_top_k.activation_function = TopK(3)
    with pytest.raises(TypeError, match="expected JumpReLU, ReLU or, of one layer, TopK"):
        gsf.accelerate(with_top_k)
