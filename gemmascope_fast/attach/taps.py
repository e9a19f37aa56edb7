"""One coder at its places: encodes the activation, and returns the replacement activation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.attach import checkpointing
from gemmascope_fast.attach.calls import Call, Tokens
from gemmascope_fast.attach.cross_layer import replaced
from gemmascope_fast.attach.edits import Edit
from gemmascope_fast.attach.entries import SAES, Activations, Entry
from gemmascope_fast.attach.error_term import with_sae_gradient
from gemmascope_fast.attach.fused import Fused
from gemmascope_fast.attach.plan import Plan
from gemmascope_fast.attach.state import State
from gemmascope_fast.attach.transformers.blocks import epsilon
from gemmascope_fast.attach.transformers.structure import Place, Structure
from gemmascope_fast.bank import BankedSAE
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops._exact import outside_autocast
from gemmascope_fast.ops._transforms import transformed
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.multi_site import Crosscoder

MODES = ("observe", "splice", "splice+error")


class Tap:
    """An entry of a run, located in the model and checked against it."""

    def __init__(self, state: State, entry: Entry, edits: Sequence[Edit], structure: Structure) -> None:
        self.state, self.entry, self.coder = state, entry, entry.coder
        self.reads = structure.place(entry.site)
        self.sources = [self.reads, *(structure.place(site) for site in entry.more)]
        same = entry.site_out == entry.site
        self.writes = self.reads if same else structure.place(entry.site_out)
        self.splices = state.mode != "observe" and not isinstance(entry.coder, Activations)
        cfg = self.coder.cfg if isinstance(self.coder, SAES) else None
        if self.splices and (
            isinstance(self.coder, Crosscoder) or (entry.part and entry.part.whole.kind == "crosscoder")
        ):
            raise AttachError(
                f"mode: a crosscoder ({entry.key!r}) cannot be spliced: at its first site its reconstruction needs"
                " activations of its last, which are not computed yet; expected 'observe'"
            )
        d_sae, d_out = (None, self.writes.width) if cfg is None else (cfg.d_sae, cfg.d_out)
        if cfg is not None:
            for place in self.sources:
                _check_width(entry, place, cfg.d_in // len(self.sources), "d_in")
            if self.splices:
                d_out = cfg.d_out if entry.part is None else cfg.d_in
                _check_width(entry, self.writes, d_out, "d_out")
        if isinstance(self.coder, BankedSAE):
            self.coder.check_fits()
        if self.splices and self.writes.form == "no_gain":
            raise AttachError(f"{entry.key!r}: {self.writes.name} without its gain can be read but not replaced")
        if self.splices and entry.part is not None and self.writes.form:
            raise AttachError(
                f"mode: {entry.key!r}: a cross-layer transcoder cannot write at {self.writes.name}, whose output the"
                f" block multiplies by {self.writes.scale:g} before it adds it; expected 'observe'"
            )
        self.plan = Plan(edits, d_sae, d_out) if edits else None
        self.fused = Fused.of(self)
        self.steps = [visitor.step for _, visitor in self.visits()]
        self.next: list[str] = []  # for a bank's SAE: those that the model reaches after it

    def sae(self, call: Call) -> Coder:
        """The SAE; one from a bank stays on its device until `done` or the end of the call."""
        if not isinstance(self.coder, BankedSAE):
            assert isinstance(self.coder, Coder)
            return self.coder
        lease = call.leases.get(self)
        if lease is None:
            lease = call.leases[self] = self.coder.lease()
            self.coder.prefetch_next(self.next)
        module: Coder = lease.module
        return module

    def done(self, call: Call) -> None:
        """The call no longer needs the SAE."""
        lease = call.leases.pop(self, None)
        if lease is not None:
            lease.release()

    def visits(self) -> list[tuple[Place, ReadTap | WriteTap]]:
        own: list[tuple[Place, ReadTap | WriteTap]] = []
        if self.coder is not None:
            own += [(place, ReadTap(self, number)) for number, place in enumerate(self.sources)]
        if self.splices:
            own.append((self.writes, WriteTap(self)))
        return own

    def was_reached(self, call: Call) -> bool:
        return all((step, self) in call.reached for step in self.steps)

    def reach(self, call: Call, step: str) -> None:
        if (step, self) in call.reached:
            raise AttachError(f"{self.entry.key!r}: its site was reached twice in one forward")
        call.reached.add((step, self))

    def rows(self, x: Tensor, call: Call, place: Place) -> Tensor:
        """x as [N, d]; AttachError if the site does not have one row per token."""
        if x.numel() != call.n_rows * x.shape[-1]:
            raise AttachError(
                f"{place.name}: expected {call.batch} x {call.length} rows, one per token, got shape {tuple(x.shape)}"
            )
        if x.dim() == 3 and x.shape[0] not in (1, call.n_rows) and x.shape[:2] != (call.batch, call.length):
            raise AttachError(
                f"{place.name}: expected rows ordered as [{call.batch}, {call.length}], got shape {tuple(x.shape)}"
            )
        return x.reshape(call.n_rows, x.shape[-1])


class ReadTap:
    """The tap at the place it reads, or at one of the places of a crosscoder."""

    def __init__(self, tap: Tap, number: int = 0) -> None:
        self.tap, self.number = tap, number
        self.step = f"read {number}"

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None:
        call = self.tap.state.call()
        if call is None:
            return
        begin = time.perf_counter()
        tap = self.tap
        if call.replay and not tap.splices:
            return
        tap.reach(call, self.step)
        call.interim.regions[tap] = call.region
        keeps_graph = tap.splices and torch.is_grad_enabled()
        place = tap.sources[self.number]
        with torch.set_grad_enabled(keeps_graph), outside_autocast(x.device):
            rows = tap.rows(_formed(x, place, inputs), call, place)
            if call.chosen is not None:
                rows = rows[call.chosen.to(rows.device)]
            if isinstance(tap.coder, Activations):
                _keep(tap.coder, rows.detach(), call)
            elif len(tap.sources) > 1:
                self._join(rows, call)
            elif tap.coder is not None:
                if tap.splices and tap.writes is not tap.reads:
                    # copied, because the write (skip connection) and autograd's backward read them again, and an
                    # in-place operation of the model may change them in between (Mixtral's jitter)
                    rows = rows.clone()
                self._encode(tap.sae(call), rows, call, x)
                if not tap.splices:
                    tap.done(call)
        tap.state.seconds += time.perf_counter() - begin

    def _join(self, rows: Tensor, call: Call) -> None:
        """Keep the rows until all sites of a crosscoder have theirs, then encode them side by side."""
        sae = self.tap.coder
        assert isinstance(sae, Coder)
        held = call.interim.sources.setdefault(self.tap, {})
        # copied, because an in-place operation of the model may change them
        held[self.number] = rows.to(sae.device, copy=True)
        if len(held) == len(self.tap.sources):
            self._encode(sae, torch.cat([held[number] for number in sorted(held)], -1), call)

    def _encode(self, sae: Coder, rows: Tensor, call: Call, x: Tensor | None = None) -> None:
        """x: the activation at the site, if these are its rows and unchanged."""
        if rows.shape[-1] != sae.cfg.d_in:
            raise AttachError(
                f"{self.tap.reads.name}: carries {rows.shape[-1]} dimensions, the SAE's d_in is {sae.d_in}"
            )
        rows = rows if rows.device == sae.device else rows.to(sae.device)
        fused = None if x is None or self.tap.fused is None else self.tap.fused.encode(sae, x, rows, call)
        latents = sae.encode_sparse(rows) if fused is None else fused
        asks = self.tap.splices and torch.is_grad_enabled() and not transformed()
        if asks and not latents.values.requires_grad:
            # everything before and in the SAE is frozen, but attribution needs the gradient here
            latents = latents.with_values(latents.values.requires_grad_())
        call.interim.latents[self.tap.entry.key] = latents
        if self.tap.splices:
            call.interim.rows[self.tap] = rows

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None:
        return None


class WriteTap:
    step = "write"

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None:
        return None

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None:
        tap = self.tap
        call = tap.state.call()
        if call is None:
            tap.state.recomputed()
            return None
        begin = time.perf_counter()
        tap.reach(call, "write")
        self._check_region(call)
        if tap.coder is not None and ("read 0", tap) not in call.reached:
            raise AttachError(f"{tap.entry.key!r}: {tap.writes.name} comes before {tap.reads.name} in this model")
        with outside_autocast(x.device):
            new = self._new(x, call)
        tap.done(call)
        tap.state.seconds += time.perf_counter() - begin
        return new

    def _check_region(self, call: Call) -> None:
        """AttachError if backward could not splice here again."""
        tap = self.tap
        if not call.graded or call.replay:
            return
        if call.region is None and checkpointing.elsewhere():
            raise AttachError(
                f"gradient checkpointing: {tap.writes.name} is inside torch.utils.checkpoint, and the splice of"
                f" {tap.entry.key!r} would be missing in backward; {checkpointing.HOW}"
            )
        if tap.coder is not None and call.interim.regions.get(tap, call.region) is not call.region:
            raise AttachError(
                f"gradient checkpointing: {tap.entry.key!r} reads {tap.reads.name} and writes {tap.writes.name}, which"
                " are checkpointed separately; call model.gradient_checkpointing_disable()"
            )

    def _new(self, x: Tensor, call: Call) -> Tensor | None:
        tap = self.tap
        flat = tap.rows(x, call, tap.writes)
        at = None if call.chosen is None else call.chosen.nonzero()[:, 0]
        fused = None if tap.fused is None else tap.fused.result(x, call)
        if fused is not None:
            return fused.reshape(x.shape)
        if tap.entry.part is not None:
            new = replaced(tap, flat, call, at)
        elif tap.coder is None:
            new = self._edited(flat, None, None, call, at)
        else:
            sae = tap.sae(call)
            latents, rows = call.interim.latents[tap.entry.key], call.interim.rows[tap]
            if tap.state.mode == "splice":
                new = self._spliced(flat, sae, latents, rows, call, at)
            else:
                unit = _unit(tap.writes)
                new = flat if tap.state.error_grad else with_sae_gradient(flat, sae, latents, rows, call.chosen, unit)
                new = self._edited(new, sae, latents, call, at)
                if tap.state.path is not None and tap.state.path[0] == tap.entry.key:
                    new = _scaled(new, sae, latents, at, tap.state.path[1], unit)
        return None if new is flat else new.reshape(x.shape)

    def _spliced(
        self, flat: Tensor, sae: Coder, latents: SparseLatents, rows: Tensor, call: Call, at: Tensor | None
    ) -> Tensor:
        tap = self.tap
        recon = sae.reconstruct(latents, rows)
        if tap.plan is not None:
            recon = tap.plan.apply(recon.float(), sae, latents, call, at)
        recon = _unformed(recon, tap.writes).to(flat.device, flat.dtype)
        return recon if at is None else flat.index_copy(0, at.to(flat.device), recon)

    def _edited(
        self, flat: Tensor, sae: Coder | None, latents: SparseLatents | None, call: Call, at: Tensor | None
    ) -> Tensor:
        """flat with the edits added to the selected rows; flat itself if nothing is added."""
        plan = self.tap.plan
        if plan is None:
            return flat
        unit = _unit(self.tap.writes)
        scale = None if unit is None else torch.as_tensor(unit, device=flat.device).to(torch.float32)
        if at is None:
            return plan.apply(flat, sae, latents, call, at, scale)
        rows = flat[at.to(flat.device)]
        changed = plan.apply(rows, sae, latents, call, at, scale)
        return flat if changed is rows else flat.index_copy(0, at.to(flat.device), changed)


def follow(taps: Sequence[Tap]) -> list[BankedSAE]:
    """Tell each tap of a bank's SAE which SAEs come after it, in a cycle; returns the first ones."""
    order = {
        kind: i for i, kind in enumerate(("embed", "attn", "attn_out", "mlp_in", "mlp_in_no_gain", "mlp", "resid"))
    }
    banked = [tap for tap in taps if isinstance(tap.coder, BankedSAE)]
    banked.sort(key=lambda tap: (tap.entry.site.layer or 0, order.get(tap.entry.site.kind, 0)))
    coders = [tap.coder for tap in banked if isinstance(tap.coder, BankedSAE)]
    names = [coder.name for coder in coders]
    for i, (tap, coder) in enumerate(zip(banked, coders, strict=True)):
        tap.next = [*names[i + 1 :], *names[:i]][: coder.ahead]
    return coders[: max((coder.ahead for coder in coders), default=0)]


