"""attach under `generate`: every decoding mode gives, per sequence, the latents of one plain forward over it."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf

NEW = 8
OLD = int(pytest.importorskip("transformers").__version__.split(".")[0]) < 5
FAMILIES = {"gemma2": tiny.gemma2, "gemma3": tiny.gemma3}
LAYERS = (0, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def saes():
    return {0: tiny.sae(), 2: tiny.sae(seed=2)}


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3},
    "beam, several returned": {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    "beam, early stopping": {"num_beams": 3, "early_stopping": True, "max_new_tokens": 14},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill, static cache": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "long": {"max_new_tokens": 20},
}


def generate(model, ids, mask, **options):
    torch.manual_seed(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(ids, attention_mask=mask, **{**settings, **options})


def padded(batch=2):
    ids = tiny.ids(batch)
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[0, :3], mask[0, :3] = torch.tensor([0, 0, 0]), 0
        ids[0, 3] = 2
    return ids, mask


def expected(model, saes, output, mask, beams=1):
    """Per layer and returned sequence: dense latents of a plain forward over it, padding and last token left out."""
    sequences = output.sequences
    prompt = mask.shape[1]
    mask = mask.repeat_interleave(sequences.shape[0] // mask.shape[0], 0)
    ended = (sequences == 1).long()
    ended[:, :prompt] = 0
    after = ended.cumsum(1) - ended > 0
    valid = torch.cat([mask, torch.ones(sequences.shape[0], sequences.shape[1] - prompt, dtype=torch.long)], 1)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        x = model(
            sequences, attention_mask=valid, position_ids=positions, output_hidden_states=True, use_cache=False
        ).hidden_states
    keep = valid.bool() & ~after
    keep[:, -1] = False
    if beams > 1:  # a finished beam is not fed its own EOS
        keep &= ~ended.bool()
    return {k: [sae.encode(x[k + 1][b][keep[b]]) for b in range(len(sequences))] for k, sae in saes.items()}


def agree(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.n_rows == len(theirs)
        # the model's own matrix products differ by their shapes in the last bits
        torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("batch", [1, 2])
def test_sequences_are_those_of_a_plain_forward(model, saes, name, batch):
    ids, mask = padded(batch)
    base = generate(model, ids, mask, **MODES[name])
    before = tiny.hook_count(model)
    hands = {key: tiny.Hand(model.model.layers[key]) for key in saes}
    with gsf.attach(model, saes, tokens="all") as run:
        output = generate(model, ids, mask, **MODES[name])
        assert torch.equal(output.sequences, base.sequences)
        for one, other in zip(output.scores, base.scores, strict=True):
            assert torch.equal(one, other)
    for key, hand in hands.items():
        hand.handle.remove()
        assert run.latents[key] == saes[key].encode_sparse(hand.rows())
        assert run.latents[key].n_rows == len(run.tokens)
    assert tiny.hook_count(model) == before
    if "prefill_chunk_size" in MODES[name] and batch > 1 and OLD:
        return  # transformers 4.57 chunks left-padded prompts wrongly: its own hidden states differ
    want = expected(model, saes, output, mask, MODES[name].get("num_beams", 1))
    for key in saes:
        agree(run.sequences(key, output), want[key])
    if "num_beams" not in MODES[name]:
        agree(run.sequences(0), want[0])


def test_an_eos_in_the_prompt_ends_nothing(model, saes):
    """Chat templates end each turn with one."""
    ids, mask = padded(2)
    ids[:, 5] = 1
    ids[1, 7] = 1
    with gsf.attach(model, saes, tokens="all") as run:
        output = generate(model, ids, mask)
    want = expected(model, saes, output, mask)
    for key in saes:
        got = run.sequences(key, output)
        assert all(latents.n_rows > int(kept.sum()) for latents, kept in zip(got, mask, strict=True))
        agree(got, want[key])


@pytest.mark.parametrize("how", ["prompt lookup", "assisted"])
def test_rejected_drafts_do_not_count(model, saes, how):
    ids = torch.tensor([[2, 7, 8, 9, 10, 7, 8, 9, 10, 7, 8]])
    mask = torch.ones_like(ids)
    more = {"prompt_lookup_num_tokens": 3}
    if how == "assisted":
        torch.manual_seed(4)
        assistant = type(model)(model.config).eval()
        more = {"assistant_model": assistant}
    with gsf.attach(model, saes, tokens="all") as run:
        output = generate(model, ids, mask, max_new_tokens=12, **more)
    lengths = torch.bincount(run.tokens.call)
    assert lengths[1:].max() > 1, "no draft was tried"
    assert len(run.tokens) > output.sequences.shape[1] - 1, "no draft was rejected"
    want = expected(model, saes, output, mask)
    agree(run.sequences(0, output), want[0])
    agree(run.sequences(2), want[2])


def test_beam_search_needs_its_indices(model, saes):
    ids, mask = padded()
    with gsf.attach(model, saes, tokens="all") as run:
        plain = generate(model, ids, mask, num_beams=3, return_dict_in_generate=False, output_scores=False)
    for output in (None, plain):
        with pytest.raises(gsf.AttachError, match="beam_indices"):
            run.sequences(0, output)


def test_splicing_acts_on_every_decoded_token(model, saes):
    """Greedy decoding with a splice equals decoding by hand without a cache, with hooks written by hand."""
    ids, mask = tiny.ids(1), torch.ones(1, 9, dtype=torch.long)
    with gsf.attach(model, {1: saes[0]}, mode="splice", tokens="all"):
        output = generate(model, ids, mask, eos_token_id=-1).sequences
    by_hand = ids
    with torch.no_grad(), tiny.Hand(model.model.layers[1], change=saes[0]):
        for _ in range(NEW):
            logits = model(by_hand, use_cache=False).logits
            by_hand = torch.cat([by_hand, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(output, by_hand)
    assert not torch.equal(output, generate(model, ids, mask, eos_token_id=-1).sequences)


class Replace:
    """Hooks written by hand: `sae` in the place of what one site carries, from the first call to the last."""

    def __init__(self, block, kind, sae):
        if kind == "attn":  # what goes into o_proj: the heads side by side
            self.handle = block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: (sae(args[0]), *args[1:]))
        else:
            module = block.post_feedforward_layernorm if kind == "mlp" else block
            self.handle = tiny.Hand(module, change=sae).handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("kind", ["resid", "mlp", "attn"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_each_site_is_spliced_in_prefill_and_in_every_decoded_token(model, kind, batch, cached):
    """Padded prompts of any number: scores bit for bit those of hooks by hand, or, with the error, of no SAE at all."""
    sae = tiny.sae(48 if kind == "attn" else tiny.D)
    ids, mask = padded(batch)
    options = {"use_cache": cached}
    before, base = tiny.hook_count(model), generate(model, ids, mask, **options)
    with Replace(model.model.layers[1], kind, sae):
        by_hand = generate(model, ids, mask, **options)
    assert not torch.equal(by_hand.scores[0], base.scores[0])
    runs = {}
    for mode, want in (("observe", base), ("splice", by_hand), ("splice+error", base)):
        with gsf.attach(model, {(1, kind): sae}, mode=mode, tokens="all") as runs[mode]:
            output = generate(model, ids, mask, **options)
        assert tiny.hook_count(model) == before
        assert torch.equal(output.sequences, want.sequences)
        assert all(torch.equal(one, other) for one, other in zip(output.scores, want.scores, strict=True))
        steps = output.sequences.shape[1] - 9
        per_sequence = 9 + steps - 1 if cached else sum(range(9, 9 + steps))
        assert runs[mode].latents[1, kind].n_rows == len(runs[mode].tokens) == batch * per_sequence
        assert runs[mode].latents[1, kind].nnz > 0
    assert runs["observe"].latents[1, kind] == runs["splice+error"].latents[1, kind]


@pytest.mark.parametrize("mode", ["observe", "splice", "splice+error"])
@pytest.mark.parametrize("where", ["body", "model", "generate"])
def test_an_exception_anywhere_leaves_no_hook(model, saes, mode, where):
    ids, mask = padded()
    before, base = tiny.hook_count(model), generate(model, ids, mask)

    def fail(*_, **__):
        raise RuntimeError("mine")

    failing = model.model.layers[3].register_forward_hook(fail) if where == "model" else None
    stop = [fail] if where == "generate" else None
    run = fail if where == "body" else lambda: generate(model, ids, mask, stopping_criteria=stop)
    with pytest.raises(RuntimeError, match="mine"), gsf.attach(model, saes, mode=mode, tokens="all"):
        run()
    if failing is not None:
        failing.remove()
    assert tiny.hook_count(model) == before
    again = generate(model, ids, mask)
    assert all(torch.equal(one, other) for one, other in zip(again.scores, base.scores, strict=True))


def test_several_generations_in_one_run(model, saes):
    ids, mask = padded()
    with gsf.attach(model, saes, tokens="all") as run:
        first = generate(model, ids, mask)
        second = generate(model, tiny.ids(3, 6, seed=8), None, max_new_tokens=4)
        beam = generate(model, ids, mask, num_beams=2)
    assert [len(run.sequences(0, o)) for o in (first, second, beam)] == [2, 3, 2]
    agree(run.sequences(0, first), expected(model, saes, first, mask)[0])
    agree(run.sequences(0, second), expected(model, saes, second, torch.ones(3, 6, dtype=torch.long))[0])
    copied = first.sequences.clone()
    assert run.sequences(0, copied) == run.sequences(0, first)
    with pytest.raises(gsf.AttachError, match="0 generations"):
        run.sequences(0, copied[:1])


def test_padding_is_told_from_pad_tokens_where_no_mask_is_given(model, saes):
    ids, mask = padded()
    with gsf.attach(model, saes, tokens="content") as run:
        output = generate(model, ids, None, cache_implementation="static")
    want = expected(model, saes, output, mask)[0]
    assert [s.n_rows for s in run.sequences(0, output)] == [len(w) for w in want]
    prompt = run.tokens.valid[:18].reshape(2, 9)
    assert torch.equal(prompt, mask.bool())


def test_a_prompt_given_as_embeddings(model, saes):
    ids, mask = tiny.ids(1), torch.ones(1, 9, dtype=torch.long)
    embeds = model.get_input_embeddings()(ids).detach()
    with gsf.attach(model, saes, tokens="all") as run:
        output = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert run.sequences(0, output)[0].n_rows == 9 + output.shape[1] - 1


def test_a_loop_written_by_hand_continues_its_sequences(model, saes):
    ids, cache, step = tiny.ids(), None, tiny.ids()
    name = "cache" if hasattr(model(ids, use_cache=True), "cache") else "past_key_values"
    with torch.no_grad(), gsf.attach(model, saes, tokens="all") as run:
        for _ in range(4):
            out = model(step, use_cache=True, **({} if cache is None else {name: cache}))
            cache, step = getattr(out, name), out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
    assert run.tokens.sequence.unique().tolist() == [0, 1]
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[1][:, :-1]
    agree(run.sequences(0), [saes[0].encode(row) for row in x])


def test_a_cache_filled_before_the_run_is_named(model, saes):
    ids = tiny.ids(1)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        name = "cache" if hasattr(out, "cache") else "past_key_values"
        with gsf.attach(model, saes, tokens="all") as run:
            model(ids[:, :1], **{name: getattr(out, name)})
    assert run.tokens.position.tolist() == [9]
    with pytest.raises(gsf.AttachError, match="9 columns were in the cache"):
        run.sequences(0)


def test_a_mask_selects_columns_of_whole_sequences(model, saes):
    ids, mask = padded()
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[0, 5], chosen[1, 7], chosen[1, 10] = True, True, True
    with gsf.attach(model, saes, tokens=chosen) as run:
        generate(model, ids, mask)
    fired = run.latents[0].l0() > 0
    at = set(zip(run.tokens.sequence[fired].tolist(), run.tokens.position[fired].tolist(), strict=True))
    assert at == {(0, 5), (1, 7), (1, 10)}


def test_an_exception_inside_generate_leaves_nothing(model, saes):
    before = tiny.hook_count(model)

    def stop(_ids, _scores, **_):
        raise RuntimeError("stop")

    ids, mask = padded()
    with pytest.raises(RuntimeError, match="stop"), gsf.attach(model, saes, mode="splice", tokens="all") as run:
        generate(model, ids, mask, stopping_criteria=[stop])
    assert tiny.hook_count(model) == before
    assert len(run.tokens) == 18
    assert [s.n_rows for s in run.sequences(0)] == [6, 9]
