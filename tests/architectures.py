"""Every causal language model of the installed transformers, made tiny from its own default configuration."""

from __future__ import annotations

import torch

# What a configuration's sizes become, by the names that transformers' configurations use.
SIZES = {
    "vocab_size": 64, "n_words": 64, "emb_dim": 32, "hidden_size": 32, "hidden_size_global": 32,
    "d_model": 32, "n_embd": 32, "embed_dim": 32, "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "encoder_ffn_dim": 48, "dff": 48,
    "decoder_ffn_dim": 48, "dim_ff": 48, "feed_forward_size": 48, "dense_intermediate_size": 48,
    "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3, "encoder_layers": 2, "decoder_layers": 3,
    "num_encoder_layers": 2, "num_decoder_layers": 3, "num_blocks": 3,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "kv_channels": 8, "dim_head": 8, "global_head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "sliding_window": 8, "image_size": 28, "patch_size": 14,
    "state_size": 4, "mamba_d_state": 4, "mamba_expand": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8, "linear_num_heads": 4,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip


def alternate(first, second):
    return {"num_hidden_layers": 4, "layer_types": [first, second] * 2}


HYBRID = alternate("linear_attention", "full_attention")
GEMMA4 = {**alternate("sliding_attention", "full_attention"), "global_head_dim": 8}
LATENT = {"head_dim": None, "num_key_value_heads": 4}  # attention over a latent has a head size of its own

# What the sizes above do not make: None leaves a name as the configuration has it.
SPECIAL = {
    "axk1": LATENT, "axk2": LATENT, "deepseek_v3": LATENT, "deepseek_v32": LATENT, "glm4_moe_lite": LATENT,
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "glm_moe_dsa": LATENT, "minicpm3": LATENT, "sarvam_mla": LATENT, "youtu": LATENT,
    "longcat_flash": LATENT | {"head_dim": 4},
    "bailing_hybrid": LATENT | HYBRID, "kimi_linear": LATENT | HYBRID,
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16} | alternate("mamba", "attention"),
    "granite": {"residual_multiplier": 0.22}, "granitemoe": {"residual_multiplier": 0.22},
    "granitemoeshared": {"residual_multiplier": 0.22}, "granite_swa": {"residual_multiplier": 0.22},
    "granitemoe_swa": {"residual_multiplier": 0.22},
    "minimax": HYBRID | {f"{kind}_{factor}_factor": value for kind in ("full_attn", "linear_attn", "mlp")
                         for factor, value in (("alpha", 1.5), ("beta", 0.7))},
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon": {"head_dim": None},
    "gemma3n_text": alternate("sliding_attention", "full_attention")
                    | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": GEMMA4, "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8}, "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2, "num_experts": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": alternate("conv", "full_attention"), "lfm2": alternate("conv", "full_attention"),
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8}, "nemotron": {"num_key_value_heads": 2},
    "olmo_hybrid": HYBRID,
    "prophetnet": {"num_hidden_layers": None},
    "qwen3_5_text": HYBRID, "qwen3_5_moe_text": HYBRID, "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                                "indexer_compress_ratio": 2, "ngram_vocab_size_base": 100, "hc_lowrank": 8,
                                "ple_embed_dim": 32, "partial_rotary_factor": 0.5},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh", "local"], "axial_pos_shape": [8, 16],
                 "axial_pos_embds_dim": [16, 16], "attention_head_size": 8},
    "xlnet": {"max_position_embeddings": None}, "xlstm": {"v_head_dim": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_head_dim": 16,
              "attention_hidden_size": 64, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 8,
               "n_mamba_heads": 8},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 48}},
    "dots3_note_text": LATENT | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
                                 "swa_kv_lora_rank": 16, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8,
                                 "swa_v_head_dim": 8},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1] * 3, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small(values, special):
    """The keyword arguments of a configuration (as a dict) made small, those of its parts as well."""
    made = {}
    for name, value in values.items():
        if isinstance(value, dict) and value.get("model_type"):
            made[name] = small(value, SPECIAL.get(value["model_type"], {})) | {"model_type": value["model_type"]}
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            made[name] = SIZES[name]
    made |= special
    return {name: value for name, value in made.items() if value is not None}


def names():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make(name):
    """A random tiny model of a model type, in evaluation mode; whatever transformers raises where it cannot be."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    config = cls(**small(cls().to_dict(), SPECIAL.get(name, {})))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # gains and multipliers of one, or biases of zero, would hide what is missing
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model


KINDS = ("resid", "attn_out", "mlp", "attn", "mlp_in", "mlp_in_no_gain")
# What cannot be read here, and why.
CANNOT = {
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is the same decoder",
    "gemma4_assistant": "transformers cannot make its default configuration",
    "gemma4_unified_assistant": "it reads the states of another model, not ids",
    "musicgen": "transformers cannot make it from its configuration",
    "musicgen_melody": "transformers cannot make it from its configuration",
}


def row(structure):
    """{kind: "yes", "no", or "some layers" for a hybrid}; every refusal must be an AttachError by name."""
    from gemmascope_fast.errors import AttachError
    from gemmascope_fast.sae.sites import Site

    try:
        layers = range(len(structure.stack()[1]))
    except AttachError:
        return dict.fromkeys(KINDS, "no")
    found = {}
    for kind in KINDS:
        there = []
        for layer in layers:
            try:
                structure.place(Site(kind, layer))
                there.append(layer)
            except AttachError as error:
                said = str(error)
                if f"site {kind!r} of layer {layer}" not in said or "module path" not in said:
                    raise
        found[kind] = "yes" if len(there) == len(layers) else "some layers" if there else "no"
    return found


def table():
    """The table of docs/reference/sites.md, one line an architecture."""
    from gemmascope_fast.attach.transformers.structure import Structure

    lines = ["| architecture | " + " | ".join(f"`{kind}`" for kind in KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for name in names():
        if name in CANNOT:
            lines.append(f"| {name} | " + " | ".join("not tried" for _ in KINDS) + " |")
        else:
            found = row(Structure(make(name)))
            lines.append(f"| {name} | " + " | ".join(found[kind] for kind in KINDS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":  # python tests/architectures.py: docs/reference/sites.md anew
    from pathlib import Path

    page = Path(__file__).parent.parent / "docs" / "reference" / "sites.md"
    head = page.read_text("utf-8").split("| architecture |")[0]
    page.write_text(head + table() + "\n", "utf-8")
