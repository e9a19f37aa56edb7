"""attach with manual KV caches: `sequences` equal the rows of one full pass over what the cache contains."""

import copy
import gc

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import TopContexts

transformers = pytest.importorskip("transformers")
LAYERS = (0, 2)
SAES = {0: tiny.sae(), 2: tiny.sae(seed=2)}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny.COMMON)
    return tiny.lively(transformers.LlamaForCausalLM(config))


MODELS = {
    "llama": llama,
    # a window that every test stays within: beyond it such a cache cannot be cropped
    "gemma3": lambda: tiny.gemma3(),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    made = MODELS[request.param]()
    made.config.sliding_window = 64
    for layer in made.model.layers:
        if hasattr(layer.self_attn, "sliding_window") and layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 64
    return made


def dynamic(model):
    return transformers.DynamicCache(config=model.config)


def static(model):
    return transformers.StaticCache(config=model.config, max_cache_len=48)


CACHES = {"dynamic": dynamic, "static": static}
IDS = tiny.ids(3, 9)
STEP = tiny.ids(3, 4, seed=9)[:, 1:]


def name():
    annotations = transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
    return "cache" if "cache" in annotations else "past_key_values"


def forward(model, ids, cache, **more):
    with torch.no_grad():
        return model(ids, **{name(): cache}, **more)


def full(model, ids, mask=None):
    """Dense latents by layer and row, of a pass without a cache; padding left out."""
    more = {}
    if mask is not None:
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        x = model(ids, output_hidden_states=True, use_cache=False, **more).hidden_states
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return {k: [sae.encode(x[k + 1][b][keep[b]]) for b in range(len(ids))] for k, sae in SAES.items()}


def agree(run, want, output=None):
    for key in SAES:
        got = run.sequences(key, output)
        assert [len(g) for g in got] == [len(w) for w in want[key]]
        for ours, theirs in zip(got, want[key], strict=True):
            torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-3, atol=1e-3)


def attached(model, **more):
    return gsf.attach(model, SAES, **{"tokens": "all", **more})


# ---- what is done to a cache between two calls, and what it holds then ---------------------------------


def select(cache, rows):
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(torch.tensor(rows))
    else:
        for layer in cache.layers:
            layer.batch_select_indices(torch.tensor(rows))


HANDLED = {
    "nothing": (lambda c: None, lambda i: i),
    "crop": (lambda c: c.crop(-4), lambda i: i[:, :-4]),
    "crop to one": (lambda c: c.crop(-8), lambda i: i[:, :1]),
    "crop twice": (lambda c: (c.crop(-2), c.crop(-3)), lambda i: i[:, :-5]),
    "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), lambda i: i[[2, 0, 1]]),
    "reorder with copies": (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), lambda i: i[[1, 1, 0]]),
    "reorder to what it was": (lambda c: c.reorder_cache(torch.tensor([0, 1, 2])), lambda i: i),
    "crop and reorder": (
        lambda c: (c.crop(-4), c.reorder_cache(torch.tensor([1, 2, 0]))),
        lambda i: i[[1, 2, 0]][:, :-4],
    ),
    "select": (lambda c: select(c, [0, 2]), lambda i: i[[0, 2]]),
    "select one": (lambda c: select(c, [1]), lambda i: i[[1]]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), lambda i: i.repeat_interleave(2, 0)),
}
ONLY_DYNAMIC = {"select", "select one", "repeat"}


def cases():
    for kind in CACHES:
        for case in HANDLED:
            if kind == "dynamic" or case not in ONLY_DYNAMIC:
                yield pytest.param(kind, case, id=f"{kind}, {case}")


@pytest.mark.parametrize(("kind", "case"), list(cases()))
def test_what_is_taken_back_does_not_appear(model, kind, case):
    change, kept = HANDLED[case]
    cache = CACHES[kind](model)
    with attached(model) as run:
        forward(model, IDS, cache)
        change(cache)
        left = kept(IDS)
        step = STEP.repeat(2, 1)[: len(left)]
        forward(model, step, cache)
        forward(model, step[:, :1], cache)
    agree(run, full(model, torch.cat([left, step, step[:, :1]], 1)))
    assert len(run.tokens) == IDS.numel() + step.numel() + len(step) == run.latents[0].n_rows
    if case == "nothing":
        assert run.tokens.sequence.unique().tolist() == [0, 1, 2]