def _scaled(
    x: Tensor, sae: Coder, latents: SparseLatents, at: Tensor | None, factor: float, unit: Tensor | float | None
) -> Tensor:
    """x with the selected rows' latents multiplied by `factor`; the gradient stays that of x."""
    values = (factor - 1) * latents.values.detach()
    added = ops.decode(latents.crow_indices, latents.col_indices, values, sae.W_dec, None, None).to(x.device)
    added = added if unit is None else added * unit
    return (x + added).to(x.dtype) if at is None else x.index_add(0, at.to(x.device), added.to(x.dtype))


def _formed(x: Tensor, place: Place, inputs: tuple[Any, ...]) -> Tensor:
    """What the SAE reads, computed from the activation at the place."""
    if place.form == "no_gain":
        norm = place.module
        if isinstance(norm, torch.nn.LayerNorm):
            return torch.nn.functional.layer_norm(x.float(), norm.normalized_shape, eps=norm.eps)
        eps = epsilon(norm)
        assert eps is not None
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if place.form == "unscaled":
        if place.module.weight.is_meta:  # type: ignore[union-attr]
            raise AttachError(f"{place.name}: the embedding's weights are offloaded; keep it on a device")
        # looked up again, because dividing by the scale would not restore the table's exact values
        return torch.nn.functional.embedding(inputs[0], place.module.weight)  # type: ignore[arg-type]
    return x * place.scale if place.form == "scaled" else x


def _unit(place: Place) -> Tensor | float | None:
    """The factor for the SAE's units at a place; None for 1."""
    if place.form == "unscaled":
        return place.module.embed_scale  # type: ignore[return-value]
    return 1 / place.scale if place.form == "scaled" else None


def _unformed(recon: Tensor, place: Place) -> Tensor:
    if place.form == "unscaled":
        return recon * place.module.embed_scale.to(recon.dtype)  # type: ignore[operator,union-attr]
    return recon / place.scale if place.form == "scaled" else recon


def _keep(activations: Activations, rows: Tensor, call: Call) -> None:
    if activations.sink is None:
        activations.parts.append(rows.clone())
        return
    tokens = call.tokens()
    chosen = slice(None) if call.chosen is None else call.chosen
    names = ("call", "sequence", "position", "token_id", "valid")
    activations.sink(rows, Tokens(**{name: getattr(tokens, name).reshape(-1)[chosen] for name in names}))


def _check_width(entry: Entry, place: Place, size: int, name: str) -> None:
    if place.width is not None and place.width != size:
        raise AttachError(f"{entry.key!r}: {place.name} carries {place.width} dimensions, the SAE's {name} is {size}")
