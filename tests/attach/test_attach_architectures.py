"""attach on other architectures, found by structure: latents, logits and splices against hooks written by hand."""

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf

transformers = pytest.importorskip("transformers")

COMMON = {k: v for k, v in tiny.COMMON.items() if k != "head_dim"}
ENCODER = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
STATE_SPACE = {
    "vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 4, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA3_FULL = {
    "text_config": {**tiny.COMMON, "sliding_window": 8},
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "image_token_index": 60,
    "boi_token_index": 61,
    "eoi_token_index": 62,
}

# name: (class, configuration, options, the blocks of the text stack)
MODELS = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**tiny.COMMON, "sliding_window": 8}, "model.layers"),
    "gemma3 sdpa": (
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**tiny.COMMON, "sliding_window": 8, "attn_implementation": "sdpa"}, "model.layers",
    ),
    "gemma3 multimodal": ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3_FULL, "model.language_model.layers"),
    "gemma2 reward": (
        "Gemma2ForSequenceClassification", "Gemma2Config", {**tiny.COMMON, "num_labels": 1}, "model.layers",
    ),
    "gemma3 reward": (
        "Gemma3ForSequenceClassification", "Gemma3Config", {**GEMMA3_FULL, "num_labels": 1},
        "model.language_model.layers",
    ),
    "gemma3 base": ("Gemma3TextModel", "Gemma3TextConfig", tiny.COMMON, "layers"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON, "model.layers"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON, "model.layers"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**COMMON, "head_dim": 16}, "model.layers"),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**COMMON, "head_dim": 16}, "model.layers"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 2,
             "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}, "transformer.h"),
    "mamba": ("MambaForCausalLM", "MambaConfig", STATE_SPACE, "backbone.layers"),
    "falcon mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", STATE_SPACE, "backbone.layers"),
    "bert": ("BertModel", "BertConfig", ENCODER, "encoder.layer"),
    "bert head": ("BertForSequenceClassification", "BertConfig", ENCODER, "bert.encoder.layer"),
}  # fmt: skip
GENERATE = [n for n, m in MODELS.items() if "CausalLM" in m[0] or "Conditional" in m[0] or "LMHead" in m[0]]


FLEX = {"head_dim": 16, "num_hidden_layers": 3}


def build(name, dtype=torch.float32):
    cls, config, options, blocks = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**options))
    for p in model.parameters():
        if p.dim() == 2 and p.requires_grad:
            torch.nn.init.normal_(p, std=0.15)
    return model.eval().to(dtype), blocks


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model, blocks = build(request.param)
    return model, model.get_submodule(blocks)


def first(output):
    return (
        output[0] if isinstance(output, tuple) else (output.logits if "logits" in output else output.last_hidden_state)
    )


def test_watching_gives_the_latents_and_changes_no_bit(case):
    model, blocks = case
    ids, sae = tiny.ids(), tiny.sae()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    with torch.no_grad():
        base = first(model(input_ids=ids, attention_mask=mask))
        for mode in ("observe", "splice+error"):
            with tiny.Hand(blocks[2]) as hand, gsf.attach(model, {2: sae}, mode=mode, tokens="all") as run:
                assert torch.equal(first(model(input_ids=ids, attention_mask=mask)), base)
            assert run.latents[2] == sae.encode_sparse(hand.rows())
            assert run.latents[2].nnz > 0
    assert [s.n_rows for s in run.sequences(2)] == [7, 9]
    assert tiny.hook_count(model)[0] == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_splice_is_that_of_a_hook_by_hand(case):
    model, blocks = case
    ids, sae = tiny.ids(), tiny.sae()
    content = ids != 2
    with torch.no_grad():
        base = first(model(input_ids=ids))
        with gsf.attach(model, {2: sae}, mode="splice", tokens=content):
            got = first(model(input_ids=ids))
        with tiny.Hand(blocks[2], change=lambda x: torch.where(content[..., None], sae(x), x)):
            want = first(model(input_ids=ids))
        with gsf.attach(model, {2: sae}, mode="splice+error", edits=gsf.Add(3, 4.0), tokens="all"):
            added = first(model(input_ids=ids))
        with tiny.Hand(blocks[2], change=lambda x: x + 4 * sae.W_dec[3]):
            steered = first(model(input_ids=ids))
    assert torch.equal(got, want)
    assert not torch.equal(got, base)
    torch.testing.assert_close(added, steered)


