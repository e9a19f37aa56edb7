"""SAEBench's custom SAEs, and coders of dictionary_learning and sparsify."""

import copy
import json

import dictionary_learning.dictionary as dictionaries
import pytest
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE as DLBatchTopK
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from lens_saes import D_IN as D
from lens_saes import D_SAE as WIDTH
from lens_saes import LargestTensor, assert_as_exact, fill, tokens
from sae_bench.custom_saes import batch_topk_sae, jumprelu_sae, relu_sae, topk_sae
from sparsify import SparseCoder, SparseCoderConfig

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.dropin import saebench

ABOUT = {"model_name": "tiny", "hook_layer": 0, "device": torch.device("cpu"), "dtype": torch.float32}
BENCH = {
    "jumprelu": lambda: jumprelu_sae.JumpReluSAE(D, WIDTH, **ABOUT),
    "relu": lambda: relu_sae.ReluSAE(D, WIDTH, **ABOUT),
    "topk": lambda: topk_sae.TopKSAE(D, WIDTH, k=6, **ABOUT),
    "topk_threshold": lambda: topk_sae.TopKSAE(D, WIDTH, k=6, use_threshold=True, **ABOUT),
    "batch_topk": lambda: batch_topk_sae.BatchTopKSAE(D, WIDTH, k=6, **ABOUT),
}
DICTIONARIES = {
    "relu": lambda: dictionaries.AutoEncoder(D, WIDTH),
    "relu_april": lambda: dictionaries.AutoEncoderNew(D, WIDTH),
    "jumprelu": lambda: dictionaries.JumpReluAutoEncoder(D, WIDTH),
    "topk": lambda: AutoEncoderTopK(D, WIDTH, 6),
    "batch_topk": lambda: DLBatchTopK(D, WIDTH, 6),
    "matryoshka": lambda: MatryoshkaBatchTopKSAE(D, WIDTH, 6, [40, 60, 60]),
}


def checked(fast, plain, x):
    exact = copy.deepcopy(plain).double()
    acts, wanted = fast.encode(x), plain.encode(x)
    assert torch.equal(acts != 0, wanted != 0)
    assert int((acts != 0).sum()) > 0
    assert_as_exact(acts, wanted, exact.encode(x.double()))
    assert_as_exact(fast.decode(acts), plain.decode(wanted), exact.decode(wanted.double()))
    assert_as_exact(fast(x), plain(x), exact(x.double()))


@pytest.mark.parametrize("kind", BENCH)
def test_saebench(kind):
    plain, x = fill(BENCH[kind]()), tokens(2, 9, D)
    fast = gsf.accelerate(plain)
    assert isinstance(fast, type(plain))
    assert fast is not plain
    assert fast.cfg.to_dict() == plain.cfg.to_dict()
    checked(fast, plain, x)
    assert gsf.accelerate(plain, inplace=True) is plain
    assert fast.to(dtype=torch.bfloat16).encode(x.bfloat16()).dtype == torch.bfloat16


def test_saebench_threshold_that_changes():
    plain, x = fill(BENCH["batch_topk"]()), tokens(4, D)
    fast = gsf.accelerate(plain)
    fast(x)
    for each in (plain, fast):
        each.threshold.fill_(1.25)
    checked(fast, plain, x)
    fast.threshold.fill_(-1.0)
    with pytest.raises(ValueError, match="threshold"):
        fast(x)