def test_a_crop_counts_before_the_next_call_too(model):
    cache, cropped = dynamic(model), full(model, IDS[:, :-4])
    with attached(model) as run:
        forward(model, IDS, cache)
        cache.crop(-4)
        agree(run, cropped)
        forward(model, STEP, cache)
    agree(run, full(model, torch.cat([IDS[:, :-4], STEP], 1)))
    del cache
    gc.collect()
    agree(run, full(model, torch.cat([IDS[:, :-4], STEP], 1)))


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_was_emptied_holds_other_sequences(model, kind):
    cache = CACHES[kind](model)
    with attached(model) as run:
        forward(model, IDS, cache)
        cache.reset()
        forward(model, IDS[:2, :5] if kind == "dynamic" else IDS[:, :5], cache)
    rows = 2 if kind == "dynamic" else 3
    first, second = full(model, IDS), full(model, IDS[:rows, :5])
    agree(run, {key: first[key] + second[key] for key in SAES})
    assert run.tokens.sequence.unique().tolist() == list(range(3 + rows))


def test_padded_rows_are_moved_with_their_padding(model):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3], ids[0, 3] = 0, 0, 2
    cache, order = dynamic(model), [1, 2, 0]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with attached(model) as run:
        forward(model, ids, cache, attention_mask=mask, position_ids=position)
        cache.reorder_cache(torch.tensor(order))
        mask = torch.cat([mask[order], torch.ones(3, 3, dtype=torch.long)], 1)
        forward(model, STEP, cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1)[:, 9:])
    agree(run, full(model, torch.cat([ids[order], STEP], 1), mask))
    assert [len(s) for s in run.sequences(0)] == [12, 12, 9]


def test_a_search_with_beams_by_hand(model):
    """Each step keeps the best of all continuations, and the cache follows."""
    cache, ids, width = dynamic(model), IDS[:1].repeat(3, 1), 3
    scores = torch.tensor([0.0, -1e9, -1e9])
    with attached(model) as run:
        step = ids
        for _ in range(6):
            logits = forward(model, step, cache).logits[:, -1].log_softmax(-1)
            scores, best = (scores[:, None] + logits).flatten().topk(width)
            beams, step = best // tiny.VOCAB, (best % tiny.VOCAB)[:, None]
            cache.reorder_cache(beams)
            ids = torch.cat([ids[beams], step], 1)
        forward(model, step, cache)
    agree(run, full(model, ids))


def test_contexts_do_not_mix_sequences_or_hold_what_was_taken_back(model):
    for change, kept in (HANDLED["reorder"], HANDLED["crop"]):
        cache, top = dynamic(model), TopContexts(tiny.F, 40, left=3, right=0)
        with attached(model) as run:
            run.watch(top, 0)
            forward(model, IDS, cache)
            change(cache)
            forward(model, STEP, cache)
        left = kept(IDS)
        whole = torch.cat([left, STEP], 1)
        tokens = run.tokens
        for feature, slot in (top.position >= left.shape[1]).nonzero().tolist():
            if int(tokens.call[(tokens.sequence == top.sequence[feature, slot])].max()) != 1:
                continue
            at = int(top.position[feature, slot])
            seen = top.contexts[feature, slot][top.contexts[feature, slot] >= 0].tolist()
            assert any(row[at + 1 - len(seen) : at + 1].tolist() == seen for row in [*whole, *IDS])


# ---- generate on a cache that is there -----------------------------------------------------------------


def generate(model, ids, cache, new=4, **more):
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    more.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{name(): cache}, **{**settings, **more})


@pytest.mark.parametrize("kind", CACHES)
def test_a_prefilled_prefix(model, kind):
    cache = CACHES[kind](model)
    with attached(model) as run:
        forward(model, IDS[:, :5], cache)
        output = generate(model, IDS, cache)
    want = full(model, output[:, :-1])
    agree(run, want, output)
    agree(run, want)


