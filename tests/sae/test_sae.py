"""The modules: formula, dtypes, gradients, bad input, and all operations of an nn.Module."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.dev.testing import (
    dot_bound,
    emulate_decode,
    emulate_encode,
    make_activations,
    make_sae,
    same_bytes,
    support_equal,
    threads,
)

D, F = 33, 70


def weights(seed=0, d=D, f=F, d_out=D, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d, f), "W_dec": (f, d_out), "b_enc": (f,), "b_dec": (d_out,), "threshold": (f,)}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def make(**more):
    return gsf.JumpReLUSAE.from_weights(**weights(**more))


def tokens(*lead, seed=7, d=D):
    return torch.randn(*lead, d, generator=torch.Generator().manual_seed(seed))


def dense(x, sae):
    z = x @ sae.W_enc + sae.b_enc
    return torch.relu(z) * (z > sae.threshold)


# ---- what it computes -------------------------------------------------------------------------------


def test_the_formula():
    sae, x = make(), tokens(12)
    f = sae.encode(x)
    torch.testing.assert_close(f, dense(x, sae), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)
    assert support_equal(sae.encode_sparse(x), x, sae)


def test_bytes_are_those_of_the_contract():
    sae, x = make(), tokens(12)
    latents = sae.encode_sparse(x)
    csr = (latents.crow_indices, latents.col_indices, latents.values)
    assert same_bytes(csr, emulate_encode(x, sae.W_enc, sae.b_enc, sae.threshold))
    assert same_bytes(sae(x), emulate_decode(*(t.detach() for t in csr), sae.W_dec.detach(), sae.b_dec.detach()))


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0, 3), (71,)])
def test_leading_dimensions(lead):
    sae, x = make(), tokens(*lead)
    assert sae.encode_sparse(x).shape == sae.encode(x).shape == (*lead, F)
    assert sae(x).shape == sae.decode(sae.encode(x).detach()).shape == (*lead, D)
    flat = sae(x.reshape(-1, D))
    assert same_bytes(sae(x).reshape(-1, D), flat)


def test_prefill_and_decode_agree():
    sae, x = make(), tokens(2, 9)
    whole = sae.encode_sparse(x)
    for i in range(2):
        for j in range(9):
            assert sae.encode_sparse(x[i, j]) == whole[i, j] == whole.reshape(18)[9 * i + j]
    assert same_bytes(torch.stack([sae(x[:, i]) for i in range(9)], 1), sae(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_mean_their_fp32_evaluation(dtype):
    half = make(dtype=dtype)
    wide = make(dtype=dtype).float()
    x = tokens(9).to(dtype)
    latents, full = half.encode_sparse(x), wide.encode_sparse(x)
    assert (latents.dtype, half(x).dtype, half.encode(x).dtype) == (dtype,) * 3
    assert torch.equal(latents.col_indices, full.col_indices)
    assert same_bytes(latents.values, full.values.to(dtype))
    assert same_bytes(half.decode(full.detach()), wide.decode(full.detach()).to(dtype))


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_activation_is_widened_and_the_answer_is_of_the_saes_dtype(x_dtype):
    sae, x = make(), tokens(9).to(x_dtype)
    assert sae.encode_sparse(x) == sae.encode_sparse(x.float())
    assert sae.encode(x).dtype == sae(x).dtype == torch.float32


def test_dense_and_sparse_latents_decode_alike():
    sae, x = make(), tokens(9)
    latents = sae.encode_sparse(x).detach()
    assert same_bytes(sae.decode(latents), sae.decode(latents.to_dense()))
    grad = latents.to_dense().requires_grad_()
    torch.testing.assert_close(sae.decode(grad), sae.decode(latents), rtol=1e-5, atol=1e-5)
    sae.decode(grad).sum().backward()
    # zeros have gradients too
    torch.testing.assert_close(grad.grad, sae.W_dec.sum(1).expand(9, F))


def test_non_finite_activations_are_legal():
    sae, x = make(), tokens(4)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    latents = sae.encode_sparse(x)
    assert latents[1].values.isnan().all()
    assert latents[1].nnz == F
    assert latents[:1] == sae.encode_sparse(x[:1])
    assert latents[3:] == sae.encode_sparse(x[3:])


def test_threads_change_no_byte():
    sae, x = make_sae(0, 100, 600, 20), make_activations(1, 67, 100)
    seen = []
    for count in (1, 2, 3):
        with threads(count):
            seen.append(sae(x))
    assert same_bytes(seen[0], seen[1])
    assert same_bytes(seen[0], seen[2])


def test_backends_agree():
    sae, x = make_sae(0, 100, 600, 20), make_activations(1, 67, 100)
    ours = sae.encode_sparse(x).to_dense()
    with gsf.backend("eager"):
        theirs = sae.encode_sparse(x).to_dense()
    both = (ours != 0) & (theirs != 0)
    assert int(((ours != 0) ^ (theirs != 0)).sum()) <= 3
    assert bool(((ours - theirs).abs() <= 20 * dot_bound(x, sae.W_enc, sae.b_enc))[both].all())


# ---- gradients --------------------------------------------------------------------------------------


def dense_gradients(sae, x, target):
    sae.zero_grad()
    y = x.detach().clone().requires_grad_()
    (((dense(y, sae) @ sae.W_dec + sae.b_dec) - target) ** 2).sum().backward()
    return [y.grad, *(getattr(sae, n).grad for n in ("W_enc", "W_dec", "b_enc", "b_dec"))]


def test_gradients_equal_dense_autograd():
    """Against fp64; the error at most twice that of eager fp32, in the largest entry and in RMS."""
    sae, x, target = make(), tokens(31), tokens(31, seed=8)
    exact = dense_gradients(make().double(), x.double(), target.double())
    eager = dense_gradients(make(), x, target)
    x.requires_grad_()
    ((sae(x) - target) ** 2).sum().backward()
    ours = [x.grad, *(getattr(sae, n).grad for n in ("W_enc", "W_dec", "b_enc", "b_dec"))]
    for mine, theirs, want in zip(ours, eager, exact, strict=True):
        error, allowed = mine.double() - want, theirs.double() - want
        assert error.abs().max() <= 2 * allowed.abs().max()
        assert error.square().mean() <= 4 * allowed.square().mean()
    assert sae.threshold.grad is None


@pytest.mark.parametrize("bandwidth", [0.05, 1.0])
def test_threshold_gradient_within_the_bandwidth_equals_the_dense_formula(bandwidth):
    sae, x = make(), tokens(40)
    weight = torch.randn(40, F, generator=torch.Generator().manual_seed(3))
    latents = sae.encode_sparse(x, bandwidth=bandwidth)
    (latents.to_dense() * weight).sum().backward()
    z = (x.double() @ sae.W_enc.double() + sae.b_enc.double()).detach()
    theta = sae.threshold.detach().double()
    # facts of JumpReLU: dθ = -(θ/ε)·rect((z - θ)/ε)·g, summed over tokens; dz = 1[z > θ]·g
    near = ((z - theta).abs() < bandwidth / 2).double()
    torch.testing.assert_close(
        sae.threshold.grad.double(), (-(theta / bandwidth) * near * weight).sum(0), rtol=1e-5, atol=1e-5
    )
    fired = (z > theta.clamp(min=0)).double()
    torch.testing.assert_close(sae.b_enc.grad.double(), (fired * weight).sum(0), rtol=1e-5, atol=1e-5)
    assert near.sum() > 10
    plain = sae.encode_sparse(x)
    assert latents.nonzero() == plain
    assert latents.nnz > plain.nnz
    assert torch.equal(latents.l0(), plain.l0())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_bandwidth_must_be_positive(bad):
    with pytest.raises(ValueError, match="bandwidth: expected a positive number"):
        make().encode_sparse(tokens(3), bandwidth=bad)


def test_inference_mode_and_no_grad_give_the_same_bytes():
    sae, x = make(), tokens(5)
    expected = sae(x).detach()
    with torch.no_grad():
        assert same_bytes(sae(x), expected)
    with torch.inference_mode():
        assert same_bytes(sae(x), expected)
        assert same_bytes(sae(tokens(5)), expected)
        inside = make()
        assert same_bytes(inside(x), expected)
    assert same_bytes(sae(x), expected)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_module_compiles_into_one_graph():
    torch._dynamo.reset()
    sae = make()
    run = torch.compile(sae, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (tokens(7), tokens(2, 5), tokens(3)):
        assert same_bytes(run(x), sae(x))


# ---- kinds ------------------------------------------------------------------------------------------


def test_transcoder_writes_another_width():
    w = weights(d_out=20)
    sae = gsf.JumpReLUTranscoder.from_weights(**w)
    x = tokens(6)
    assert sae(x).shape == (6, 20)
    assert (sae.kind, sae.cfg.d_out) == ("transcoder", 20)


def test_skip_transcoder_adds_x_at_the_skip():
    w, A = weights(d_out=20), torch.randn(D, 20, generator=torch.Generator().manual_seed(4))
    sae, x = gsf.JumpReLUSkipTranscoder.from_weights(**w, W_skip=A), tokens(6)
    plain = gsf.JumpReLUTranscoder.from_weights(**w)
    torch.testing.assert_close(sae(x), plain(x) + x @ A)
    assert "W_skip" in sae.state_dict()
    with pytest.raises(ValueError, match=r"W_skip: expected \[d_in = 33, d_out = 20\], got \(20, 33\)"):
        gsf.JumpReLUSkipTranscoder.from_weights(**w, W_skip=A.t())


# ---- a module's life --------------------------------------------------------------------------------


def test_state_dict_holds_gemma_scopes_names_and_shapes():
    sae = make()
    state = sae.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in weights().items()}
    assert sae.W_enc.t().is_contiguous()
    other = make(seed=1)
    other.load_state_dict(state)
    x = tokens(5)
    assert same_bytes(other(x), sae(x))


def test_meta_then_assign():
    """How SAELens loads: on the meta device first, then load_state_dict(assign=True)."""
    expected = make()(tokens(5))
    with torch.device("meta"):
        empty = gsf.JumpReLUSAE.from_weights(**{n: torch.empty(t.shape) for n, t in weights().items()})
    empty.load_state_dict(weights(), assign=True)
    assert same_bytes(empty(tokens(5)), expected)
    assert empty.W_enc.t().is_contiguous()
    assert isinstance(empty.W_enc, nn.Parameter)


def test_copies_answer_alike_and_apart():
    sae, x = make(), tokens(5)
    expected = sae(x)
    buffer = io.BytesIO()
    torch.save(sae, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert same_bytes(twin(x), expected)
        with torch.no_grad():
            twin.b_dec += 1
        assert not same_bytes(twin(x), expected)
    assert same_bytes(sae(x), expected)


def test_to_changes_dtype_and_back():
    sae, x = make(), tokens(5)
    sae(x)
    half = sae.to(torch.bfloat16)
    assert half is sae
    assert sae(x).dtype == torch.bfloat16
    assert same_bytes(sae(x), make().to(torch.bfloat16)(x))
    assert sae.W_enc.t().is_contiguous()
    assert "d_in=33, d_sae=70" in repr(sae)
    assert (sae.d_in, sae.d_sae, sae.device, sae.dtype) == (D, F, torch.device("cpu"), torch.bfloat16)


def test_an_optimiser_step_is_seen():
    sae, x = make(), tokens(20)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        ((sae(x) - x) ** 2).sum().backward()
        optimiser.step()
        fresh = gsf.JumpReLUSAE(*(getattr(sae, n).detach().clone() for n in weights()))
        assert same_bytes(sae(x), fresh(x))


def test_many_threads_at_first_use():
    x = tokens(9)
    expected = make()(x)
    sae = make()
    results: list[torch.Tensor] = []
    gate = threading.Barrier(6)

    def work():
        gate.wait()
        results.append(sae(x).detach())

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 6
    assert all(same_bytes(r, expected) for r in results)


def test_ops_are_reachable_by_their_names():
    sae, x = make(), tokens(5)
    with torch.no_grad():
        got = torch.ops.gemmascope_fast.encode(x, sae.W_enc, sae.b_enc, sae.threshold)
        assert same_bytes(got, ops.encode(x, sae.W_enc, sae.b_enc, sae.threshold, None))
        assert same_bytes(torch.ops.gemmascope_fast.decode(*got, sae.W_dec, sae.b_dec), sae(x))
