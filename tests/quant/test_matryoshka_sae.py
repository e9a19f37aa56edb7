"""MatryoshkaSAE: the SAE of the dequantised rows, at any width, sparse; and the figures of its table."""

import copy

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.analysis.widths.measure_sae import Agreement, SAECase, cases, reconstruct
from gemmascope_fast.checkpoints import native
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.ops.screen_rows import rows_of
from gemmascope_fast.quant.sae import MatryoshkaSAE

D_IN, D_SAE, TOKENS = 48, 200, 37


@pytest.fixture(scope="module")
def sae():
    return make_sae(3, D_IN, D_SAE, 12).requires_grad_(False)


@pytest.fixture(scope="module")
def x():
    return make_activations(5, TOKENS, D_IN)


def dense_answer(sae, W_enc, W_dec, x):
    """fp64, and which pairs lie clear of the threshold: κ of the fp32 sum of |x||w| terms."""
    z = x.double() @ W_enc.double() + sae.b_enc.double()
    f = torch.where(z > sae.threshold.double().clamp(min=0), z, torch.zeros_like(z))
    # level and zero point are at most 256 before they cancel, so that the rounding is of that size
    size = x.abs().double() @ torch.ones_like(W_enc).double() * 256 * float(W_enc.abs().max()) / 64
    clear = (z - sae.threshold).abs() > (D_IN + 4) * 2.0**-23 * size + 1e-5
    return f, clear, f @ W_dec.double() + sae.b_dec.double()


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("mode", ["prefix", "matquant"])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_it_answers_as_the_dequantised_rows_do(sae, x, bits, mode, group_size):
    coded = MatryoshkaSAE.from_sae(sae, group_size, mode=mode)
    gsf.set_bits(coded, bits)
    rows = quantize(sae.W_enc.t(), group_size).dequantize(bits, mode)
    W_dec = quantize(sae.W_dec, group_size).dequantize(bits, mode)
    assert torch.equal(coded.W_enc, rows.t())
    assert torch.equal(coded.W_dec, W_dec)
    f, clear, _ = dense_answer(sae, rows.t(), W_dec, x)
    got = coded.encode(x)
    assert bool(clear.float().mean() > 0.9)
    assert torch.equal((got != 0)[clear], (f != 0)[clear])
    assert torch.allclose(got.double()[clear], f[clear], rtol=1e-4, atol=1e-3)
    back = coded(x).double()
    want = got.double() @ W_dec.double() + sae.b_dec.double()
    assert torch.allclose(back, want, rtol=1e-5, atol=float(want.abs().max()) * 1e-6)


def test_eight_bits_are_near_the_sae_and_fewer_are_further(sae, x):
    coded = MatryoshkaSAE.from_sae(sae)
    figures, apart = [], []
    for bits in (8, 4, 2):
        gsf.set_bits(coded, bits)
        figures.append(reconstruct(coded, x, sae))
        apart.append(float((coded(x) - sae(x)).norm()))
    assert figures[0]["jaccard"] > 0.9
    assert apart[0] < apart[1] < apart[2]
    assert figures[0]["jaccard"] > figures[1]["jaccard"] > figures[2]["jaccard"]
    own = reconstruct(sae, x, sae)
    assert own["jaccard"] == own["equal_tokens"] == 1
    assert figures[0]["fvu"] == pytest.approx(own["fvu"], rel=0.05)


def test_widths_by_part_without_touching_the_codes(sae, x):
    coded = MatryoshkaSAE.from_sae(sae)
    addresses = [p.data_ptr() for m in (coded.encoder, coded.decoder) for p in m.packed.planes]
    whole = coded(x)
    gsf.set_bits(coded, {"encoder": 8, "decoder": 2})
    assert torch.equal(coded.encode(x), MatryoshkaSAE.from_sae(sae).encode(x))
    assert not torch.equal(coded(x), whole)
    gsf.set_bits(coded, {"encoder": 3, "decoder": 8})
    assert torch.equal(coded.W_dec, MatryoshkaSAE.from_sae(sae).W_dec)
    gsf.set_bits(coded, 8)
    assert torch.equal(coded(x), whole)
    assert [p.data_ptr() for m in (coded.encoder, coded.decoder) for p in m.packed.planes] == addresses
    with pytest.raises(ValueError, match="matches none"):
        gsf.set_bits(coded, {"W_enc": 4})


