"""One coder at its places: encode what passes, and hand back what is to go on instead."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Call, Tokens
from gemmascope_fast.attach.carry import carry
from gemmascope_fast.attach.entries import Activations, Entry
from gemmascope_fast.attach.places import Visitor
from gemmascope_fast.attach.structure import Place, Structure
from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae import JumpReLUSAE, JumpReLUSkipTranscoder

if TYPE_CHECKING:
    from gemmascope_fast.attach.run import Run

MODES = ("observe", "splice", "splice+error")


class Tap:
    """An entry of a run, resolved in the model and checked against it."""

    def __init__(self, run: Run, entry: Entry, structure: Structure) -> None:
        self.run, self.entry, self.coder = run, entry, entry.coder
        self.reads = structure.place(entry.site)
        same = entry.site_out == entry.site
        self.writes = self.reads if same else structure.place(entry.site_out)
        self.splices = run.mode != "observe" and not isinstance(entry.coder, Activations)
        if isinstance(self.coder, Activations):
            return
        cfg = self.coder.cfg
        _check_width(entry, self.reads, cfg.d_in, "d_in")
        if self.splices:
            _check_width(entry, self.writes, cfg.d_out, "d_out")
            if self.writes.form == "no_gain":
                raise AttachError(f"{entry.key!r}: {self.writes.name} without its gain can be read, not replaced")

    def visits(self) -> list[tuple[Place, Visitor]]:
        own: list[tuple[Place, Visitor]] = [(self.reads, ReadTap(self))]
        if self.splices:
            own.append((self.writes, WriteTap(self)))
        return own

    def was_reached(self, call: Call) -> bool:
        wanted = (("read", self), ("write", self)) if self.splices else (("read", self),)
        return all(step in call.reached for step in wanted)

    def reach(self, call: Call, step: str) -> None:
        if (step, self) in call.reached:
            raise AttachError(f"{self.entry.key!r}: its site was reached twice in one forward")
        call.reached.add((step, self))

    def rows(self, x: Tensor, call: Call, place: Place) -> Tensor:
        """x as [N, d]; AttachError where the site does not carry one row per token."""
        if x.numel() != call.n_rows * x.shape[-1]:
            raise AttachError(
                f"{place.name}: expected {call.batch} x {call.length} rows, one per token, got shape {tuple(x.shape)}"
            )
        return x.reshape(call.n_rows, x.shape[-1])


class ReadTap:
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None:
        call = self.tap.run.call()
        if call is None:
            return
        begin = time.perf_counter()
        tap = self.tap
        tap.reach(call, "read")
        keeps_graph = tap.splices and torch.is_grad_enabled()
        with torch.set_grad_enabled(keeps_graph):
            rows = tap.rows(_formed(x, tap.reads, inputs), call, tap.reads)
            if call.chosen is not None:
                rows = rows[call.chosen.to(rows.device)]
            if isinstance(tap.coder, Activations):
                _keep(tap.coder, rows.detach(), call)
            else:
                self._encode(tap.coder, rows, call)
        tap.run.seconds += time.perf_counter() - begin

    def _encode(self, sae: JumpReLUSAE, rows: Tensor, call: Call) -> None:
        if rows.shape[-1] != sae.cfg.d_in:
            raise AttachError(
                f"{self.tap.reads.name}: carries {rows.shape[-1]} dimensions, the SAE's d_in is {sae.d_in}"
            )
        rows = rows.to(sae.W_enc.device)
        latents = sae.encode_sparse(rows)
        call.scratch["latents", self.tap.entry.key] = latents
        if self.tap.splices:
            call.scratch["rows", self.tap] = rows

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None:
        return None


class WriteTap:
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None:
        return None

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None:
        tap = self.tap
        call = tap.run.call()
        if call is None:
            return None
        begin = time.perf_counter()
        tap.reach(call, "write")
        if ("read", tap) not in call.reached:
            raise AttachError(f"{tap.entry.key!r}: {tap.writes.name} comes before {tap.reads.name} in this model")
        new = self._new(x, call)
        tap.run.seconds += time.perf_counter() - begin
        return new

    def _new(self, x: Tensor, call: Call) -> Tensor | None:
        tap, sae = self.tap, self.tap.coder
        assert isinstance(sae, JumpReLUSAE)
        latents, rows = call.scratch["latents", tap.entry.key], call.scratch["rows", tap]
        flat = tap.rows(x, call, tap.writes)
        if tap.run.mode == "splice+error":
            if tap.run.error_grad:
                return None
            carried = carry(flat, sae, latents, rows, call.chosen)
            return None if carried is flat else carried.reshape(x.shape)
        recon = sae.decode(latents)
        if isinstance(sae, JumpReLUSkipTranscoder):
            recon = recon + sae.skip(rows)
        recon = _unformed(recon, tap.writes).to(x.device, x.dtype)
        if call.chosen is None:
            return recon.reshape(x.shape)
        at = call.chosen.to(x.device).nonzero()[:, 0]
        return flat.index_copy(0, at, recon).reshape(x.shape)


def _formed(x: Tensor, place: Place, inputs: tuple[Any, ...]) -> Tensor:
    """What the SAE reads, from what passes at the place."""
    if place.form == "no_gain":
        norm = place.module
        eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        if eps is None:
            raise AttachError(f"{place.name}: no epsilon found in {type(norm).__name__}")
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if place.form == "unscaled":
        # looked up again: dividing by the scale would not give the table's own values back
        return torch.nn.functional.embedding(inputs[0], place.module.weight)  # type: ignore[arg-type]
    return x


def _unformed(recon: Tensor, place: Place) -> Tensor:
    if place.form == "unscaled":
        return recon * place.module.embed_scale.to(recon.dtype)  # type: ignore[operator,union-attr]
    return recon


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
