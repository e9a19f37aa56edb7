"""What people use today: eager PyTorch, torch.compile, SAELens, sparsify, torchao, scipy, each by its own code.

Every function takes tensors or an SAE of this package and works on those very weights.  A peer that is not installed
raises ModuleNotFoundError, which the benchmark lists as missing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE


@dataclass(eq=False)
class Dense:
    """The weights of an SAE laid out as a dense fp32 product reads them fastest: W_enc [d_in, d_sae] contiguous, as
    Gemma Scope stores it.  At 2304 × 16,384 and T = 1 it takes 7.7 ms where the transposed view of rows takes 10.3;
    in bf16 rows are the faster of the two (4.6 and 6.7 ms), and an SAE of this package has those."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor

    @classmethod
    def of(cls, sae: JumpReLUSAE) -> Dense:
        """The other arrays are shared, not copied."""
        rest = (sae.W_dec.detach(), sae.b_enc.detach(), sae.b_dec.detach(), sae.threshold.detach())
        return cls(sae.W_enc.detach().contiguous(), *rest)

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype


Weights = JumpReLUSAE | Dense

# ---- eager PyTorch ----------------------------------------------------------------------------------


def eager_encode(sae: Weights, x: Tensor) -> Tensor:
    """Dense JumpReLU as one writes it in PyTorch."""
    z = torch.addmm(sae.b_enc, x, sae.W_enc)
    return torch.relu(z) * (z > sae.threshold)


def eager_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """Dense top-k as SAELens and dictionary_learning write it: ReLU, torch.topk, scatter."""
    z = torch.relu(torch.addmm(b_enc, x, W_enc))
    values, indices = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter_(-1, indices, values)


def eager_decode(sae: Weights, latents: Tensor) -> Tensor:
    return torch.addmm(sae.b_dec, latents, sae.W_dec)


def eager_sae(sae: Weights, x: Tensor) -> Tensor:
    return eager_decode(sae, eager_encode(sae, x))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile (inductor), with its search over matmul templates off: that is for GPUs."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# ---- sparse decodes ---------------------------------------------------------------------------------


def embedding_bag_decode(sae: JumpReLUSAE, latents: SparseLatents) -> Tensor:
    """torch's own sparse decode: a weighted sum of rows, then the bias.  The fastest of torch's for this."""
    bags = torch.nn.functional.embedding_bag(
        latents.col_indices,
        sae.W_dec,
        latents.crow_indices.to(torch.int32),
        mode="sum",
        per_sample_weights=latents.values.to(sae.W_dec.dtype),
        include_last_offset=True,
    )
    return bags + sae.b_dec


def bag_sae(sae: Weights, x: Tensor) -> Tensor:
    """F.linear, threshold, and embedding_bag over the nonzeros: eager PyTorch's best for the whole SAE."""
    dense = eager_encode(sae, x)
    rows, columns = dense.nonzero(as_tuple=True)
    offsets = torch.zeros(len(x), dtype=torch.int64)
    offsets[1:] = torch.bincount(rows, minlength=len(x)).cumsum(0)[:-1]
    bags = torch.nn.functional.embedding_bag(
        columns, sae.W_dec, offsets, mode="sum", per_sample_weights=dense[rows, columns]
    )
    return bags + sae.b_dec


def sparsify_decode() -> Callable[[JumpReLUSAE, tuple[Tensor, Tensor]], Tensor]:
    """sparsify's decode on CPU (its Triton one is for GPUs): (indices, activations), each [N, k]."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify.utils import eager_decode as decode

    # sparsify holds W_dec as [d_in, d_sae] seen through .mT
    return lambda sae, top: decode(*top, sae.W_dec.mT) + sae.b_dec


def padded_topk(latents: SparseLatents) -> tuple[Tensor, Tensor]:
    """(indices, activations) [N, most]: what sparsify takes; a padded place weighs nothing."""
    values, indices = latents.topk(max(1, int(latents.l0().max())))
    return indices.clamp(min=0).long(), values


def scipy_decode(latents: SparseLatents) -> Callable[[JumpReLUSAE], Any]:
    """scipy.sparse's CSR times dense; the rows are made before, as ours are."""
    from scipy.sparse import csr_matrix

    crow, col, values = (t.numpy() for t in (latents.crow_indices, latents.col_indices, latents.values))
    rows = csr_matrix((values, col, crow), shape=latents.shape)
    return lambda sae: rows @ sae.W_dec.numpy() + sae.b_dec.numpy()


# ---- SAELens ----------------------------------------------------------------------------------------


def saelens_sae(sae: Weights) -> Any:
    """SAELens's own JumpReLUSAE, sharing these weights."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE as Theirs
    from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig

    dtype = str(sae.dtype).removeprefix("torch.")
    cfg = JumpReLUSAEConfig(
        d_in=sae.W_enc.shape[0],
        d_sae=sae.W_enc.shape[1],
        dtype=dtype,
        device="cpu",
        apply_b_dec_to_input=False,
        normalize_activations="none",
    )
    with torch.device("meta"):
        theirs = Theirs(cfg)
    state = {name: getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


# ---- linear layers ----------------------------------------------------------------------------------


def torchao_linear(weight: Tensor, kind: str) -> Callable[[Tensor], Tensor]:
    """A linear layer by torchao, bf16 activations: "int8" or "int4" weights only, or "int8 dynamic" activations too."""
    import torchao.quantization as ao

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    model = nn.Sequential(layer)
    if kind == "int8":
        config: Any = ao.Int8WeightOnlyConfig()
    elif kind == "int8 dynamic":
        config = ao.Int8DynamicActivationInt8WeightConfig()
    else:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=32)
    ao.quantize_(model, config)
    return model


def int8_packed(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's `_weight_int8pack_mm`: one int8 scale a row, bf16 activations."""
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-30)
    codes = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.to(torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, codes, scale)


def int4_packed(weight: Tensor, group: int = 32) -> Callable[[Tensor], Tensor]:
    """torch's `_weight_int4pack_mm_for_cpu`: groups of 32, 64 or 128, bf16 activations."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).clamp_min(1e-30)
    codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.reshape(weight.shape), 1)
    # its zero lies at code 8: w = (code - 8) · scale + zero
    pairs = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)


def int_mm(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's `_int_mm` with one scale a row and one a token, quantised in the call."""
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-30)
    codes = (weight / scale[:, None]).round().to(torch.int8).t()

    def call(x: Tensor) -> Tensor:
        s = (x.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
        return torch._int_mm((x / s).round().to(torch.int8), codes).float() * s * scale

    return call