@pytest.mark.parametrize("kind", CACHES)
def test_a_prefix_in_copies_of_its_cache(model, kind):
    """The prefix is read once; each continuation has it, whatever became of the cache that was copied."""
    prefix = CACHES[kind](model)
    with attached(model) as run:
        forward(model, IDS[:, :5], prefix)
        copies = [copy.deepcopy(prefix) for _ in range(3)]
        forward(model, STEP, prefix)
        first = generate(model, IDS, copies[0])
        second = generate(model, torch.cat([IDS[:, :5], STEP], 1), copies[1])
        forward(model, STEP[:, :2], copies[2])
        forward(model, STEP[:, :1], copies[2])
    for output in (first, second):
        agree(run, full(model, output[:, :-1]), output)
    original = full(model, torch.cat([IDS[:, :5], STEP], 1))
    by_hand = full(model, torch.cat([IDS[:, :5], STEP[:, :2], STEP[:, :1]], 1))
    each = [original, full(model, first[:, :-1]), full(model, second[:, :-1]), by_hand]
    agree(run, {key: [row for one in each for row in one[key]] for key in SAES})


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("new_alone", [False, True])
def test_a_conversation_of_several_turns(model, kind, new_alone):
    """Each turn goes on where the last ended; `new_alone`: generate gets its tokens alone, and the mask of all."""
    cache, said, outputs, asked = CACHES[kind](model), IDS, [], IDS
    with attached(model) as run:
        for turn in range(3):
            mask = torch.ones_like(said)
            output = generate(model, asked, cache, attention_mask=mask)
            said = torch.cat([said, output[:, asked.shape[1] :]], 1)
            outputs.append((output, said[:, :-1]))
            asked = tiny.ids(3, 3, seed=turn)
            said = torch.cat([said, asked], 1)
            asked = said[:, -4:] if new_alone else said  # the last token was not fed back yet
    assert [len(s) for s in run.sequences(0)] == [26, 26, 26]
    for number, (output, whole) in enumerate(outputs):
        want = full(model, whole)
        if new_alone and number:
            want = {key: [row[-(output.shape[1] - 1) :] for row in rows] for key, rows in want.items()}
        agree(run, want, output)
    agree(run, full(model, outputs[-1][1]))


def test_turns_of_which_one_row_ended_early(model):
    """What generate pads a row with after its EOS is not in the next turn's sequences either."""
    with torch.no_grad():
        greedy = generate(model, IDS, dynamic(model), 6, eos_token_id=-1)
    row = next(r for r in range(3) if int(greedy[r, 10]) not in greedy[[o for o in range(3) if o != r], 9:].tolist()[0])
    eos, cache = int(greedy[row, 10]), dynamic(model)
    with attached(model) as run:
        first = model.generate(
            IDS, **{name(): cache}, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=eos,
            attention_mask=torch.ones_like(IDS),
        )  # fmt: skip
        ended = (first[:, 9:] == eos).long()
        mask = torch.cat([torch.ones_like(IDS), 1 - (ended.cumsum(1) - ended).clamp(max=1)], 1)
        said, mask = torch.cat([first, STEP], 1), torch.cat([mask, torch.ones_like(STEP)], 1)
        second = generate(model, said, cache, 2, attention_mask=mask, eos_token_id=-1)
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    assert int(mask.sum()) < mask.numel()
    agree(run, full(model, second[:, :-1], mask), second)
    before = full(model, first[:, :-1], mask[:, : first.shape[1] - 1])
    agree(run, before, first)


def test_a_generation_then_a_loop_by_hand(model):
    cache = dynamic(model)
    with attached(model) as run:
        output = generate(model, IDS, cache)
        said = torch.cat([output, STEP], 1)
        forward(model, said[:, 12:], cache)
        forward(model, STEP[:, :1], cache)
    agree(run, full(model, torch.cat([said, STEP[:, :1]], 1)))
    agree(run, full(model, output[:, :-1]), output)


def test_the_same_prompt_again_after_a_crop(model):
    cache = dynamic(model)
    with attached(model) as run:
        first = generate(model, IDS, cache)
        cache.crop(-3)  # back to the prompt
        second = generate(model, torch.cat([IDS, STEP], 1), cache)
    agree(run, full(model, first[:, :-1]), first)
    agree(run, full(model, second[:, :-1]), second)
    agree(run, full(model, second[:, :-1]))


def test_a_repeated_cache_is_searched_with_beams(model):
    cache = dynamic(model)
    with attached(model) as run:
        forward(model, IDS[:2, :5], cache)
        cache.batch_repeat_interleave(3)
        output = generate(
            model, IDS[:2], cache, num_beams=3, return_dict_in_generate=True, output_scores=True, eos_token_id=-1
        )
    agree(run, full(model, output.sequences[:, :-1]), output)


