"""attach: padding, packed documents and chat prefixes, for all forms of masks and position ids."""

import attach_models as tiny
import pytest
import torch
from test_attach_caches import name

import gemmascope_fast as gsf
from gemmascope_fast.attach import Statistics, selection

TURN, USER, LINE = 50, 51, 52  # <start_of_turn>, "user" and "\n" of the tiny model
CHAT = [2, TURN, USER, LINE]


@pytest.fixture(scope="module")
def model():
    made = tiny.gemma3()
    made.config.sliding_window = 64
    for layer in made.model.layers:
        layer.self_attn.sliding_window = 64
    return made


@pytest.fixture(autouse=True)
def start_of_turn(monkeypatch):
    monkeypatch.setitem(selection._START_OF_TURN, "gemma3_text", TURN)


def read(model, ids, tokens="content", **more):
    """(bool [B, S]: which tokens were read, which are valid, how many an observer was given)."""
    ids = torch.as_tensor(ids)
    sae = tiny.sae()
    sae.b_enc.data += 5  # something fires on every token
    with torch.no_grad(), gsf.attach(model, {1: sae}, tokens=tokens) as run:
        seen = run.watch(Statistics(tiny.F))
        model(ids, **more)
    return run.latents[1].l0().reshape(ids.shape) > 0, run.tokens.valid.reshape(ids.shape), seen.count


def words(count, seed=0):
    return torch.randint(3, 48, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def blocks(*lengths):
    return torch.block_diag(*[torch.ones(n, n) for n in lengths]).tril().bool()[None, None]


def inverted(mask, low):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


LENGTHS = (4, 5)
PACKED = blocks(*LENGTHS)
RESTARTS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
FLOOR = torch.finfo(torch.float32).min
# the model's own layers take a dict of masks by the kind of their attention
MASKS = {
    "bool": lambda m: m,
    "float, -inf": lambda m: inverted(m, FLOOR),
    "float, -10000": lambda m: inverted(m, -10000.0),
    "one a head": lambda m: m.expand(-1, 2, -1, -1),
    "dict": lambda m: {"full_attention": m, "sliding_attention": m},
    "dict of floats": lambda m: {"sliding_attention": inverted(m, FLOOR), "full_attention": inverted(m, FLOOR)},
}


@pytest.mark.parametrize("kind", MASKS)
def test_packed_documents_are_no_padding(model, kind):
    read_, valid, count = read(model, [words(9)], attention_mask=MASKS[kind](PACKED), position_ids=RESTARTS)
    assert read_.all()
    assert valid.all()
    assert count == 9


def test_a_window_hides_no_document(model):
    """Of a sliding mask the last token sees its window alone."""
    near = torch.ones(9, 9).tril().triu(-2).bool()[None, None]
    full = torch.ones(9, 9).tril().bool()[None, None]
    dicts = [{"sliding_attention": near, "full_attention": other} for other in (near, full)]
    for mask in (near, near & PACKED, *dicts):
        read_, valid, count = read(model, [words(9)], attention_mask=mask)
        assert (int(read_.sum()), bool(valid.all()), count) == (9, True, 9)


def causal(valid, unmask=False):
    """[B, 1, S, S] of a causal mask with padding; `unmask`: tokens that see nothing see everything, as for SDPA."""
    valid = torch.tensor(valid).bool()
    mask = torch.ones(valid.shape[1], valid.shape[1]).tril().bool() & valid[:, None]
    return (mask | ~mask.any(-1, keepdim=True) if unmask else mask)[:, None]


PADDED = [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("unmask", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_padding_is_found_in_every_kind_of_mask(model, kind, unmask):
    ids = [words(7, seed) for seed in range(3)]
    want = torch.tensor(PADDED).bool()
    read_, valid, count = read(model, ids, attention_mask=MASKS[kind](causal(PADDED, unmask)))
    assert torch.equal(valid, want)
    assert torch.equal(read_, want)
    assert count == int(want.sum())


def test_padding_between_and_after_packed_documents(model):
    mask = blocks(3, 2, 4)[0, 0].clone()
    mask[:, 3:5] = False  # two columns of padding that only see nothing
    read_, valid, _ = read(model, [words(9)], attention_mask=mask[None, None])
    want = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]]).bool()
    assert torch.equal(valid, want)
    assert torch.equal(read_, want)