def test_decode_reads_only_rows_that_fired(sae, x):
    coded = MatryoshkaSAE.from_sae(sae)
    latents = coded.encode_sparse(x[:1])
    want = coded.decode(latents)
    silent = torch.ones(D_SAE, dtype=torch.bool)
    silent[latents.col_indices.long()] = False
    for i in range(5):
        plane = getattr(coded.decoder, f"plane{i}")
        lanes = plane.reshape(plane.shape[0], plane.shape[1], -1, 16, 4)
        for row in silent.nonzero()[:, 0].tolist():
            lanes[row // 16, :, :, row % 16] = 0xA5
    assert torch.equal(coded.decode(latents), want)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_tokens_in_which_nothing_fires_decode_to_the_bias(sae, bits):
    coded = MatryoshkaSAE.from_sae(sae, bits=bits)
    silent = torch.zeros(3, D_SAE)
    for latents in (silent, gsf.SparseLatents.from_dense(silent)):
        assert torch.equal(coded.decode(latents), coded.b_dec.expand(3, -1))


def test_a_token_depends_on_nothing_but_itself(sae, x, monkeypatch):
    coded = MatryoshkaSAE.from_sae(sae, bits=4)
    whole, back = coded.encode(x), coded(x)
    monkeypatch.setattr("gemmascope_fast.quant.sae.PRE_BYTES", 4 * D_SAE * 5)
    monkeypatch.setattr("gemmascope_fast.quant.sae.GATHERED", 20)
    assert torch.equal(coded.encode(x), whole)
    assert torch.equal(coded(x), back)
    assert torch.equal(coded.encode(x[3:4]), whole[3:4])
    assert torch.equal(coded(x.reshape(1, TOKENS, D_IN)), back[None])
    assert coded(x[:0]).shape == (0, D_IN)


def test_gradients_reach_the_input_and_the_latents(sae, x):
    coded = MatryoshkaSAE.from_sae(sae)
    y = x[:3].clone().requires_grad_()
    coded(y).square().sum().backward()
    z = x[:3].clone().requires_grad_()
    pre = z @ coded.W_enc + coded.b_enc
    f = torch.where(coded.encode(x[:3]) != 0, pre, torch.zeros_like(pre))
    (f @ coded.W_dec + coded.b_dec).square().sum().backward()
    assert torch.allclose(y.grad, z.grad, rtol=1e-3, atol=1e-4 * float(z.grad.abs().max()))


def test_int8_activations_are_taken_about_the_mean(sae, x):
    coded = MatryoshkaSAE.from_sae(sae, activations="int8", mean=x.mean(0))
    plain = MatryoshkaSAE.from_sae(sae, activations="int8", mean=torch.zeros(D_IN))
    exact = MatryoshkaSAE.from_sae(sae).encode(x)
    assert (coded.encode(x) - exact).norm() < (plain.encode(x) - exact).norm()


def test_files_give_the_same_sae(tmp_path, sae, x):
    coded = MatryoshkaSAE.from_sae(sae, 32, activations="int8", mean=x.mean(0))
    coded.cfg.site = gsf.Site("resid", 12)
    size = coded.save(tmp_path / "sae.safetensors")
    assert size == (tmp_path / "sae.safetensors").stat().st_size
    back = MatryoshkaSAE.load(tmp_path / "sae.safetensors")
    assert torch.equal(back(x), coded(x))
    assert back.cfg.site == coded.cfg.site
    from gemmascope_fast.quant import storage

    storage.save(tmp_path / "other.safetensors", {"encoder": coded.encoder.packed}, {}, {"kind": "matryoshka_sae"})
    with pytest.raises(CheckpointError, match="disagree"):
        MatryoshkaSAE.load(tmp_path / "other.safetensors")


def test_the_screens_code_is_served_at_every_width(sae, x, tmp_path, monkeypatch):
    sae = copy.deepcopy(sae)
    sae.W_enc.data[:, 7] = 0  # a row that the screen has no code of
    sae.W_dec.data[:, 5:9] *= 8  # dimensions that the screen balances
    native.save(sae, tmp_path / "sae.safetensors", screen=True)
    stored = gsf.SAE.from_pretrained(tmp_path)
    with monkeypatch.context() as nothing_built:
        nothing_built.setattr(ops, "screen_rows", None)
        nothing_built.setattr(ops, "encode", None)
        coded = MatryoshkaSAE.from_sae(stored, screen=True)
    scales = coded.scales
    assert bool((scales > 1).any())
    assert torch.equal(scales.log2(), scales.log2().round())
    screen = stored.screen_cache.screen
    codes = coded.encoder.packed.codes()
    has = torch.arange(D_SAE) != 7
    assert torch.equal(codes.q[has], rows_of(screen.code)[:D_SAE, :D_IN][has])
    assert not coded.W_enc[:, 7].any()
    own = quantize(sae.W_enc.t() * scales)
    for bits in (8, 4, 2):
        gsf.set_bits(coded, bits)
        rows = own.dequantize(bits) / scales
        assert torch.equal(coded.W_enc, rows.t())
        f, clear, _ = dense_answer(sae, rows.t(), coded.W_dec, x)
        got = coded.encode(x)
        assert torch.equal((got != 0)[clear], (f != 0)[clear])
        assert torch.allclose(got.double()[clear], f[clear], rtol=1e-4, atol=1e-3)
    gsf.set_bits(coded, 8)
    coded.save(tmp_path / "coded.safetensors")
    assert torch.equal(MatryoshkaSAE.load(tmp_path / "coded.safetensors")(x), coded(x))
    assert torch.equal(copy.deepcopy(coded).to(torch.bfloat16).encode(x), coded.encode(x))
    rounded = MatryoshkaSAE.from_sae(stored, activations="int8", screen=True)
    assert torch.allclose(rounded.encoder.mean, sae.b_dec / scales)
    assert float((rounded(x) - coded(x)).norm() / coded(x).norm()) < 0.05
    with pytest.raises(ValueError, match="group_size"):
        MatryoshkaSAE.from_sae(stored, 32, screen=True)


def test_casting_leaves_thresholds_alone(sae, x):
    coded = MatryoshkaSAE.from_sae(sae)
    cast = copy.deepcopy(coded).to(torch.bfloat16)
    assert torch.equal(cast.encode(x), coded.encode(x))
    assert cast.threshold.dtype == torch.float32


def test_bad_input(sae, x):
    coded = MatryoshkaSAE.from_sae(sae)
    with pytest.raises(ValueError, match="JumpReLU SAE"):
        MatryoshkaSAE.from_sae(coded)
    with pytest.raises(ValueError, match="screen"):
        coded.encode_sparse(x, screen=True)
    with pytest.raises(ValueError, match="d_in"):
        coded.encode(x[:, 1:])
    with pytest.raises(TypeError, match="floating"):
        coded.encode(x.int())
    with pytest.raises(ValueError, match="d_sae"):
        coded.decode(torch.zeros(2, D_SAE + 1))
    latents = coded.encode_sparse(x)
    latents.col_indices[0] = D_SAE
    with pytest.raises(IndexError, match=rf"col_indices: expected values in \[0, {D_SAE}\), got {D_SAE} at position 0"):
        coded.decode(latents)


def test_agreement_counts():
    def latents(rows):
        return gsf.SparseLatents.from_dense(torch.tensor(rows, dtype=torch.float32))

    counts = Agreement()
    counts.add(latents([[1, 0, 2], [0, 3, 0]]), latents([[1, 0, 5], [4, 0, 0]]))
    assert counts.figures() == {"jaccard": 2 / 4, "precision": 2 / 3, "recall": 2 / 3, "equal_tokens": 1 / 2}


def test_cases_serve_what_they_say(sae):
    coded = MatryoshkaSAE.from_sae(sae)
    served = SAECase(3, "matquant-extra", "encoder", "int8").serve(coded)
    assert (served.encoder.bits, served.decoder.bits) == (3, 8)
    assert (served.encoder.mode, served.encoder.extra_precision, served.encoder.activations) == (
        "matquant",
        True,
        "int8",
    )
    assert len({case.key() for case in cases()}) == len(cases()) == 2 + 4 * 6


def test_nothing_is_packed_beside_the_codes(sae):
    assert MatryoshkaSAE.from_sae(sae).prepare().packed_bytes() == 0
