"""SAELens's SAEs and transcoders with this package's ops (tested with sae-lens 6.54).

An accelerated object is an instance of a subclass of its SAELens class: parameters, config, hook points, caches,
saving and loading are SAELens's own.  Latents stay sparse from encoder to decoder unless a hook at
`hook_sae_acts_pre` or `hook_sae_acts_post` needs the dense tensor. The error term uses the same encoding.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from sae_lens import saes as lens
from sae_lens.analysis import hooked_sae_transformer
from sae_lens.registry import get_sae_class
from sae_lens.saes.abstopk_sae import AbsTopK, AbsTopKSAE
from sae_lens.saes.sae import SAE, _disable_hooks
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from gemmascope_fast.checkpoints.gated import jumprelu_of
from gemmascope_fast.checkpoints.saelens import REFUSED
from gemmascope_fast.dropin import core as shared
from gemmascope_fast.ops._exact import outside_autocast
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUTranscoder
from gemmascope_fast.sae.weights import fingerprint

Latents = Tensor | SparseLatents


class Accelerated(SAE):
    """Base of the subclasses.  `encode_sparse` and `prepare` are additions to SAELens's interface."""

    _activation: ClassVar[type[nn.Module]] = nn.ReLU  # the activation function that this package's ops compute

    # ---- which code runs ----------------------------------------------------------------------------

    def why_plain(self) -> str | None:
        """Why SAELens's own code computes this object at present; None if this package's ops do."""
        expected = self._activation
        if type(self.activation_fn) is not expected or getattr(self.activation_fn, "use_sparse_activations", False):
            return f"activation_fn is {self.activation_fn}"
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            return "the config rescales activations by the decoder's norms"
        if self.W_enc.dtype not in shared.FLOATS:
            return f"the weights are {self.W_enc.dtype}"
        return None

    def _plain(self) -> bool:
        reason = self.why_plain()
        if reason is not None and self.__dict__.get("_told") != reason:
            warnings.warn(f"{type(self).__name__}: computed by SAELens's own code: {reason}", UserWarning, stacklevel=3)
            self.__dict__["_told"] = reason
        return reason is not None

    @property
    def core(self) -> JumpReLUSAE:
        """This package's module over the same parameters."""
        # stored in __dict__ to bypass nn.Module's registration: the core is not a submodule and shares our parameters
        held = self.__dict__.setdefault("_core", shared.Core())
        raw = self.cfg.apply_b_dec_to_input is False and self.cfg.normalize_activations == "none"
        raw = raw and not isinstance(self, AcceleratedTranscoder)
        return held.of(self, getattr(self.activation_fn, "k", None), raw, self._activation is AbsTopK)

    def prepare(self, force: bool = False, **options: Any) -> Accelerated:
        """Like `gsf.JumpReLUSAE.prepare`; use force after an undetectable edit (`p.data.mul_()`)."""
        self.core.prepare(force, **options)
        return self

    # ---- encode and decode --------------------------------------------------------------------------

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """The result of `encode`, as SparseLatents [..., d_sae]."""
        acts = super().encode(x) if self._plain() else self._activate(self.process_sae_in(x), False)[0]
        return acts if isinstance(acts, SparseLatents) else SparseLatents.from_dense(acts)

    def encode(self, x: Tensor) -> Tensor:
        if self._plain():
            return super().encode(x)
        acts, _ = self._activate(self.process_sae_in(x), False)
        return acts.to_dense() if isinstance(acts, SparseLatents) else acts

    def decode(self, feature_acts: Latents) -> Tensor:
        if self._plain() or (isinstance(feature_acts, Tensor) and feature_acts.is_sparse):
            return super().decode(feature_acts)
        return self._finish(shared.decode(self.core, feature_acts))

    def _gate(self, z: Tensor) -> Tensor:
        """Dense latents from dense pre-activations, as SAELens computes them."""
        acts = self.activation_fn(z)
        threshold = self._parameters.get("threshold")
        return acts if threshold is None else acts * (z > threshold).to(acts.dtype)

    def _activate(self, sae_in: Tensor, keep: bool) -> tuple[Latents, SparseLatents | None]:
        """(latents after their hooks, latents before all hooks); the second only if `keep`."""
        if shared.watched(self.hook_sae_acts_pre):
            z = shared.pre_activations(self.core, sae_in)
            clean = SparseLatents.from_dense(self._gate(z).detach()) if keep else None
            return self.hook_sae_acts_post(self._gate(self.hook_sae_acts_pre(z))), clean
        latents = self.core.encode_sparse(sae_in)
        if shared.watched(self.hook_sae_acts_post):
            return self.hook_sae_acts_post(latents.to_dense()), latents
        return latents, latents

    def _finish(self, raw: Tensor) -> Tensor:
        """The steps from the decoder's sum to the result of `decode`."""
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(raw))
        return self.reshape_fn_out(out, self.d_head)

    def _reconstruct(self, x: Tensor, clean: bool) -> tuple[Tensor, Tensor | None]:
        """(decode(encode(x)), the same without hooks), from one encoding; the second only if `clean`."""
        sae_in = self.process_sae_in(x)
        acts, unhooked = self._activate(sae_in, clean)
        raw = shared.decode(self.core, acts)
        out = self._finish(raw)
        if not clean:
            return out, None
        points = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post, self.hook_sae_recons)
        if not any(shared.watched(point) for point in points):
            return out, out.detach()
        with torch.no_grad(), _disable_hooks(self):
            clean_in = self.process_sae_in(x)
            if unhooked is None or not torch.equal(clean_in, sae_in):  # a hook changed the input
                unhooked = self.core.encode_sparse(clean_in)
            return out, self._finish(shared.decode(self.core, unhooked.detach()))

    def forward(self, x: Tensor) -> Tensor:
        if self._plain():
            return super().forward(x)
        out, clean = self._reconstruct(x, self.use_error_term)
        if clean is not None:
            with torch.no_grad():
                error = self.hook_sae_error(x - clean)
            out = out + error
        return self.hook_sae_output(out)

    # ---- edits of weights that cannot be detected -----------------------------------------------------

    def _edited(self) -> None:
        held = self.__dict__.get("_core")
        if held is not None and held.module is not None:
            self.prepare(force=True)

    def fold_W_dec_norm(self) -> None:
        super().fold_W_dec_norm()
        self._edited()

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self._edited()

    def fold_activation_whitening(self, *args: Any, **more: Any) -> None:
        super().fold_activation_whitening(*args, **more)
        self._edited()

    # ---- saving and loading -------------------------------------------------------------------------

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()  # safetensors needs contiguous tensors, and W_enc is stored as rows

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> Any:
        plain, _ = get_sae_class(architecture)
        fast = plain if issubclass(plain, Accelerated) else CLASSES.get(plain)
        if fast is None or not issubclass(fast, cls):
            raise ValueError(f"architecture: expected that of {cls.__name__}, got {architecture!r} ({plain.__name__})")
        return fast


