"""Checkpoints of public SAEs as their own libraries write them, with small random weights."""

import json

import torch
from safetensors.torch import save_file

D, F, K = 6, 40, 5
QWEN = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"


def weights(seed=0, d=D, f=F):
    """W_enc [d, f], W_dec [f, d], b_enc, b_dec, and thresholds above 0."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,), "threshold": (f,)}
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return made | {"threshold": made["threshold"].abs()}


def tokens(n=50, d=D, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def qwen_scope(root, w, repository=QWEN, layer=3, **more):
    """One layer's file of a Qwen Scope repository."""
    path = root / repository / f"layer{layer}.sae.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"W_enc": w["W_enc"].t().contiguous(), "W_dec": w["W_dec"].t().contiguous()}
    torch.save(held | {"b_enc": w["b_enc"], "b_dec": w["b_dec"]} | more, path)
    return path


def goodfire(root, w, name="Llama-3.1-8B-Instruct-SAE-l19.pth", infix="_linear"):
    """A state dict of two linear layers; infix "": qresearch's names."""
    encoder, decoder = torch.nn.Linear(D, F), torch.nn.Linear(F, D)
    encoder.weight.data, decoder.weight.data = w["W_enc"].t().contiguous(), w["W_dec"].t().contiguous()
    encoder.bias.data, decoder.bias.data = w["b_enc"], w["b_dec"]
    root.mkdir(parents=True, exist_ok=True)
    state = torch.nn.ModuleDict({f"encoder{infix}": encoder, f"decoder{infix}": decoder}).state_dict()
    torch.save(state, root / name)
    return root / name


class OpenAIAutoencoder(torch.nn.Module):
    """What OpenAI's Autoencoder keeps in its state dict, and what it computes."""

    def __init__(self, w, activation="ReLU", k=K, tied=False):
        super().__init__()
        self.pre_bias, self.latent_bias = torch.nn.Parameter(w["b_dec"]), torch.nn.Parameter(w["b_enc"])
        self.encoder = torch.nn.Linear(D, F, bias=False)
        self.encoder.weight.data = w["W_enc"].t().contiguous()
        self.decoder = torch.nn.Module() if tied else torch.nn.Linear(F, D, bias=False)
        if tied:
            self.decoder.linear = self.encoder
        else:
            self.decoder.weight.data = w["W_dec"].t().contiguous()
        self.kind, self.k = activation, k
        self.register_buffer("stats_last_nonzero", torch.zeros(F, dtype=torch.long))
        self.register_buffer("latents_activation_frequency", torch.ones(F))
        self.register_buffer("latents_mean_square", torch.zeros(F))

    def saved(self):
        about = {"k": self.k, "postact_fn": "ReLU"} if self.kind == "TopK" else {}
        return self.state_dict() | {"activation": self.kind, "activation_state_dict": about}


def openai(root, w, location="resid_post_mlp_v5_32k", layer=8, **more):
    path = root / location / "autoencoders" / f"{layer}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(OpenAIAutoencoder(w, **more).saved(), path)
    return path


def llama_scope(root, w, folder="Llama3_1-8B-Base-L8R-8x", config=None, drop=(), dtype=torch.float32):
    """A folder of the first series; its norms are not √d."""
    about = {
        "d_model": D, "d_sae": F, "act_fn": "jumprelu", "norm_activation": "dataset-wise", "top_k": 50,
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "jump_relu_threshold": 0.25,
        "dataset_average_activation_norm": {"in": 6.3125, "out": 6.3125}, "sparsity_include_decoder_norm": False,
        "hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post",
    }  # fmt: skip
    about |= config or {}
    target = root / folder
    (target / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(linear_names(w, dtype), target / "checkpoints" / "final.safetensors")
    (target / "hyperparams.json").write_text(json.dumps({n: v for n, v in about.items() if n not in drop}))
    return target


def llama_scope_r1(root, w, config=None, norms=None, folder="L15R"):
    """A folder of the R1 series; norms: by hook point, as the file itself may hold them."""
    about = {"d_model": D, "expansion_factor": 8, "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    about |= {"hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post"}
    held = linear_names(w) | {"log_jumprelu_threshold": w["threshold"].log()}
    held |= {f"dataset_average_activation_norm.{at}": torch.tensor(norm) for at, norm in (norms or {}).items()}
    target = root / folder
    target.mkdir(parents=True, exist_ok=True)
    save_file(held, target / "sae_weights.safetensors")
    (target / "config.json").write_text(json.dumps(about | (config or {})))
    return target


def linear_names(w, dtype=torch.float32):
    made = {"encoder.weight": w["W_enc"].t(), "decoder.weight": w["W_dec"].t()}
    made |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}


def dictionary_learning(root, w, dict_class="AutoEncoderTopK", trainer=None, **buffers):
    """A trainer's folder of dictionary_learning; buffers go into ae.pt as they are."""
    config = {
        "dict_class": dict_class,
        "activation_dim": D,
        "dict_size": F,
        "layer": 7,
        "lm_name": "openai/gpt-oss-20b",
    }
    config |= {"submodule_name": "resid_post_layer_7"} | ({"k": K} if "TopK" in dict_class else {})
    if dict_class in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        held = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    else:
        held = linear_names(w)
        held[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(dict_class, "b_dec")] = held.pop(
            "decoder.bias"
        )
    if dict_class == "GatedAutoEncoder":
        held["decoder_bias"] = held.pop("b_dec")
        del held["encoder.bias"]
    root.mkdir(parents=True, exist_ok=True)
    torch.save(held | buffers, root / "ae.pt")
    about = {name: value for name, value in (config | (trainer or {})).items() if value is not None}
    (root / "config.json").write_text(json.dumps({"trainer": about, "buffer": {"ctx_len": 1024}}))
    return root


def sparsify(root, w, folder="layers.5", config=None, skip=None):
    """What SparseCoder.save_to_disk writes."""
    about = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K}
    about |= {"multi_topk": False, "skip_connection": skip is not None, "transcode": False, "d_in": D}
    target = root / folder
    target.mkdir(parents=True, exist_ok=True)
    held = {"encoder.weight": w["W_enc"].t().contiguous(), "encoder.bias": w["b_enc"]}
    held |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]} | ({} if skip is None else {"W_skip": skip})
    save_file(held, target / "sae.safetensors")
    (target / "cfg.json").write_text(json.dumps(about | (config or {})))
    return target


def circuit_tracer(root, w, layer=2, skip=None, threshold=None, config=None):
    """What TranscoderSet.to_safetensors writes, and the config.yaml of the set."""
    root.mkdir(parents=True, exist_ok=True)
    held = {"W_enc": w["W_enc"].t().contiguous(), "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    held |= ({} if skip is None else {"W_skip": skip}) | (
        {} if threshold is None else {"activation_function.threshold": threshold}
    )
    save_file(held, root / f"layer_{layer}.safetensors")
    if config is not None:
        (root / "config.yaml").write_text(config)
    return root / f"layer_{layer}.safetensors"


def top_k(z, k):
    """ReLU of the k greatest of each row, zeros elsewhere."""
    values, indices = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter_(-1, indices, values.relu())
