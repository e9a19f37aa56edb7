"""attach: rows and token selection, against hooks written by hand."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma3()


def test_rows_carry_call_sequence_position_and_padding(gemma):
    ids = tiny.ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad(), gsf.attach(gemma, {1: tiny.sae()}, tokens="all") as run:
        gemma(ids, attention_mask=mask)
        gemma(ids[:, :4])
    tokens = run.tokens
    assert len(tokens) == run.latents[1].n_rows == 18 + 8
    assert tokens.call.tolist() == [0] * 18 + [1] * 8
    assert tokens.sequence.tolist() == [0] * 9 + [1] * 9 + [2] * 4 + [3] * 4
    assert tokens.position.tolist() == [*range(9), *range(9), *range(4), *range(4)]
    assert tokens.token_id.tolist() == [*ids.flatten().tolist(), *ids[:, :4].flatten().tolist()]
    assert tokens.valid.tolist() == [*mask.flatten().bool().tolist(), *[True] * 8]
    assert [len(s) for s in run.sequences(1)] == [6, 9, 4, 4]
    assert run.sequences(1)[0] == run.latents[1][3:9]


SELECTIONS = {
    "columns": torch.tensor([True, False] * 4 + [True]),
    "batch": torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.5,
    "ids": lambda ids: ids % 2 == 0,
    "rows": lambda ids, rows: (rows.position > 3) & (ids > 5),
    "none": lambda ids: torch.zeros_like(ids, dtype=torch.bool),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("mode", ["observe", "splice"])
def test_tokens_left_out_keep_an_empty_row_and_pass(gemma, name, mode):
    ids, sae = tiny.ids(), tiny.sae()
    position = torch.arange(9).expand(2, 9)
    chosen = {
        "columns": (position % 2 == 0),
        "batch": SELECTIONS["batch"],
        "ids": ids % 2 == 0,
        "rows": (position > 3) & (ids > 5),
        "none": torch.zeros(2, 9, dtype=torch.bool),
    }[name]
    with torch.no_grad():
        with gsf.attach(gemma, {1: sae}, tokens=SELECTIONS[name], mode=mode) as run:
            logits = gemma(ids).logits
        with tiny.Hand(tiny.layer(gemma), change=lambda x: torch.where(chosen[..., None], sae(x), x)) as hand:
            spliced = gemma(ids).logits
    dense = sae.encode(hand.rows())
    dense[~chosen.reshape(-1)] = 0
    assert torch.equal(run.latents[1].to_dense(), dense)
    assert torch.equal(run.latents[1].l0() > 0, chosen.reshape(-1))
    if mode == "splice":
        assert torch.equal(logits, spliced)


def test_content_leaves_out_special_tokens_padding_and_the_chat_prefix(gemma):
    ids = tiny.ids(3)
    ids[0, :3] = torch.tensor([0, 0, 2])
    ids[1, 5], ids[1, 7] = 2, 1
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    sae = tiny.sae()
    with torch.no_grad(), gsf.attach(gemma, {1: sae}, tokens="content") as run:
        gemma(ids, attention_mask=mask)
    expected = torch.ones(3, 9, dtype=torch.bool)
    expected[0, :3] = expected[1, 0] = expected[1, 5] = expected[1, 7] = expected[2, 0] = False
    assert torch.equal(run.latents[1].l0() > 0, expected.reshape(-1))


@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_chat_prefix_is_found_however_the_prompt_is_cut(chunk):
    model = tiny.gemma3()
    model.config.model_type = "gemma2"  # <start_of_turn> is 106 there
    model = _wider(model)
    ids = torch.tensor([[0, 2, 106, 20, 21, 30, 31, 32, 33], [2, 106, 20, 21, 30, 31, 32, 33, 34]])
    mask = (ids != 0).long()
    with torch.no_grad(), gsf.attach(model, {1: tiny.sae()}, tokens="content") as run:
        cache = None
        for at in range(0, 9, chunk):
            more = {} if cache is None else {CACHE: cache}
            out = model(ids[:, at : at + chunk], attention_mask=mask[:, : at + chunk], use_cache=True, **more)
            cache = getattr(out, CACHE)
    fired = torch.zeros(2, 9, dtype=torch.bool)
    fired[run.tokens.sequence, run.tokens.position] = run.latents[1].l0() > 0
    expected = torch.ones(2, 9, dtype=torch.bool)
    expected[0, :5] = expected[1, :4] = False
    assert torch.equal(fired, expected)


def _wider(model):
    model.resize_token_embeddings(128)
    return tiny.lively(model)


def test_activations_in_place_of_an_sae(gemma):
    ids, got = tiny.ids(), []
    with torch.no_grad():
        with tiny.Hand(tiny.layer(gemma)) as hand:
            gemma(ids)
        saes = {1: Activations(), (2, "resid"): Activations(sink=lambda x, rows: got.append((x.clone(), rows)))}
        with gsf.attach(gemma, saes, tokens="content") as run:
            gemma(ids)
    assert torch.equal(run.activations[1], hand.rows()[(ids != 2).reshape(-1)])
    ((x, rows),) = got
    assert x.shape == (16, 32)
    assert torch.equal(rows.token_id, ids[ids != 2])
    assert len(run.latents) == 0


def _cache_name():
    import transformers

    return (
        "cache"
        if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
        else "past_key_values"
    )


CACHE = _cache_name()