class AcceleratedTranscoder(Accelerated):
    """Transcoders: no error term, no output hook, and their own d_out; the skip is added last."""

    def _finish(self, raw: Tensor) -> Tensor:
        return self.hook_sae_recons(raw)

    def forward(self, x: Tensor) -> Tensor:
        if self._plain():
            return super().forward(x)
        out, _ = self._reconstruct(x, False)
        if "W_skip" not in self._parameters:
            return out
        with outside_autocast(x.device):
            return out + x @ self.W_skip.T.to(x.device)


class AcceleratedJumpReLUSAE(Accelerated, lens.JumpReLUSAE):
    pass


class AcceleratedStandardSAE(Accelerated, lens.StandardSAE):
    pass


class AcceleratedTopKSAE(Accelerated, lens.TopKSAE):
    _activation = TopK


class AcceleratedAbsTopKSAE(Accelerated, AbsTopKSAE):
    _activation = AbsTopK


class AcceleratedGatedSAE(Accelerated, lens.GatedSAE):
    """A gated SAE, computed as the JumpReLU SAE that it is (`checkpoints/gated.py`).

    Its core has an encoder of its own, W_enc · exp(r_mag), made anew where the parameters were seen to change.  Where
    gradients of the parameters are wanted, SAELens's code computes it.
    """

    def why_plain(self) -> str | None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return "gradients of a gated SAE's parameters are wanted: use torch.no_grad() or requires_grad_(False)"
        return super().why_plain()

    @property
    def core(self) -> JumpReLUSAE:
        own = (self.W_enc, self.b_gate, self.b_mag, self.r_mag, self.W_dec, self.b_dec)
        now, held = fingerprint(*own), self.__dict__.get("_gated")
        if held is None or held[0] != now:
            with torch.no_grad():
                scale, threshold = jumprelu_of(self.b_gate, self.b_mag, self.r_mag)
                W_enc = (self.W_enc.t() * scale[:, None].to(self.W_enc.dtype)).t()
                made = JumpReLUTranscoder(W_enc, self.W_dec, self.b_mag, self.b_dec, threshold.to(W_enc.dtype))
            # kept with what it was made of: an address may be given out again
            held = self.__dict__["_gated"] = (now, made.requires_grad_(False), own)
        made = held[1]
        return made

    def prepare(self, force: bool = False, **options: Any) -> Accelerated:
        if force:
            self.__dict__.pop("_gated", None)
        return super().prepare(force, **options)

    def _edited(self) -> None:
        self.__dict__.pop("_gated", None)

    def _activate(self, sae_in: Tensor, keep: bool) -> tuple[Latents, SparseLatents | None]:
        if not shared.watched(self.hook_sae_acts_pre):
            return super()._activate(sae_in, keep)
        z = shared.pre_activations(self.core, sae_in)
        open_gate = (z > self.core.threshold).to(z.dtype)
        clean = SparseLatents.from_dense((open_gate * self.activation_fn(z)).detach()) if keep else None
        # the gate is of the activations before the hook: SAELens computes it beside what the hook sees
        return self.hook_sae_acts_post(open_gate * self.activation_fn(self.hook_sae_acts_pre(z))), clean


