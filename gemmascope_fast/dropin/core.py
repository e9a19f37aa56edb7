"""Shared by the adapters: this package's module over another module's parameters, and a check for hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast import ops
from gemmascope_fast.checkpoints.kinds import KINDS
from gemmascope_fast.checkpoints.loading import folded_b_dec
from gemmascope_fast.ops._exact import exact_product, outside_autocast, put
from gemmascope_fast.ops._transforms import beyond_reverse
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUTranscoder
from gemmascope_fast.sae.topk import AbsTopKSAE, TopKSAE

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# A sparse decode reads each row again for every token; a dense product reuses it from cache. Measured at 2304 × 16,384
# with 16 or 256 tokens, they take the same time if 6 to 12 % of the latents fire.
DENSE_SHARE = 1 / 16
SHARED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def watched(point: nn.Module) -> bool:
    """Whether anything reads or changes the tensor at the hook point `point`, forward or backward."""
    hooks = (point._forward_hooks, point._forward_pre_hooks, point._backward_hooks, point._backward_pre_hooks)
    # a module of another kind in place of a hook point computes something
    return any(hooks) or type(point).__name__ not in ("HookPoint", "SparseHookPoint", "Identity")


class Core:
    """This package's module over the parameters of `owner`, without copying them. It is stored in the owner's
    `__dict__`, so it is not a submodule: names, state dicts and hooks of the owner do not change.

    Parameters that were replaced are used from the next call on; edits of them are detected as for `prepare`.
    """

    def __init__(self) -> None:
        self.module: JumpReLUSAE | None = None

    def of(self, owner: nn.Module, k: int | None = None, raw: bool = True, by_magnitude: bool = False) -> JumpReLUSAE:
        """The module, with zeros as threshold if the owner has none; top-k if k is given.

        raw: the encoder reads activations whose mean is about b_dec. Otherwise b_dec was subtracted or belongs to
        another site, and the module is a transcoder, whose screen is not centred at b_dec.
        """
        given = owner._parameters
        module = self.module
        if module is None or type(module) is not _kind(k, raw, by_magnitude) or not self._fits(module, given, k):
            module = self.module = _empty(given, k, raw, by_magnitude)
        for name in SHARED:
            tensor = given.get(name)
            if isinstance(tensor, nn.Parameter) and module._parameters[name] is not tensor:
                setattr(module, name, tensor)
        if given.get("threshold") is None:
            held, like = module.threshold, module.b_enc
            if held.dtype != like.dtype or held.device != like.device:
                module.threshold = nn.Parameter(torch.zeros_like(like), requires_grad=False)
        return module

    @staticmethod
    def _fits(module: JumpReLUSAE, given: dict[str, Any], k: int | None) -> bool:
        same = (given["W_enc"].shape, given["W_dec"].shape) == (module.W_enc.shape, module.W_dec.shape)
        return same and k == getattr(module, "k", None)


def _kind(k: int | None, raw: bool, by_magnitude: bool) -> Any:
    if k is not None:
        return AbsTopKSAE if by_magnitude else TopKSAE
    return JumpReLUSAE if raw else JumpReLUTranscoder


def _empty(given: dict[str, Any], k: int | None, raw: bool, by_magnitude: bool = False) -> JumpReLUSAE:
    W_enc, W_dec = given["W_enc"], given["W_dec"]
    shapes = {"W_enc": W_enc.shape, "W_dec": W_dec.shape, "b_enc": W_enc.shape[1:], "b_dec": W_dec.shape[1:]}
    weights: dict[str, Any] = {
        name: torch.empty(shape, dtype=W_enc.dtype, device="meta") for name, shape in shapes.items()
    }
    weights["threshold"] = torch.empty_like(weights["b_enc"])
    made: JumpReLUSAE = _kind(k, raw, by_magnitude)(**weights, **({} if k is None else {"k": k}))
    return made


def pre_activations(core: JumpReLUSAE, x: Tensor) -> Tensor:
    """All z = x @ W_enc + b_enc, dense [..., d_sae] in the SAE's dtype, with the same bytes as in encoding."""
    # laid out again if the weights are new; a screen is useless if every pair is computed
    weights = core.screen_cache.refresh(core)
    flat = x.reshape(-1, core.cfg.d_in)
    # an infinite bandwidth stores every pair but those of z = -inf
    crow, col, values = ops.encode(flat, *weights, float("inf"))
    size = (flat.shape[0], core.cfg.d_sae)
    shape = (*x.shape[:-1], core.cfg.d_sae)
    if values.numel() == size[0] * size[1]:
        return values.reshape(shape).to(core.W_enc.dtype)
    latents = SparseLatents(crow, col, values, size)
    at = latents.row_indices() * size[1] + latents.col_indices.long()
    full = torch.full((size[0] * size[1],), -torch.inf, device=flat.device)
    return put(full, (at,), latents.values).reshape(shape).to(core.W_enc.dtype)