def test_everything_that_sees_everything_is_valid():
    """Encoders: no token is padding because it sees what comes after it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    encoder = transformers.BertModel(config).eval()
    both = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    for mask in (both, both[:, None, None].expand(-1, 1, 5, 5).bool()):
        with torch.no_grad(), gsf.attach(encoder, {1: tiny.sae()}, tokens="all") as run:
            encoder(torch.tensor([words(5)] * 3), attention_mask=mask)
        assert torch.equal(run.tokens.valid.reshape(3, 5), both.bool())


def test_an_image_at_the_end_that_sees_itself_is_valid(model):
    """Bidirectional blocks (images) after causal text: the block's tokens see everything, and are no padding."""
    mask = torch.ones(9, 9).tril().bool()
    mask[5:, 5:] = True
    _, valid, _ = read(model, [words(9)], attention_mask=mask[None, None])
    assert valid.all()


# ---- chat prefixes ------------------------------------------------------------------------------------


def chat(count=3, seed=0):
    return CHAT + words(count, seed)


def prefixes(ids):
    """What "content" leaves out of such rows: each chat's first four tokens, special tokens, padding."""
    ids = torch.as_tensor(ids)
    left = torch.isin(ids, torch.tensor([0, 1, 2]))
    for row, column in (ids == TURN).nonzero().tolist():
        left[row, column : column + 3] = True
    return ~left


LEFT = [[0, 0, 0, *chat()], [0, *chat(5)], chat(6)]


@pytest.mark.parametrize("mask", ["given", "none", "four dimensions"])
def test_left_padded_chats(model, mask):
    valid = (torch.tensor(LEFT) != 0).long()
    more = {
        "given": {"attention_mask": valid},
        "none": {},
        "four dimensions": {"attention_mask": causal(valid.tolist())},
    }
    read_, _, _ = read(model, LEFT, **more[mask])
    assert torch.equal(read_, prefixes(LEFT))


@pytest.mark.parametrize("pad", [1, 2])
def test_left_padding_with_eos_or_bos(model, pad):
    rows = [[pad, pad, pad, *chat()], [pad, *chat(5)]]
    read_, _, _ = read(model, rows)
    assert torch.equal(read_, prefixes(rows))


TWO = chat(2) + chat(4, seed=1)
HOW = {
    "position ids": {"position_ids": torch.cat([torch.arange(6), torch.arange(8)])[None]},
    "mask": {"attention_mask": blocks(6, 8)},
    "both": {"attention_mask": blocks(6, 8), "position_ids": torch.cat([torch.arange(6), torch.arange(8)])[None]},
    "numbers": {"attention_mask": torch.tensor([[1] * 6 + [2] * 8])},
    "nothing": {},
}


@pytest.mark.parametrize("how", HOW)
def test_each_packed_chat_has_its_own_prefix(model, how):
    read_, valid, _ = read(model, [TWO], **HOW[how])
    assert torch.equal(read_, prefixes([TWO]))
    assert valid.all()


@pytest.mark.parametrize("how", ["position ids", "mask", "numbers"])
def test_a_prefix_ends_with_its_document(model, how):
    """A document of two tokens, then one that is no chat."""
    rows = [[2, TURN, *words(5)]]
    more = {
        "position ids": {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4]])},
        "mask": {"attention_mask": blocks(2, 5)},
        "numbers": {"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 2, 2]])},
    }
    read_, _, _ = read(model, rows, **more[how])
    assert read_.tolist() == [[False, False, True, True, True, True, True]]


def test_a_turn_that_no_bos_comes_before_is_content(model):
    rows = [[2, *words(3), TURN, USER, LINE, *words(2)]]
    read_, _, _ = read(model, rows)
    assert read_.tolist() == [[False] + [True] * 8]


@pytest.mark.parametrize("chunks", [(1,) * 14, (2, 3, 9), (7, 7), (14,)])
def test_packed_chats_are_followed_over_calls(model, chunks):
    sae = tiny.sae()
    sae.b_enc.data += 5
    with torch.no_grad(), gsf.attach(model, {1: sae}) as run:
        cache, at = None, 0
        for size in chunks:
            more = {} if cache is None else {name(): cache}
            out = model(torch.tensor([TWO[at : at + size]]), use_cache=True, **more)
            cache, at = getattr(out, name()), at + size
    assert torch.equal((run.latents[1].l0() > 0)[None], prefixes([TWO]))


def test_a_prefix_that_was_taken_back_is_read_again(model):
    transformers = pytest.importorskip("transformers")
    rows, cache, sae = torch.tensor([chat()]), transformers.DynamicCache(config=model.config), tiny.sae()
    sae.b_enc.data += 5
    with torch.no_grad(), gsf.attach(model, {1: sae}) as run:
        model(rows, **{name(): cache})
        cache.crop(-5)  # <bos><start_of_turn>
        model(rows[:, 2:], **{name(): cache})
        cache.crop(-6)  # <bos>
        model(torch.tensor([words(4)]), **{name(): cache})
    fired = run.latents[1].l0() > 0
    assert fired.tolist() == [False] * 4 + [True] * 3 + [False] * 2 + [True] * 3 + [True] * 4