class AcceleratedReLUTranscoder(AcceleratedTranscoder, lens.Transcoder):
    pass


class AcceleratedSkipTranscoder(AcceleratedTranscoder, lens.SkipTranscoder):
    pass


class AcceleratedJumpReLUTranscoder(AcceleratedTranscoder, lens.JumpReLUTranscoder):
    pass


class AcceleratedJumpReLUSkipTranscoder(AcceleratedTranscoder, lens.JumpReLUSkipTranscoder):
    pass


CLASSES: dict[type, type] = {
    lens.JumpReLUSAE: AcceleratedJumpReLUSAE,
    lens.StandardSAE: AcceleratedStandardSAE,
    lens.TopKSAE: AcceleratedTopKSAE,
    AbsTopKSAE: AcceleratedAbsTopKSAE,
    lens.GatedSAE: AcceleratedGatedSAE,
    lens.Transcoder: AcceleratedReLUTranscoder,
    lens.SkipTranscoder: AcceleratedSkipTranscoder,
    lens.JumpReLUTranscoder: AcceleratedJumpReLUTranscoder,
    lens.JumpReLUSkipTranscoder: AcceleratedJumpReLUSkipTranscoder,
}


# ---- from plain to accelerated ----------------------------------------------------------------------


def accelerate(target: Any, inplace: bool | None) -> Any:
    """See `gemmascope_fast.dropin.accelerate`."""
    if not isinstance(target, SAE):
        return _accelerate_model(target, inplace)
    if isinstance(target, Accelerated):
        return target
    fast = _class_for(target)
    if inplace:
        target.__class__ = fast
        return target
    return _copy(target, fast)