def decode(core: JumpReLUSAE, acts: Tensor | SparseLatents) -> Tensor:
    """Reconstruction [..., d_out] of dense or sparse latents, b_dec included; the same bytes for both.

    If more than `DENSE_SHARE` of the latents fire, a dense product decodes them, in torch's order of summation.
    """
    if isinstance(acts, SparseLatents):
        size = acts.n_rows * acts.d_sae
        return _dense(core, acts.to_dense()) if acts.nnz > DENSE_SHARE * size else core.decode(acts)
    acts = acts.to(core.W_dec.dtype)
    if beyond_reverse():
        return _dense(core, acts)
    if int(acts.count_nonzero()) > DENSE_SHARE * acts.numel():
        return _dense(core, acts)
    if acts.requires_grad and torch.is_grad_enabled():
        out: Tensor = _SparseValueDenseGradient.apply(acts, core.W_dec, core.b_dec, core)
        return out
    return core.decode(acts)


def _dense(core: JumpReLUSAE, acts: Tensor) -> Tensor:
    return (exact_product(acts, core.W_dec) + core.b_dec.float()).to(core.W_dec.dtype)


class _SparseValueDenseGradient(torch.autograd.Function):
    """The result of a sparse decode with the gradient of a dense one, as zero latents have gradients too."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, W_dec: Tensor, b_dec: Tensor, core: JumpReLUSAE) -> Tensor:
        ctx.save_for_backward(acts, W_dec)
        return core.decode(acts.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        acts, W_dec = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        rows = acts.reshape(-1, acts.shape[-1])
        wanted = ctx.needs_input_grad
        with outside_autocast(grad.device):
            return (
                grad @ W_dec.t() if wanted[0] else None,
                rows.t() @ flat if wanted[1] else None,
                flat.sum(0) if wanted[2] else None,
                None,
            )


def converted(
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None = None,
    *,
    k: int | None = None,
    subtracts_b_dec: bool = False,
    transcodes: bool = False,
    W_skip: Tensor | None = None,
) -> Any:
    """Make a module of this package with copies of another coder's weights, in Gemma Scope's shapes; ReLU without a
    threshold, top-k with k.  subtracts_b_dec: the encoder reads x - b_dec, which is folded into b_enc.
    W_skip [d_in, d_out]: for a transcoder."""
    given = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    own: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in given.items() if name != "W_enc"}
    # as rows, so that no second copy is made later
    own["W_enc"] = torch.empty_like(W_enc.T, memory_format=torch.contiguous_format).copy_(W_enc.detach().T).T
    own["W_dec"] = own["W_dec"].contiguous()
    if subtracts_b_dec:
        own["b_enc"] = folded_b_dec(own["W_enc"], own["b_dec"], own["b_enc"].double())
    own["threshold"] = torch.zeros_like(own["b_enc"]) if threshold is None else threshold.detach().to(b_enc.dtype)
    kind = ("skip_" if W_skip is not None else "") + ("transcoder" if transcodes else "sae")
    more: dict[str, Any] = {} if k is None else {"k": k}
    if W_skip is not None:
        more["W_skip"] = W_skip.detach().clone(memory_format=torch.contiguous_format)
    return KINDS[kind if k is None else f"topk_{kind}"](**own, **more)