def test_the_model_may_be_called_below_its_head(case):
    model, blocks = case
    inner = next(
        (m for m in (getattr(model, n, None) for n in ("model", "backbone", "bert", "transformer")) if m), None
    )
    if inner is None:
        inner = model
    with torch.no_grad(), tiny.Hand(blocks[1]) as hand, gsf.attach(model, {1: tiny.sae()}, tokens="all") as run:
        inner(input_ids=tiny.ids())
    assert run.latents[1] == tiny.sae().encode_sparse(hand.rows())


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_is_followed(name, dtype):
    model, blocks = build(name, dtype)
    blocks = model.get_submodule(blocks)
    ids, sae = tiny.ids(), tiny.sae()
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    base = model.generate(ids, **options)
    with tiny.Hand(blocks[2]) as hand, gsf.attach(model, {2: sae}, tokens="all") as run:
        output = model.generate(ids, **options)
    assert torch.equal(output, base)
    if name in ("mamba", "falcon mamba"):
        assert hand.seen[0].dtype == torch.float32, "the residual stream stays in fp32"
    per_sequence = run.sequences(2, output)
    for b, got in enumerate(per_sequence):
        want = sae.encode_sparse(torch.cat([x[b] for x in hand.seen]))
        assert got == want[: got.n_rows]
        assert got.n_rows == run.tokens.position[run.tokens.sequence == b].numel()
    with gsf.attach(model, {2: sae}, mode="splice", tokens="all"):
        spliced = model.generate(ids, **options)
    with tiny.Hand(blocks[2], change=lambda x: sae(x).to(x.dtype)):
        assert torch.equal(spliced, model.generate(ids, **options))


@pytest.mark.slow
def test_flex_attention():
    """Which compiles its own kernels, whatever the model does; one shape, for that takes its time."""
    model = tiny.gemma2("flex_attention", **FLEX)
    block, ids, sae = model.model.layers[2], tiny.ids(), tiny.sae()
    with torch.no_grad():
        base = model(ids, use_cache=False).logits
        with tiny.Hand(block) as hand, gsf.attach(model, {2: sae}, mode="splice+error", tokens="all") as run:
            assert torch.equal(model(ids, use_cache=False).logits, base)
        assert run.latents[2] == sae.encode_sparse(hand.rows())
        with gsf.attach(model, {2: sae}, mode="splice", tokens="all"):
            got = model(ids, use_cache=False).logits
        with tiny.Hand(block, change=sae):
            assert torch.equal(got, model(ids, use_cache=False).logits)
    assert not torch.equal(got, base)


KINDS = {
    "llama": {"mlp": ("mlp", "output"), "mlp_in": ("mlp", "input"), "attn": ("self_attn.o_proj", "input"),
              "attn_out": ("self_attn", "output")},
    "qwen3": {"mlp": ("mlp", "output"), "attn": ("self_attn.o_proj", "input")},
    "bert": {"attn": ("attention.output.dense", "input"), "mlp_in": ("intermediate.dense", "input")},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_sites_inside_a_block(name):
    model, blocks = build(name)
    block, sae = model.get_submodule(blocks)[1], tiny.sae()
    for kind, (path, end) in KINDS[name].items():
        with (
            torch.no_grad(),
            tiny.Hand(block.get_submodule(path), end) as hand,
            gsf.attach(model, {(1, kind): sae}, tokens="all") as run,
        ):
            model(input_ids=tiny.ids())
        assert run.latents[1, kind] == sae.encode_sparse(hand.rows()), kind
        assert run.latents[1, kind].nnz > 0


def test_what_a_block_lacks_is_named():
    model, _ = build("mamba")
    with pytest.raises(gsf.AttachError, match="MambaBlock of MambaForCausalLM has none of"):
        gsf.attach(model, {(1, "mlp"): tiny.sae()}, tokens="all")
    with torch.no_grad(), gsf.attach(model, {"backbone.layers.1.mixer": tiny.sae()}, tokens="all") as run:
        model(input_ids=tiny.ids())
    assert run.latents["backbone.layers.1.mixer"].n_rows == 18


def test_a_path_of_the_text_model_is_found_in_the_multimodal_one():
    model, blocks = build("gemma3 multimodal")
    norm = model.get_submodule(blocks)[1].post_feedforward_layernorm
    sites = {"model.layers.1.post_feedforward_layernorm.output": tiny.sae(), "model.layers.3.output": tiny.sae()}
    with torch.no_grad(), tiny.Hand(norm) as hand, gsf.attach(model, sites, tokens="all") as run:
        model(input_ids=tiny.ids())
    assert run.latents[1, "mlp"] == tiny.sae().encode_sparse(hand.rows())


class Unknown(torch.nn.Module):
    """No transformers model at all."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(64, 32)
        self.stages = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))

    def forward(self, input_ids):
        return self.stages(self.table(input_ids))


def test_an_unknown_architecture_takes_a_module_path():
    model = Unknown()
    with pytest.raises(gsf.AttachError, match="module path"):
        gsf.attach(model, {0: tiny.sae()}, tokens="all")
    with (
        torch.no_grad(),
        tiny.Hand(model.stages[0]) as hand,
        gsf.attach(model, {"stages.0": tiny.sae()}, tokens="all") as run,
    ):
        model(tiny.ids())
    assert run.latents["stages.0"] == tiny.sae().encode_sparse(hand.rows())
    with pytest.raises(gsf.AttachError, match="carries 32"):
        gsf.attach(model, {"stages.0": tiny.sae(31)}, tokens="all")
