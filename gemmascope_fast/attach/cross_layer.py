"""A cross-layer transcoder inside a model: a layer's latents write to its own output and to all later ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.attach.calls import Call, Written
from gemmascope_fast.attach.error_term import NO_VMAP, tangent_on_rows, zeros_like
from gemmascope_fast.attach.plan import added
from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._transforms import derivative_wanted
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder

if TYPE_CHECKING:
    from gemmascope_fast.attach.taps import Tap


class _Pass(torch.autograd.Function):
    """Forward: x, bit for bit.  Backward: that of `recon` [n, d] on the selected rows, the identity on the others."""

    @staticmethod
    def forward(x, recon, chosen):
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])
        ctx.set_materialize_grads(False)
        ctx.zeros = zeros_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        if grad is None:
            return None, None, None
        (chosen,) = ctx.saved_tensors
        if chosen is None:
            return None, grad, None
        return grad.masked_fill(chosen[:, None], 0), grad[chosen], None

    @staticmethod
    def jvp(ctx: Any, dx, drecon, _chosen):  # type: ignore[override]
        (chosen,) = ctx.saved_tensors
        return tangent_on_rows(dx, drecon, chosen, ctx.zeros)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(NO_VMAP)


def replaced(tap: Tap, flat: Tensor, call: Call, at: Tensor | None) -> Tensor:
    """flat [N, d], the output of the tap's layer → the replacement; flat itself if nothing changes.

    at: int64 [n], the selected rows (None: all).  Source layers are summed in ascending order, as in
    `CrossLayerTranscoder.decode`.
    """
    part, state = tap.entry.part, tap.state
    assert part is not None
    latents = call.interim.latents[tap.entry.key]
    written = call.interim.written.setdefault(part.whole, Written())
    _change(tap, written, latents, call, at)
    if state.mode == "splice":
        recon = _reconstruction(tap, written, latents, call)
        rows = _edited(tap, written, recon.float(), call, at).to(flat.device, flat.dtype)
        return rows if at is None else flat.index_copy(0, at.to(flat.device), rows)
    if (torch.is_grad_enabled() or derivative_wanted(flat)) and not state.error_grad:
        recon = _reconstruction(tap, written, latents, call).to(flat.device, flat.dtype)
        flat = _Pass.apply(flat, recon, None if call.chosen is None else call.chosen.to(flat.device))
    rows = flat if at is None else flat[at.to(flat.device)]
    new = _edited(tap, written, rows, call, at)
    if new is rows:
        return flat
    return new if at is None else flat.index_copy(0, at.to(flat.device), new)


def _change(tap: Tap, written: Written, latents: SparseLatents, call: Call, at: Tensor | None) -> None:
    """Store what the layer's edits, or a path of integrated gradients, add to its output and the later ones."""
    part, path = tap.entry.part, tap.state.path
    assert part is not None
    change = None if tap.plan is None else tap.plan.change(tap.sae(call), latents, call, at)
    if change is not None:
        written.changes.append((part.layer, *change))
    if path is not None and path[0] == tap.entry.key:
        values = (path[1] - 1) * latents.values.detach()
        sae = tap.coder
        assert isinstance(sae, Coder)
        what = ops.decode(latents.crow_indices, latents.col_indices, values, sae.W_dec, None, None)
        written.changes.append((part.layer, None, what))


def _reconstruction(tap: Tap, written: Written, latents: SparseLatents, call: Call) -> Tensor:
    """x̂ [n, d] of the tap's layer in the coder's dtype, without edits; advances `written` to this layer."""
    part, sae = tap.entry.part, tap.coder
    assert part is not None
    assert isinstance(sae, Coder)
    whole, d = part.whole, part.whole.cfg.d_in
    own = ops.decode(latents.crow_indices, latents.col_indices, latents.values, sae.W_dec, sae.b_dec, None)
    written.total = own if written.total is None else written.total[:, d:] + own
    recon = written.total[:, :d].to(whole.dtype)
    if whole.W_skip is None:
        return recon
    rows = call.interim.rows[tap]
    return recon + exact_product(rows, whole.W_skip[part.layer]).to(whole.dtype)


def _edited(tap: Tap, written: Written, rows: Tensor, call: Call, at: Tensor | None) -> Tensor:
    """rows [n, d] plus the changes that all layers so far make to this output, then this site's directions."""
    part = tap.entry.part
    assert part is not None
    d = part.whole.cfg.d_in
    for layer, where, what in written.changes:
        begin = (part.layer - layer) * d
        rows = added(rows, where, what[:, begin : begin + d])
    return rows if tap.plan is None else tap.plan.direct(rows, call, at)
