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
    torch.manual_seed(seed)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(vocab), hidden_size=D, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=window, bos_token_id=BOS, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    transformers.Gemma3ForCausalLM(config).save_pretrained(where)
    return where


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
