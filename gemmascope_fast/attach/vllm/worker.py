"""Inside the worker: hooks on decoder layers, and the state of the requests that asked for something.

vLLM concatenates the tokens of all scheduled requests into the rows of a step [T, d].  Before each step, `begin`
computes which rows belong to which request and position; the hooks read and change only those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.attach.calls import Call, Group
from gemmascope_fast.attach.edits import Edit
from gemmascope_fast.attach.plan import Plan
from gemmascope_fast.attach.selection import Selector
from gemmascope_fast.attach.vllm.features import packed
from gemmascope_fast.attach.vllm.requests import Asked, Observe
from gemmascope_fast.attach.vllm.saes import About
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder


@dataclass
class Mounted:
    """One declared SAE."""

    coder: Coder
    about: About


@dataclass
class Live:
    """A request that asked for something, while the engine has it."""

    asked: Asked
    group: Group
    eos: int | None
    plans: dict[str, Plan] = field(default_factory=dict)
    stopped: bool = False
    failed: bool = False
    payload: dict[str, Any] = field(default_factory=dict)  # what it has to tell after this step


@dataclass
class Part:
    """A request's rows in one step.  first: its first row; chosen: bool [n], None for all."""

    live: Live
    call: Call
    first: int
    chosen: Tensor | None


@dataclass
class Reading:
    """The rows of one SAE in one step.  at: for each part, row numbers int64 in its call; rows: in the step."""

    parts: list[tuple[Part, Tensor]]
    rows: Tensor


class Attached:
    """The SAEs of one worker, their hooks and the live requests."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, saes: Mapping[str, Mounted]) -> None:
        self.model, self.saes = model, dict(saes)
        self.live: dict[str, Live] = {}
        self.parts: list[Part] = []
        self._selectors = {tokens: Selector(tokens, model) for tokens in ("content", "all")}
        at_layer: dict[int, list[str]] = {}
        for name, mounted in self.saes.items():
            if not 0 <= mounted.about.layer < len(layers):
                raise AttachError(f"saes: {name}: the model has {len(layers)} layers, got layer {mounted.about.layer}")
            at_layer.setdefault(mounted.about.layer, []).append(name)
        for layer, names in at_layer.items():
            layers[layer].register_forward_hook(self._hook(names))

    # ---- requests -----------------------------------------------------------------------------------

    def admit(self, request: str, asked: Asked, prompt: int, start: int, eos: int | None) -> None:
        """Begin to follow a request.  start: its first position that is computed, the others came from the cache."""
        group = Group(base=0, rows=1, first=start, prompt=prompt)
        live = self.live[request] = Live(asked, group, eos)
        live.plans = {
            name: Plan(edits, self.saes[name].about.d_sae, self.saes[name].about.d_in)
            for name, edits in asked.steer.items()
        }
        live.payload["cached"] = start
        if asked.text:
            live.payload["text"] = True

    def forget(self, request: str) -> None:
        """The request ended, whatever the reason."""
        self.live.pop(request, None)

    # ---- one step -----------------------------------------------------------------------------------

    def begin(self, rows: list[tuple[str, int, int, int]], ids: Callable[[int, int, int], Tensor]) -> None:
        """Before a step.  rows: (request, first row, number of rows, position of the first) in the batch's order;
        ids: (index in the batch, first row, number of rows) → int64 token ids [n]."""
        self.parts = []
        for index, (request, first, count, start) in enumerate(rows):
            live = self.live.get(request)
            if live is None or live.failed:
                continue
            token = ids(index, first, count)[None]
            call = Call(0, live.group, 1, count, start, token, None, token.device, self.model)
            chosen = self._selectors[live.asked.tokens](call)
            self.parts.append(Part(live, call, first, chosen))

    def end(self) -> None:
        """After a step, also if it raised an error."""
        self.parts = []

    def payloads(self) -> dict[str, dict[str, Any]]:
        """What the live requests have to tell since the last call, by request."""
        told = {}
        for request, live in self.live.items():
            if live.payload:
                told[request], live.payload = live.payload, {}
        return told

    def force_ends(self, logits: Tensor | None, requests: list[str]) -> Tensor | None:
        """logits [B, vocabulary], in which EOS is the only possible next token of requests that an alarm stopped."""
        for row, request in enumerate(requests):
            live = self.live.get(request)
            if logits is not None and live is not None and live.stopped and live.eos is not None:
                logits[row] = -torch.inf
                logits[row, live.eos] = 0
        return logits

    # ---- hooks --------------------------------------------------------------------------------------

    def _hook(self, names: list[str]) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            return self._visit(names, output) if self.parts else None

        return hook

    @torch.inference_mode()
    def _visit(self, names: list[str], output: Any) -> Any:
        """The layer's output, with the residual stream of steered rows replaced; None if nothing changes.

        A layer returns (hidden, residual), whose sum is the residual stream; some return the sum alone.
        """
        pair = isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, Tensor) for t in output)
        if not pair and not isinstance(output, Tensor):
            for part in self.parts:
                _fail(part.live, f"expected a layer that returns (hidden, residual), got {type(output).__name__}")
            return None
        hidden, residual = output if pair else (output, None)
        changes: list[tuple[Tensor, Tensor]] = []
        for name in names:
            reading = self._reading(name)
            if reading is None:
                continue
            rows = reading.rows.to(hidden.device)
            x = hidden[rows] if residual is None else hidden[rows] + residual[rows]
            try:
                latents = self.saes[name].coder.encode_sparse(x)
            except Exception as error:  # noqa: BLE001 a fault of ours ends the requests that asked, not the engine
                for part, _ in reading.parts:
                    _fail(part.live, f"{name}: {type(error).__name__}: {error}")
                continue
            begin = 0
            for part, at in reading.parts:
                end = begin + at.numel()
                try:
                    new = self._serve(name, part, at, x[begin:end], latents[begin:end])
                except Exception as error:  # noqa: BLE001 as above
                    _fail(part.live, f"{name}: {type(error).__name__}: {error}")
                    new = None
                if new is not None:
                    changes.append((rows[begin:end], new))
                begin = end
        if not changes:
            return None
        at, new = torch.cat([rows for rows, _ in changes]), torch.cat([x for _, x in changes])
        if residual is None:
            return hidden.index_copy(0, at, new)
        # the new value goes to `residual` alone, because splitting it between the two would round it
        return hidden.index_copy(0, at, torch.zeros_like(new)), residual.index_copy(0, at, new)

    def _reading(self, name: str) -> Reading | None:
        """The rows that some request needs of an SAE in this step."""
        parts = []
        for part in self.parts:
            if part.live.failed:
                continue
            wanted = _wanted(name, part.live.asked, part.call)
            if wanted is None:
                continue
            if part.chosen is not None:
                wanted = wanted & part.chosen
            at = wanted.nonzero()[:, 0]
            if at.numel():
                parts.append((part, at))
        return Reading(parts, torch.cat([at + part.first for part, at in parts])) if parts else None

    def _serve(self, name: str, part: Part, at: Tensor, x: Tensor, latents: SparseLatents) -> Tensor | None:
        """Observe, check alarms and steer one request's rows; returns their new x, or None if it does not change."""
        live, call = part.live, part.call
        for observe in live.asked.observe:
            if observe.sae == name:
                seen = _selected(observe.where, call, at)
                if seen.numel():
                    rows = packed(at[seen] + call.start, _shown(observe, latents[seen.to(latents.device)]))
                    live.payload.setdefault("rows", {})[name] = rows
        for stop in live.asked.alarm:
            if stop.sae != name or live.stopped:
                continue
            seen = _selected(stop.where, call, at)
            values = latents.features([stop.feature])[:, 0].cpu()[seen]
            over = (values > stop.threshold).nonzero()[:, 0].tolist()
            if over:
                live.stopped = True
                fired = {
                    "sae": name, "feature": stop.feature, "value": float(values[over[0]]),
                    "position": int(at[seen[over[0]]]) + call.start,
                }  # fmt: skip
                live.payload.setdefault("fired", []).append(fired)
        plan = live.plans.get(name)
        if plan is None:
            return None
        new = plan.apply(x, self.saes[name].coder, latents, call, at)
        return None if new is x else new


