"""A tiny random Gemma 3 whose tokenizer knows single letters, as transformers saves one, and an SAE for it."""

import torch

from gemmascope_fast import JumpReLUSAE, SAEConfig, Site

D, F, LAYER, BOS = 32, 96, 1, 1
LETTERS = "abcdefghijklmnopqrstuvwxyz \n"


def save_model(where, letters=LETTERS, window=256, seed=0, layers=3):
    """Write model and tokenizer into a folder; returns it.  Each of `letters` is a token."""
    import tokenizers
    import transformers

    vocab = {"<pad>": 0, "<bos>": BOS, "<eos>": 2, "<unk>": 3} | {c: 4 + i for i, c in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(where)
    made = make_model(
        seed, vocab_size=len(vocab), num_hidden_layers=layers, max_position_embeddings=window,
        bos_token_id=BOS, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made.save_pretrained(where)
    return where


def make_model(seed=0, **config):
    """A random Gemma 3 in evaluation mode; `config` in place of what a test does not care about."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes | config)).eval()


def two_blocks(seed=0):
    """The model of the tests of Matryoshka training: rows of every matrix are whole groups of 32."""
    return make_model(seed, intermediate_size=64, num_hidden_layers=2, sliding_window=8, max_position_embeddings=64)


def make_sae(seed=1, features=F):
    """About a sixth of its features fire on a token of the model above."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(D, features, generator=g)
    W_dec = torch.nn.functional.normalize(W.t().contiguous(), dim=1)
    return JumpReLUSAE.from_weights(
        W_enc=W, W_dec=W_dec, b_enc=torch.zeros(features), b_dec=torch.zeros(D), threshold=torch.ones(features),
        cfg=SAEConfig(D, features, D, Site("resid", LAYER)),
    )  # fmt: skip


def letters(count, seed=0, alphabet="abcdefghijklmnopqrstuvwxyz "):
    """A text of random letters."""
    g = torch.Generator().manual_seed(seed)
    return "".join(alphabet[i] for i in torch.randint(len(alphabet), (count,), generator=g).tolist())


def assert_same_training(got, want):
    """Two `matryoshka.nested.Trained` hold the same codes and gains."""
    assert list(got.codes) == list(want.codes)
    for name, code in want.codes.items():
        assert torch.equal(got.codes[name].q, code.q)
        assert torch.equal(got.codes[name].scale, code.scale)
    assert got.gains.keys() == want.gains.keys()
    assert all(torch.equal(got.gains[n], want.gains[n]) for n in want.gains)