def _class_for(sae: SAE) -> type:
    fast = CLASSES.get(type(sae))
    reason = REFUSED.get(sae.cfg.architecture())
    if fast is None and reason is not None:
        raise TypeError(f"target: a {type(sae).__name__} is not supported: {reason}")
    if fast is None:
        names = ", ".join(cls.__name__ for cls in CLASSES)
        raise TypeError(f"target: expected one of SAELens's {names}, got {type(sae).__name__}")
    return fast


def _copy(sae: SAE, fast: type) -> Accelerated:
    """A new object with its own weights, W_enc as rows from the start, so that each is copied only once."""
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in sae.modules()):
        raise ValueError("target: it has hooks, which a new object would not have: remove them, or use inplace=True")
    cfg = copy.deepcopy(sae.cfg)
    # like SAELens's loader: shapes on the meta device, then the weights are assigned
    device, cfg.device = cfg.device, "meta"
    made = fast(cfg)
    made.cfg.device = device
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items() if name != "W_enc"}
    rows = torch.empty(tuple(sae.W_enc.T.shape), dtype=sae.W_enc.dtype, device=sae.W_enc.device)
    state["W_enc"] = rows.t().copy_(sae.W_enc.detach())
    made.load_state_dict(state, assign=True)
    for name, parameter in sae.named_parameters():
        made.get_parameter(name).requires_grad_(parameter.requires_grad)
    made.dtype, made.device = sae.dtype, sae.device
    made._use_error_term = sae._use_error_term
    made.activation_fn = copy.deepcopy(sae.activation_fn)
    if sae.hook_z_reshaping_mode != made.hook_z_reshaping_mode:
        turn = "on" if sae.hook_z_reshaping_mode else "off"
        getattr(made, f"turn_{turn}_forward_pass_hook_z_reshaping")()
    return made.train(sae.training)


def _accelerate_model(model: Any, inplace: bool | None) -> Any:
    wrappers = getattr(model, "_acts_to_saes", None)
    if not wrappers:
        raise (ValueError if wrappers is not None else TypeError)(
            f"target: expected a SAELens SAE, or a model with SAEs attached by add_sae, got {type(model).__name__}"
        )
    if inplace is False:
        raise ValueError("inplace: the SAEs of a model are always accelerated in place, got False")
    found = [(w.sae, _class_for(w.sae)) for w in wrappers.values() if not isinstance(w.sae, Accelerated)]
    for sae, fast in found:
        sae.__class__ = fast
    return model


# SAELens's models wrap each attached SAE in this class. It encodes and decodes, and does both again for the error
# term.  It has no other way to get a reconstruction from an SAE, so for accelerated SAEs we replace its forward.
_plain_forward = hooked_sae_transformer._SAEWrapper.forward


def _wrapper_forward(self: Any, original_output: Tensor) -> Tensor:
    sae = self.sae
    if not isinstance(sae, Accelerated) or sae._plain():
        return _plain_forward(self, original_output)
    captured, mask = self._captured_input, self._token_mask
    x = original_output if captured is None else captured
    if mask is not None:
        mask = mask.reshape(*mask.shape, *[1] * (original_output.dim() - mask.dim()))
    try:
        out, clean = sae._reconstruct(x, self.use_error_term)
        if clean is not None:
            with torch.no_grad():
                error = original_output - clean
                if mask is not None:  # tokens that bypass the SAE have no error
                    error = error.masked_fill(mask, 0.0)
                error = self.hook_sae_error(error)
            out = out + error
        if mask is not None:
            out = torch.where(mask, original_output, out)
        return self.hook_sae_output(out)
    finally:
        self._captured_input = None


hooked_sae_transformer._SAEWrapper.forward = _wrapper_forward