def _fail(live: Live, message: str) -> None:
    """A fault of our own: the request ends with the message, the engine goes on."""
    live.failed = live.stopped = True
    live.payload["error"] = message


def _wanted(name: str, asked: Asked, call: Call) -> Tensor | None:
    """bool [n], the rows of the call on which the request needs this SAE; None if it does not need it."""
    wheres = [observe.where for observe in asked.observe if observe.sae == name]
    wheres += [stop.where for stop in asked.alarm if stop.sae == name]
    wheres += asked.steer.get(name, [])
    found: Tensor | None = None
    for where in wheres:
        rows = where.rows(call)
        if rows is None:
            return torch.ones(call.n_rows, dtype=torch.bool)
        found = rows if found is None else found | rows
    return found


def _selected(where: Edit, call: Call, at: Tensor) -> Tensor:
    """int64, numbers of the read rows that a selection includes.  at: the read rows' numbers in the call."""
    mask = where.rows(call)
    return torch.arange(at.numel()) if mask is None else mask[at].nonzero()[:, 0]


def _shown(observe: Observe, latents: SparseLatents) -> SparseLatents:
    """The features that were asked for; the rows and the width stay."""
    if observe.top is not None:
        values, features = latents.topk(min(observe.top, latents.d_sae))
        keep = features >= 0
        rows = torch.arange(latents.n_rows, device=features.device)[:, None].expand_as(features)[keep]
        return _entries(latents, rows, features[keep], values[keep])
    if observe.features is not None:
        keep = torch.isin(latents.col_indices, torch.tensor(observe.features, device=latents.device))
        return _entries(latents, latents.row_indices()[keep], latents.col_indices[keep], latents.values[keep])
    return latents


def _entries(like: SparseLatents, rows: Tensor, features: Tensor, values: Tensor) -> SparseLatents:
    order = (rows * like.d_sae + features.long()).argsort()
    crow = torch.zeros(like.n_rows + 1, dtype=torch.int64, device=rows.device)
    crow[1:] = torch.bincount(rows, minlength=like.n_rows).cumsum(0)
    return SparseLatents(crow, features[order].to(torch.int32), values[order], like.shape)