# ---- what the run never saw ----------------------------------------------------------------------------


def test_columns_that_the_run_never_saw_are_named(model):
    cache = dynamic(model)
    forward(model, IDS[:, :5], cache)
    with attached(model) as run:
        output = generate(model, IDS, cache)
    for given in (None, output):
        with pytest.raises(gsf.AttachError, match=r"5 columns were in the cache .*: positions 0 to 4 of sequence 0"):
            run.sequences(0, given)
    assert run.latents[0].n_rows == 3 * 7


def test_padding_that_the_run_never_saw_is_not_missing(model):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[:, :4], mask[:, :4], ids[:, 4] = 0, 0, 2
    cache, position = dynamic(model), (mask.cumsum(1) - 1).clamp(min=0)
    forward(model, ids[:, :4], cache, attention_mask=mask[:, :4], position_ids=position[:, :4])
    with attached(model) as run:
        forward(model, ids[:, 4:], cache, attention_mask=mask, position_ids=position[:, 4:])
    assert [len(s) for s in run.sequences(0)] == [5, 5, 5]


def test_a_call_that_failed_leaves_columns_that_are_missing(model):
    cache = dynamic(model)
    with attached(model) as run:
        forward(model, IDS[:, :5], cache)
        handle = model.model.layers[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(model, IDS[:, 5:7], cache)
        handle.remove()
        forward(model, IDS[:, 7:], cache)
    with pytest.raises(gsf.AttachError, match=r"2 columns were in the cache .*: positions 5 to 6 of sequence"):
        run.sequences(0)


def test_other_contents_in_a_known_cache_are_not_taken_for_the_old_ones(model):
    cache, other = dynamic(model), dynamic(model)
    forward(model, tiny.ids(3, 9, seed=77), other)
    with attached(model) as run:
        forward(model, IDS, cache)
        cache.layers = other.layers
        forward(model, STEP, cache)
    with pytest.raises(gsf.AttachError, match=r"9 columns were in the cache .*: positions 0 to 8 of sequence 3"):
        run.sequences(0)


def test_after_clear_the_rest_is_missing(model):
    cache = dynamic(model)
    with attached(model) as run:
        forward(model, IDS, cache)
        run.clear()
        forward(model, STEP, cache)
    with pytest.raises(gsf.AttachError, match=r"run.clear.*positions 0 to 8"):
        run.sequences(0)


def test_two_runs_follow_one_cache_each_for_itself(model):
    cache = dynamic(model)
    with attached(model) as outer:
        forward(model, IDS, cache)
        with attached(model) as inner:
            cache.reorder_cache(torch.tensor([1, 0, 2]))
            forward(model, STEP, cache)
    agree(outer, full(model, torch.cat([IDS[[1, 0, 2]], STEP], 1)))
    with pytest.raises(gsf.AttachError, match="positions 0 to 8"):
        inner.sequences(0)


def test_a_followed_cache_can_be_copied_and_pickled(model):
    import pickle

    cache = dynamic(model)
    with attached(model):
        forward(model, IDS, cache)
    for made in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(made.layers[0].keys, cache.layers[0].keys)


def test_recurrent_states_are_reordered_and_emptied():
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.D, num_hidden_layers=2, state_size=4, pad_token_id=0, bos_token_id=2,
        eos_token_id=1,
    )  # fmt: skip
    model = tiny.lively(transformers.MambaForCausalLM(config))
    with torch.no_grad(), gsf.attach(model, {0: tiny.sae()}, tokens="all") as run:
        cache = getattr(model(IDS, use_cache=True), "cache", None)
        if cache is None:
            pytest.skip("this version of transformers has a Mamba cache of its own")
        model(STEP[:, :1], cache=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        model(STEP[:, 1:2], cache=cache, use_cache=True)
        cache.reset()
        model(IDS[:, :5], cache=cache, use_cache=True)
    first = torch.cat([torch.cat([IDS, STEP[:, :1]], 1)[[2, 0, 1]], STEP[:, 1:2]], 1)
    with torch.no_grad(), tiny.Hand(model.backbone.layers[0]) as hand:
        model(first)
        model(IDS[:, :5])
    for got, row in zip(run.sequences(0), [*hand.seen[0], *hand.seen[1]], strict=True):
        torch.testing.assert_close(got.to_dense(), tiny.sae().encode(row), rtol=1e-3, atol=1e-3)
