"""Small random models and SAEs for the tests of `attach`."""

from __future__ import annotations

import pytest
import torch

from gemmascope_fast import JumpReLUSAE, SAEConfig, Site

D, F, VOCAB = 32, 96, 64
COMMON = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 24, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 1,
}  # fmt: skip


def gemma2(attention="eager", **more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**{**COMMON, **more}, sliding_window=8, attn_implementation=attention)
    return lively(transformers.Gemma2ForCausalLM(config))


def gemma3(attention="eager", **more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**{**COMMON, **more}, sliding_window=8, attn_implementation=attention)
    return lively(transformers.Gemma3ForCausalLM(config))


def lively(model):
    """Weights large enough that greedy decoding does not repeat one token; evaluation mode."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn(p.shape, generator=g) * (0.1 if "embed" in name else 0.3))
    return model.eval()


def sae(d_in=D, d_out=None, seed=1, kind=JumpReLUSAE, site=None, site_out=None, **more):
    """A random SAE of which about a fifth of the features fire."""
    g = torch.Generator().manual_seed(seed)
    d_out = d_out or d_in
    return kind.from_weights(
        W_enc=torch.randn(d_in, F, generator=g) / d_in**0.5,
        W_dec=torch.randn(F, d_out, generator=g) / d_out**0.5,
        b_enc=0.1 * torch.randn(F, generator=g),
        b_dec=0.1 * torch.randn(d_out, generator=g),
        threshold=torch.full((F,), 0.8),
        cfg=SAEConfig(d_in, F, d_out, site, site_out),
        **more,
    )


def ids(batch=2, length=9, seed=5):
    """Random ordinary tokens after a BOS."""
    g = torch.Generator().manual_seed(seed)
    made = torch.randint(3, VOCAB, (batch, length), generator=g)
    made[:, 0] = 2
    return made


def resid(layer):
    return Site("resid", layer)


class Hand:
    """A forward hook written by hand: the first tensor of every output (or input) of one module."""

    def __init__(self, module, end="output", change=None):
        self.seen, self.change = [], change
        if end == "output":
            self.handle = module.register_forward_hook(self._output)
        else:
            self.handle = module.register_forward_pre_hook(lambda _m, args: self.seen.append(args[0].detach().clone()))

    def _output(self, _module, _args, output):
        first = output[0] if isinstance(output, tuple) else output
        self.seen.append(first.detach().clone())
        if self.change is None:
            return None
        new = self.change(first)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def rows(self):
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in self.seen])


def hook_count(model):
    """Everything that attaching could leave behind."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), sorted(model.__dict__)


def layer(model, index=1):
    return model.model.layers[index]
