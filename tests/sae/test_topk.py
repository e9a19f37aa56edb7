"""Top-k SAEs: screened or not, by value, by magnitude and by batch."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes
from gemmascope_fast.ops.encode_topk import greatest
from gemmascope_fast.sae.topk import AbsTopKSAE, TopKSAE

D, F, T, K = 96, 700, 40, 12


def weights(dtype=torch.float32):
    sae = make_sae(5, D, F, 20)
    made = {name: getattr(sae, name).detach().to(dtype) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return made | {"threshold": torch.zeros(F, dtype=dtype)}


def pre_activations(x, w):
    """z [T, F] in the order of summation, of either sign."""
    from gemmascope_fast import ops

    W, b = w["W_enc"], w["b_enc"]
    zero = torch.zeros_like(b)
    up = gsf.SparseLatents(*ops.encode(x, W, b, zero, None), (x.shape[0], F)).to_dense()
    down = gsf.SparseLatents(*ops.encode(-x, W, -b, zero, None), (x.shape[0], F)).to_dense()
    return torch.where(up.isnan(), up, up - down)


@pytest.mark.parametrize("kind", [TopKSAE, AbsTopKSAE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_k_greatest_screened_or_not(isa, kind, dtype):
    w, x = weights(dtype), make_activations(6, T, D)
    x[3, 4] = float("nan")
    x[5] = 0.0
    sae = kind.from_weights(**w, k=K)
    z = pre_activations(x, w)
    size = z.abs() if kind is AbsTopKSAE else z
    want = gsf.SparseLatents.from_dense(torch.where(greatest(size, K), z, 0.0)).to(dtype)
    for screen in (None, True, False):
        got = sae.encode_sparse(x, screen=screen).detach()
        assert got == want
        assert sae.encode_sparse(x[7], screen=screen).detach() == want[7]
    assert int(want.l0().max()) == K
    if kind is AbsTopKSAE:
        assert (want.values < 0).any()


@pytest.mark.parametrize("screen", [None, True, False])
def test_per_batch_keeps_k_a_token_on_average(screen):
    w, x = weights(), make_activations(6, T, D)
    sae = TopKSAE.from_weights(**w, k=K)
    got = sae.encode_sparse(x.reshape(4, 10, D), screen=screen, per_batch=True).detach()
    assert got.shape == (4, 10, F)
    assert got.nnz == K * T
    assert len(set(got.l0().flatten().tolist())) > 1
    z = pre_activations(x, w)
    assert torch.equal(got.to_dense().reshape(T, F), torch.where(greatest(z, K, True), z, 0.0))


def test_equal_magnitudes_of_either_sign_take_the_lower_feature(isa):
    w, x = weights(), make_activations(6, 8, D)
    W = w["W_enc"].clone()
    W[:, 1::2] = -W[:, ::2]
    b = w["b_enc"].clone()
    b[1::2] = -b[::2]
    for k in (1, 2, 3, 8):
        sae = AbsTopKSAE.from_weights(**w | {"W_enc": W, "b_enc": b}, k=k)
        latents = sae.encode_sparse(x, screen=True).detach()
        assert latents == sae.encode_sparse(x, screen=False).detach()
        for t in range(8):
            features = latents[t].col_indices.tolist()
            # pairs of opposite features come together; the odd one out is the lower one
            assert len(features) == k
            assert sum(f % 2 for f in features) == k // 2


def test_a_threshold_is_refused():
    w = weights()
    with pytest.raises(ValueError, match="threshold: a top-k SAE has no thresholds"):
        TopKSAE.from_weights(**w | {"threshold": torch.full((F,), 0.1)}, k=K)
    sae = TopKSAE.from_weights(**w, k=K)
    x = make_activations(6, 3, D)
    sae.encode_sparse(x, screen=True)
    sae.threshold.data[4] = 1.0  # bumps no version
    with pytest.raises(ValueError, match="threshold: a top-k SAE has no thresholds"):
        sae.encode_sparse(x, screen=True)
    with torch.no_grad():
        sae.threshold[4] = 2.0
    with pytest.raises(ValueError, match="threshold: a top-k SAE has no thresholds"):
        sae.encode_sparse(x)


@pytest.mark.parametrize("kind", [TopKSAE, AbsTopKSAE])
def test_edited_weights_are_seen(kind):
    w, x = weights(), make_activations(6, T, D)
    sae = kind.from_weights(**{n: t.clone() for n, t in w.items()}, k=K)
    before = sae.encode_sparse(x, screen=True).detach()
    with torch.no_grad():
        sae.W_enc[:, :300] *= 1.5
    sae.b_enc.data += 0.25
    after = sae.encode_sparse(x, screen=True).detach()
    assert after == sae.encode_sparse(x, screen=False).detach()
    assert after != before


def test_per_batch_sees_edits_that_bump_no_version():
    w, x = weights(), make_activations(6, T, D)
    sae = TopKSAE.from_weights(**{n: t.clone() for n, t in w.items()}, k=K)
    sae.encode_sparse(x, screen=True, per_batch=True)
    sae.b_enc.data[::3] += 4.0
    assert (
        sae.encode_sparse(x, screen=True, per_batch=True).detach()
        == sae.encode_sparse(x, screen=False, per_batch=True).detach()
    )


def test_per_batch_where_no_screen_may_be_built():
    """As in a bank with screen=False."""
    from gemmascope_fast.bank.screens import drop_screens

    x = make_activations(6, T, D)
    sae = TopKSAE.from_weights(**weights(), k=K)
    want = sae.encode_sparse(x, per_batch=True).detach()
    drop_screens(sae, bare=True)
    assert sae.encode_sparse(x, per_batch=True).detach() == want
    assert sae.screen_cache.screen is None


def test_refused_options():
    sae = TopKSAE.from_weights(**weights(), k=K)
    by_magnitude = AbsTopKSAE.from_weights(**weights(), k=K)
    x = make_activations(6, 3, D)
    with pytest.raises(ValueError, match="bandwidth"):
        sae.encode_sparse(x, bandwidth=0.1)
    with pytest.raises(ValueError, match="per_batch"):
        by_magnitude.encode_sparse(x, per_batch=True)
    with pytest.raises(ValueError, match="precision"):
        by_magnitude.encode_sparse(x, precision="tensor")
    with pytest.raises(ValueError, match="precision"):
        by_magnitude.encode_sparse(x, None, None, "tensor")
    for k in (0, F + 1):
        with pytest.raises(ValueError, match=f"k: expected 1 to d_sae = {F}, got {k}"):
            TopKSAE.from_weights(**weights(), k=k)


def test_tensor_precision_ranks_its_own_values():
    sae, x = TopKSAE.from_weights(**weights(), k=K), make_activations(6, 300, D)
    latents = sae.encode_sparse(x, precision="tensor").detach()
    assert set(latents.l0().tolist()) == {K}
    torch.testing.assert_close(latents.to_dense(), sae.encode(x).detach(), rtol=2e-2, atol=2e-2 * float(x.abs().max()))


def test_a_module_compiles_into_one_graph():
    sae, x = TopKSAE.from_weights(**weights(), k=K), make_activations(6, 5, D)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        run = torch.compile(sae, fullgraph=True, backend="aot_eager")
        assert same_bytes(run(x), sae(x))
