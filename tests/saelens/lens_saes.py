"""Small SAELens objects with seeded weights, and comparison helpers for the tests."""

import copy

import torch
from sae_lens import saes as lens
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch.utils._python_dispatch import TorchDispatchMode

D_IN, D_SAE, D_OUT = 24, 160, 20
SAES = {
    "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig, {}),
    "standard": (lens.StandardSAE, lens.StandardSAEConfig, {}),
    "topk": (lens.TopKSAE, lens.TopKSAEConfig, {"k": 7}),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig, {"k": 7}),
}
TRANSCODERS = {
    "transcoder": (lens.Transcoder, lens.TranscoderConfig),
    "skip_transcoder": (lens.SkipTranscoder, lens.SkipTranscoderConfig),
    "jumprelu_transcoder": (lens.JumpReLUTranscoder, lens.JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (lens.JumpReLUSkipTranscoder, lens.JumpReLUSkipTranscoderConfig),
}
ALL = [*SAES, *TRANSCODERS]


def make(kind="jumprelu", seed=0, d_in=D_IN, hook_name="blocks.0.hook_resid_post", hook_name_out=None, **cfg):
    """A SAELens SAE or transcoder of which about one feature in thirty fires."""
    metadata = SAEMetadata(hook_name=hook_name, hook_name_out=hook_name_out, model_name="tiny")
    if kind in SAES:
        cls, config, more = SAES[kind]
    else:
        (cls, config), more = TRANSCODERS[kind], {"d_out": cfg.pop("d_out", D_OUT), "apply_b_dec_to_input": False}
    sae = cls(config(d_in=d_in, d_sae=D_SAE, metadata=metadata, **{**more, **cfg}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / d_in**0.5)
            if name == "threshold":
                parameter.abs_().add_(1.5)
            elif name == "b_enc" and kind in ("standard", "transcoder", "skip_transcoder"):
                parameter.sub_(1.8)
    return sae


def fill(module, seed=0):
    """The same for a coder of another library, [D_IN, D_SAE]: seeded weights, thresholds of which few are reached."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / D_IN**0.5)
            if "threshold" in name:
                parameter.abs_().add_(1.5)
        for name, buffer in module.named_buffers():
            if name == "threshold":
                buffer.fill_(1.75)
    return module


def tokens(*shape, seed=1):
    return torch.randn(*(shape or (3, 5, D_IN)), generator=torch.Generator().manual_seed(seed))


def assert_as_exact(got, plain, reference):
    """`got` is as near to the fp64 `reference` as twice SAELens's own fp32 result, an ulp of its size allowed."""
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    size = float(reference.abs().max())
    allowed = 2 * float((plain.double() - reference).abs().max()) + 4 * torch.finfo(plain.dtype).eps * size
    assert float((got.double() - reference).abs().max()) <= allowed


def in_double(sae):
    """The same SAE in fp64, by SAELens."""
    exact = copy.deepcopy(sae)
    # norms and reshapes are closures over the object they were made for
    exact._setup_activation_normalization()
    if exact.hook_z_reshaping_mode:
        exact.turn_on_forward_pass_hook_z_reshaping()
    return exact.to(torch.float64)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation gave while it was on."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            # views of the weights are no new memory
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return out