def test_saebench_takes_this_packages_saes():
    plain = fill(BENCH["jumprelu"]())
    with torch.no_grad():
        plain.W_dec.div_(plain.W_dec.norm(dim=1, keepdim=True))
    weights = {name: getattr(plain, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    sae = gsf.JumpReLUSAE.from_weights(**weights)
    custom = saebench.custom_sae(sae, "gemma-2-2b", 12)
    assert isinstance(custom, jumprelu_sae.JumpReluSAE)
    assert custom.cfg.hook_name == "blocks.12.hook_resid_post"
    assert (custom.cfg.d_in, custom.cfg.d_sae, custom.cfg.dtype) == (D, WIDTH, "float32")
    assert custom.check_decoder_norms()
    assert custom.W_enc is sae.W_enc
    checked(custom, plain, tokens(3, D))
    x = tokens(200, D)
    with torch.no_grad(), LargestTensor() as largest:
        custom(x)
    assert largest.elements < 200 * WIDTH
    with pytest.raises(TypeError, match="JumpReLU"):
        saebench.custom_sae(gsf.TopKSAE(**weights | {"threshold": torch.zeros(WIDTH)}, k=3), "gemma-2-2b", 12)


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning(kind):
    plain = fill(DICTIONARIES[kind]())
    if kind == "jumprelu":
        plain.apply_b_dec_to_input = True
    if kind == "matryoshka":
        plain.active_groups = 2
    fast = gsf.accelerate(plain)
    assert isinstance(fast, gsf.TopKSAE if kind == "topk" else gsf.JumpReLUSAE)
    checked(fast, plain, tokens(17, D))
    with torch.no_grad():
        next(plain.parameters()).zero_()
    assert all(int((p != 0).sum()) for p in (fast.W_enc, fast.W_dec))


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify(transcode, skip):
    cfg = SparseCoderConfig(num_latents=WIDTH, k=6, transcode=transcode, skip_connection=skip)
    coder, x = fill(SparseCoder(D, cfg)), tokens(17, D)
    fast = gsf.accelerate(coder)
    kinds = {(False, False): gsf.TopKSAE, (True, False): gsf.TopKTranscoder, (True, True): gsf.TopKSkipTranscoder}
    assert type(fast) is kinds[transcode, skip]
    acts, features, _ = coder.encode(x)
    dense = torch.zeros(17, WIDTH).scatter(1, features, acts)
    assert torch.equal(fast.encode(x) != 0, dense != 0)
    torch.testing.assert_close(fast.encode(x), dense)
    torch.testing.assert_close(fast(x), coder(x).sae_out)


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify_on_disk(tmp_path, transcode, skip):
    """What sparsify saves loads here, and what `convert` writes loads in sparsify."""
    cfg = SparseCoderConfig(num_latents=WIDTH, k=6, transcode=transcode, skip_connection=skip)
    coder, x = fill(SparseCoder(D, cfg)), tokens(17, D)
    coder.save_to_disk(tmp_path / "layers.3.mlp")
    made = from_pretrained(tmp_path / "layers.3.mlp")
    torch.testing.assert_close(made(x), coder(x).sae_out)
    convert(tmp_path / "layers.3.mlp", tmp_path / "again", "sparsify")
    torch.testing.assert_close(SparseCoder.load_from_disk(tmp_path / "again")(x).sae_out, coder(x).sae_out)


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning_on_disk(tmp_path, kind):
    coder, x = fill(DICTIONARIES[kind]()), tokens(17, D)
    torch.save(coder.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": type(coder).__name__, "activation_dim": D, "dict_size": WIDTH, "layer": 3}
    trainer |= {"k": int(coder.k)} if hasattr(coder, "k") else {}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    made, known = from_pretrained(tmp_path), gsf.accelerate(coder)
    assert type(made) is type(known)
    torch.testing.assert_close(made.encode(x), known.encode(x))
    torch.testing.assert_close(made(x), known(x))


def test_what_is_refused():
    for coder, error, words in (
        (dictionaries.IdentityDict(D), TypeError, "IdentityDict"),
        (SparseCoder(D, SparseCoderConfig(num_latents=WIDTH, skip_connection=True)), ValueError, "skip"),
        (SparseCoder(D, SparseCoderConfig(num_latents=WIDTH, activation="groupmax")), ValueError, "groupmax"),
    ):
        with pytest.raises(error, match=words):
            gsf.accelerate(coder)
    with pytest.raises(ValueError, match="inplace"):
        gsf.accelerate(DICTIONARIES["relu"](), inplace=True)
