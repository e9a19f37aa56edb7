"""SAEs attached to SAELens's models: HookedSAETransformer and SAETransformerBridge, plain and accelerated."""

import pytest
import torch
from lens_saes import make
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens import HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import gemmascope_fast as gsf
from gemmascope_fast.dropin import saelens
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

IDS = torch.tensor([[0, 3, 5, 7, 2, 9], [0, 4, 4, 8, 1, 6]])
SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.0.attn.hook_z"]


@pytest.fixture
def model():
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=24, n_heads=4, d_head=6, d_mlp=32, n_ctx=16, d_vocab=12, act_fn="gelu", seed=0, device="cpu"
    )
    return HookedSAETransformer(cfg)


def sae_for(site, **more):
    reshape = "hook_z" if site.endswith("hook_z") else "none"
    # activations of an untrained model are small: thresholds to match
    sae = make(hook_name=site, reshape_activations=reshape, **more)
    sae.W_enc.data *= 8
    return sae


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("use_error_term", [False, True])
def test_an_attached_sae_gives_the_same_logits_and_caches(model, site, use_error_term):
    sae = sae_for(site)
    fast = gsf.accelerate(sae)
    wanted, plain_cache = model.run_with_cache_with_saes(IDS, saes=[sae], use_error_term=use_error_term)
    got, cache = model.run_with_cache_with_saes(IDS, saes=[fast], use_error_term=use_error_term)
    assert list(cache) == list(plain_cache)
    for name in cache:
        torch.testing.assert_close(cache[name], plain_cache[name])
    torch.testing.assert_close(got, wanted)
    assert int((cache[f"{site}.hook_sae_acts_post"] != 0).sum()) > 0
    assert torch.equal(model.run_with_saes(IDS, saes=[fast], use_error_term=use_error_term), got)


def test_the_error_term_takes_one_encoding(model, monkeypatch):
    calls, plain = [], JumpReLUSAE.encode_sparse
    monkeypatch.setattr(JumpReLUSAE, "encode_sparse", lambda self, x: calls.append(x.shape) or plain(self, x))
    fast = gsf.accelerate(sae_for(SITES[0]))
    model.run_with_saes(IDS, saes=[fast], use_error_term=True)
    assert len(calls) == 1


@pytest.mark.parametrize("site", SITES)
def test_edits_at_the_latents_are_not_undone_by_the_error_term(model, site):
    sae = sae_for(site)
    hooks = [(f"{site}.hook_sae_acts_post", lambda acts, hook: acts * 0.5)]
    outs = []
    for each in (sae, gsf.accelerate(sae)):
        with model.saes([each], use_error_term=True):
            outs.append(model.run_with_hooks(IDS, fwd_hooks=hooks))
    torch.testing.assert_close(outs[1], outs[0])
    assert not torch.allclose(outs[0], model(IDS))


@pytest.mark.parametrize("use_error_term", [False, True])
def test_excluded_tokens(model, use_error_term):
    sae = sae_for(SITES[0])
    more = {"use_error_term": use_error_term, "exclude_special_tokens": [0, 4]}
    wanted, plain_cache = model.run_with_cache_with_saes(IDS, saes=[sae], **more)
    got, cache = model.run_with_cache_with_saes(IDS, saes=[gsf.accelerate(sae)], **more)
    torch.testing.assert_close(got, wanted)
    for name in cache:
        torch.testing.assert_close(cache[name], plain_cache[name])


@pytest.mark.parametrize("kind", ["jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_read_one_site_and_write_another(model, kind):
    site, out = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
    sae = make(kind, hook_name=site, hook_name_out=out, d_out=24)
    fast = gsf.accelerate(sae)
    for use_error_term in (False, True):
        wanted = model.run_with_saes(IDS, saes=[sae], use_error_term=use_error_term)
        got = model.run_with_saes(IDS, saes=[fast], use_error_term=use_error_term)
        torch.testing.assert_close(got, wanted)


def test_a_model_is_accelerated_where_its_saes_are(model):
    with pytest.raises(ValueError, match="add_sae"):
        gsf.accelerate(model)
    saes = [sae_for(site, seed=i) for i, site in enumerate(SITES)]
    for sae in saes:
        model.add_sae(sae, use_error_term=True)
    seen = []
    saes[0].hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    wanted = model(IDS)
    assert gsf.accelerate(model) is model
    assert all(isinstance(sae, saelens.Accelerated) for sae in model.acts_to_saes.values())
    assert list(model.acts_to_saes.values()) == saes
    torch.testing.assert_close(model(IDS), wanted)
    assert len(seen) == 2
    model.reset_saes()
    assert not model.acts_to_saes


def test_a_model_with_an_sae_that_cannot_be_is_left_as_it_was(model):
    class Other(type(make())):
        pass

    good, other = sae_for(SITES[0]), sae_for(SITES[1])
    other.__class__ = Other
    model.add_sae(good)
    model.add_sae(other)
    with pytest.raises(TypeError, match="Other"):
        gsf.accelerate(model)
    assert type(good) is type(make())


def test_bridge():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=24, n_head=4, n_positions=16, vocab_size=12, bos_token_id=0, eos_token_id=0)
    hf = GPT2LMHeadModel(config).eval()
    bridge = SAETransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=_tokenizer(), device="cpu")
    sae = sae_for(SITES[0])
    bridge.add_sae(sae, use_error_term=False)
    wanted, plain_cache = bridge.run_with_cache(IDS)
    gsf.accelerate(bridge)
    assert isinstance(sae, saelens.Accelerated)
    got, cache = bridge.run_with_cache(IDS)
    torch.testing.assert_close(got, wanted)
    name = bridge.get_sae_hook_name(sae)
    torch.testing.assert_close(cache[name], plain_cache[name])
    assert int((cache[name] != 0).sum()) > 0


def _tokenizer():
    from tokenizers import Tokenizer, models

    vocab = {str(i): i for i in range(12)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")
