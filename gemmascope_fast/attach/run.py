"""A run: what one `with attach(…)` records of a model, and what it changes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.attach import checkpointing
from gemmascope_fast.attach.alarms import Alarm, Fired, stop
from gemmascope_fast.attach.attribution import attribution, integrated_gradients
from gemmascope_fast.attach.calls import Arguments, Call, Generation, Interim, Tokens, cache_of
from gemmascope_fast.attach.edits import EditError, FeatureIndexError
from gemmascope_fast.attach.entries import SAES, Activations, Entry, Key, assign, entries, find_key, spread
from gemmascope_fast.attach.hooks import unhook
from gemmascope_fast.attach.ledger import Ledger, open_call
from gemmascope_fast.attach.observers import Observer, select
from gemmascope_fast.attach.selection import Selection, Selector
from gemmascope_fast.attach.sequences import after_eos, rows_of
from gemmascope_fast.attach.state import State
from gemmascope_fast.attach.taps import MODES, Tap, WriteTap, follow
from gemmascope_fast.attach.transformers import generation, places
from gemmascope_fast.attach.transformers.compiled import forget, is_compiled, opaque, unwrapped
from gemmascope_fast.attach.transformers.structure import Structure, submodules
from gemmascope_fast.errors import AttachError
from gemmascope_fast.files.write import atomic
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.sites import Site

# what `torch.load(…, weights_only=True)` may construct: latents, and sites as their keys
torch.serialization.add_safe_globals([SparseLatents, Site])

_ACTIVE: list[Run] = []
_LOCK = threading.RLock()


class Run(ExitStack[None]):
    """One attachment, returned by `attach`; a context manager.  Its records remain readable afterwards.

    It is an ExitStack, because that continues to clean up if a KeyboardInterrupt interrupts one step.

    latents: by key (or another name of its site), SparseLatents [N, d_sae] with one row per row of `tokens`.
    activations: by key of an `Activations`, Tensor [n, d] of the selected tokens.
    seconds: time spent in this run's hooks so far.
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Any,
        *,
        mode: str | None = None,
        edits: Any = (),
        tokens: Selection = "content",
        error_grad: bool = False,
        keep: bool = True,
        anywhere: bool = False,
    ) -> None:
        super().__init__()
        if mode is not None and mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self._compiled = is_compiled(model)
        model = unwrapped(model)
        structure = Structure(model)
        assigned = assign(edits, entries(saes, structure, anywhere))
        self.edits = [edit for _, given in assigned for edit in given]
        mode = mode or ("splice+error" if self.edits else "observe")
        self.model, self.state = model, State(mode, error_grad, self.call, self.recomputed)
        if mode == "observe" and self.edits:
            raise EditError("edits: mode 'observe' changes nothing; expected 'splice' or 'splice+error' with edits")
        self.entries = [entry for entry, _ in assigned]
        if not self.entries:
            raise AttachError("saes: expected at least one SAE, got none")
        self.select = Selector(tokens, model)
        self._taps = [Tap(self.state, entry, given, structure) for entry, given in assigned]
        self._check_writers()
        self._first = follow(self._taps)
        self._visits = [visit for tap in self._taps for visit in tap.visits()]
        self._splices = any(tap.splices for tap in self._taps)
        self._arguments = {m: Arguments(m) for m in submodules(model)}
        self._checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._hooks: tuple[Any, Any] | None = None  # while attached: the functions that run before and after a call
        self._ledger = Ledger(keep)
        self._calls: list[Call] = []
        self._count = self._rows = 0
        self._open: dict[int, Call] = {}
        self._generating: dict[int, list[Generation]] = {}
        self._bound: int | None = None
        self._parts: dict[Key, list[tuple[SparseLatents, Tensor | None]]] = {
            e.key: [] for e in self.entries if isinstance(e.coder, SAES)
        }
        self._joined: dict[Key, tuple[int, SparseLatents]] = {}
        self.keep = keep
        self._watching: list[tuple[Key, Any]] = []

    # ---- entering and leaving -----------------------------------------------------------------------

    def __enter__(self) -> Run:
        if self.state.owner is not None:
            raise AttachError("a run can be entered only once; call attach again")
        self.state.owner = threading.get_ident()
        self._check_neighbours()
        try:
            self.callback(self._close_alarms)
            self.callback(self._remove)
            self.callback(self._remove)  # in case the first is interrupted
            self._install()
            for coder in self._first:
                coder.prefetch_next([coder.name])
            if self._compiled:
                forget()
            with _LOCK:
                _ACTIVE.append(self)
            return self
        except BaseException:
            self.close()
            raise

    def _install(self) -> None:
        before, after = self._hooks = opaque(self._before), opaque(self._after)
        for module in self._arguments:
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, always_call=True)
        for place, visitor in self._visits:
            places.visit(place, visitor)
        generation.listen(self.model, self)

    def _remove(self) -> None:
        """Remove everything of this run from the model; safe to call again, or after an interrupted `_install`."""
        with _LOCK:
            _ACTIVE[:] = [run for run in _ACTIVE if run is not self]
        for module in self._arguments:
            for function in self._hooks or ():
                unhook(module, function)
        for place, visitor in self._visits:
            places.leave(place, visitor)
        generation.leave(self.model, self)
        for module in self._checkpointed:
            checkpointing.unwrap(module, self)
        for call in list(self._open.values()):
            call.release()
        self._open.clear()
        self._hooks = None

    def _close_alarms(self) -> None:
        for _, observer in self._watching:
            if isinstance(observer, Alarm):
                observer.close()

    def _check_writers(self) -> None:
        written: dict[tuple[int, str], Entry] = {}
        for tap in self._taps:
            if not tap.splices or tap.coder is None:
                continue
            end = (id(tap.writes.module), tap.writes.end)
            if end in written:
                raise AttachError(f"two splices at {tap.writes.name}: {written[end].key!r} and {tap.entry.key!r}")
            written[end] = tap.entry

    def _check_neighbours(self) -> None:
        for tap in self._taps:
            for other in places.visitors(tap.writes) if tap.splices else ():
                if tap.coder is None or not isinstance(other, WriteTap) or other.tap.coder is None:
                    continue
                if other.tap.state.owner == self.state.owner:
                    raise AttachError(f"two splices at {tap.writes.name}: another run replaces it already")

    # ---- calls --------------------------------------------------------------------------------------

    def _mine(self) -> bool:
        """Whether a call in this thread belongs to this run: it is the run's thread, or a thread without a run."""
        me = threading.get_ident()
        if me != self.state.owner:
            with _LOCK:
                if any(run.state.owner == me and run.model is self.model for run in _ACTIVE):
                    return False
        if self._bound not in (None, me) and self._busy(self._bound):
            raise AttachError("two threads use one attached model at the same time; attach in each thread")
        self._bound = me
        return True

    def _busy(self, thread: int | None) -> bool:
        alive = any(t.ident == thread for t in threading.enumerate())
        return alive and (thread in self._open or bool(self._generating.get(thread)))  # type: ignore[arg-type]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin = time.perf_counter()
        me = threading.get_ident()
        known = self._open.get(me)
        if known is not None:
            if known.opener is not module or known.replay:
                return
            self._open.pop(me).release()  # a KeyboardInterrupt ended that forward early, and torch then calls no hook
        if not self._mine() or self.recomputed():
            return
        generating = self._generating.get(me)
        if self._splices:
            self._follow_checkpoints(bool(generating))
        given = self._arguments[module](args, kwargs)
        call = open_call(self._ledger, self._count, module, given, generating[-1] if generating else None)
        call.graded = torch.is_grad_enabled()
        call.chosen = self.select(call, given)
        self._open[me] = call
        self.state.seconds += time.perf_counter() - begin

    def _follow_checkpoints(self, generating: bool) -> None:
        """Follow the checkpointed regions of this forward; AttachError, before it runs, if that is impossible."""
        regions = checkpointing.checkpointing(self._checkpointed)
        several = [tap.entry.key for tap in self._taps if tap.splices and tap.entry.part is not None]
        if regions and several:
            raise AttachError(
                f"gradient checkpointing: a cross-layer transcoder ({several[0]!r}) writes at later layers too, and"
                " these are recomputed without it; call model.gradient_checkpointing_disable(), or attach with mode"
                " 'observe'"
            )
        for module in regions:
            checkpointing.wrap(module, self)
        if not generating and checkpointing.elsewhere():
            raise AttachError(
                "gradient checkpointing: the model itself is called by torch.utils.checkpoint, and a splice inside"
                f" would be missing in backward; {checkpointing.HOW}"
            )

    def recomputed(self) -> bool:
        """Whether this runs in a backward pass, because part of a forward is computed again.

        AttachError if a splice would be missing there.
        """
        if not checkpointing.recomputing():
            return False
        if self._splices and self._count and self._mine():
            raise AttachError(
                "gradient checkpointing: backward recomputes a part of the model that this run cannot follow, so its"
                f" splice would be missing; {checkpointing.HOW}"
            )
        return True

    @contextmanager
    def replayed(self, call: Call) -> Iterator[None]:
        """Within the block, this thread replays a part of the call: the splices act, and nothing is recorded."""
        me = threading.get_ident()
        outer = self._open.get(me)
        again = dataclasses.replace(call, reached=set(), interim=Interim(), leases={}, replay=True, region=None)
        left = self._hooks is None  # backward runs after the `with` block
        try:
            for place, visitor in self._visits if left else ():
                places.visit(place, visitor)
            self._open[me] = again
            yield
        finally:
            again.release()
            if outer is None:
                self._open.pop(me, None)
            else:
                self._open[me] = outer
            for place, visitor in self._visits if left else ():
                places.leave(place, visitor)

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        me = threading.get_ident()
        call = self._open.get(me)
        if call is None or call.opener is not module or call.replay:
            return
        begin = time.perf_counter()
        del self._open[me]
        call.release()
        if output is None:  # the forward raised an error: nothing of it is recorded
            return
        missed = [tap.entry.key for tap in self._taps if not tap.was_reached(call)]
        if missed:
            raise AttachError(
                f"the site of {missed[0]!r} was not reached in this forward: the model skips it, or runs code that"
                " was compiled before attach"
            )
        stopped = self._commit(call, output)
        if stopped:
            stop(call, output, stopped)
        self.state.seconds += time.perf_counter() - begin

    def _commit(self, call: Call, output: Any) -> set[int]:
        """Record the call; returns the sequences that an alarm stops."""
        call.offset = self._rows
        self._rows += call.n_rows
        self._count += 1
        self._ledger.committed(call, cache_of(output))
        if self.keep:
            self._calls.append(call)
        stopped: set[int] = set()
        for key, parts in self._parts.items():
            latents = call.interim.latents.pop(key)
            if self.keep:
                parts.append((latents, call.chosen))
            watching = [observer for where, observer in self._watching if where == key]
            if watching and self.state.path is None:
                own = select(latents, call.tokens(), call.chosen)
                for observer in watching:
                    stopped |= observer.update(*own) or set()
        call.interim = Interim()
        return stopped

    @property
    def mode(self) -> str:
        """ "observe", "splice" or "splice+error"."""
        return self.state.mode

    @property
    def seconds(self) -> float:
        """Time spent in this run's hooks so far."""
        return self.state.seconds

    def call(self) -> Call | None:
        """The call that this thread is in, or None if it does not belong to this run."""
        return self._open.get(threading.get_ident())

    def generation_begins(self, generation: Generation) -> bool:
        if not self._mine():
            return False
        self._generating.setdefault(threading.get_ident(), []).append(generation)
        return True

    def generation_ends(self, generation: Generation) -> None:
        me = threading.get_ident()
        self._generating[me].remove(generation)
        self._ledger.generated(generation)
        call = self._open.get(me)
        if call is not None and call.group.generation is generation:  # interrupted within a forward
            self._open.pop(me).release()

    # ---- records ------------------------------------------------------------------------------------

    @property
    def latents(self) -> Mapping[Key, SparseLatents]:
        return _View(self._parts, self._latents, self.entries)

    @property
    def activations(self) -> Mapping[Key, Tensor]:
        kept = {e.key: e.coder for e in self.entries if isinstance(e.coder, Activations)}
        return _View(kept, lambda key: torch.cat(kept[key].parts) if kept[key].parts else torch.empty(0), self.entries)

    def _latents(self, key: Key) -> SparseLatents:
        if not self.keep:
            raise AttachError("latents: this run keeps none (keep=False); watch it with observers")
        parts = self._parts[key]
        known = self._joined.get(key)
        if known is not None and known[0] == len(parts):
            return known[1]
        coder = next(e.coder for e in self.entries if e.key == key and type(e.key) is type(key))
        empty = SparseLatents.empty((0, coder.cfg.d_sae), coder.dtype, coder.device)  # type: ignore[union-attr]
        joined = SparseLatents.cat([empty, *(spread(latents, chosen) for latents, chosen in parts)])
        self._joined[key] = (len(parts), joined)
        return joined

    @property
    def tokens(self) -> Tokens:
        """The N rows.  After a generation ends, tokens after a sequence's EOS count as padding too."""
        each = [call.tokens() for call in self._calls]
        for call, rows in zip(self._calls, each, strict=True):
            rows.valid = _valid_at_last(call, rows.valid)
        return Tokens.cat(each)

    def sequences(self, key: Key, output: Any = None) -> list[SparseLatents]:
        """One SparseLatents per sequence, without padding; for a position seen twice, the last one is used.

        output: what `generate` returned, to get only the sequences of that generation: row i belongs to token i of
        output.sequences[b] without its padding (the last token was never fed back).  For beam search the output must
        have beam_indices.  Without an output: the sequences of every forward or generation, in order.

        Calls that share a KV cache form one sequence, from the cache's first column on: a manual loop, a prefilled
        prefix (also in a copy of the cache), several `generate` calls.  If a cache was cropped, reordered, or lost and
        repeated rows, you get the sequences it contains now; removed tokens remain only in `latents` and `tokens`.

        Raises AttachError if a cache had columns that this run never saw (it names their positions), or if the rows
        cannot be determined.
        """
        latents = self.latents[key]
        return [latents[rows] for rows in rows_of(self._ledger, output)]

    def save(self, path: str | PathLike[str]) -> None:
        """Write all records to one file, atomically, for `torch.load(path, weights_only=True)`.

        Loading returns a dict: `latents` by key (SparseLatents [N, d_sae], without a graph), `activations` by key, and
        `tokens`, whose five columns are tensors [N].  Keys that are Sites are saved as their hook names.  Import
        gemmascope_fast before loading.
        """
        rows = self.tokens
        content = {
            "latents": {_name(key): latents.detach() for key, latents in self.latents.items()},
            "activations": {_name(key): kept for key, kept in self.activations.items()},
            "tokens": {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)},
        }
        with atomic(Path(path)) as file:
            torch.save(content, file)

    def attribution(self, metric: Tensor, *, retain_graph: bool = False) -> dict[Key, SparseLatents]:
        """Gradient × activation of each latent, for a number computed from the model's output (a loss, a difference of
        logits, a reward): SparseLatents [N, d_sae] by key, with the pattern of `latents`.

        Error terms are constants (in "splice+error"; with several sites, a latent's value includes its effect through
        later ones).  Raises AttachError if no gradient reaches the latents: in mode "observe", or under no_grad.
        """
        return attribution(self._parts, metric, retain_graph)

    def integrated_gradients(self, key: Key, forward: Callable[[], Tensor], steps: int = 8) -> SparseLatents:
        """Integrated gradients of one site's latents, from none to all of them, with the error constant, in `steps`.

        forward: runs the model within this run's `with` block and returns the number. It is called once per step, and
        records no rows.  Only in mode "splice+error".
        """
        if self.mode != "splice+error" or self.state.error_grad:
            raise AttachError("integrated_gradients: expected mode 'splice+error' with the error held constant")
        return integrated_gradients(self, find_key(key, self.entries), forward, steps)

    # ---- observers ----------------------------------------------------------------------------------

    def watch(self, observer: Observer, key: Key = None) -> Any:
        """Feed an observer (TopK, Statistics, TopContexts, or your own) from now on; returns the observer.

        key: that of the SAE; not needed if only one is attached.  The observer gets no padding.
        """
        self._watching.append((self._only(key), observer))
        return observer

    def on_fire(
        self,
        feature: int,
        threshold: float,
        fn: Callable[[Fired], Any],
        *,
        key: Key = None,
        sync: bool = True,
        capacity: int = 1024,
    ) -> Alarm:
        """Call fn(event) for every token on which the feature's latent exceeds the threshold.

        sync=True: before the next token is chosen. If fn returns True, the token's sequence ends: generate must choose
        EOS next.  sync=False: fn runs in a thread in the background, at most `capacity` events wait, and the alarm
        counts dropped ones; the end of the run waits for the rest.  Raises IndexError for a feature that the SAE lacks.
        """
        key = self._only(key)
        d_sae = next(e.coder.cfg.d_sae for e in self.entries if e.key == key)  # type: ignore[union-attr]
        if not 0 <= feature < d_sae:
            raise FeatureIndexError(f"feature: expected one in [0, {d_sae}), got {feature}")
        alarm = Alarm(key, feature, threshold, fn, sync, capacity)
        self._watching.append((key, alarm))
        return alarm

    def _only(self, key: Key) -> Key:
        if key is None:
            if len(self._parts) != 1:
                raise AttachError(f"key: expected one of {list(self._parts)}, because several SAEs are attached")
            return next(iter(self._parts))
        return find_key(key, [e for e in self.entries if e.key in self._parts])

    @contextmanager
    def aside(self, path: tuple[Key, float]) -> Iterator[dict[Key, list[tuple[SparseLatents, Tensor | None]]]]:
        """Calls within the block add nothing to the run's records; it yields an object with their latents."""
        kept = self._ledger, self._calls, self._count, self._rows, self._parts, self.keep
        self._ledger, self._calls, self._count, self._rows = Ledger(), [], 0, 0
        self._parts, self.keep = {key: [] for key in self._parts}, True
        self.state.path = path
        try:
            yield self._parts
        finally:
            self._ledger, self._calls, self._count, self._rows, self._parts, self.keep = kept
            self.state.path = None

    def clear(self) -> None:
        """Forget the rows recorded so far; unfinished sequences continue as new ones."""
        self._calls.clear()
        self._ledger = Ledger(self.keep)
        self._count = self._rows = 0
        self._joined.clear()
        for parts in self._parts.values():
            parts.clear()
        for entry in self.entries:
            if isinstance(entry.coder, Activations):
                entry.coder.parts.clear()


class _View(Mapping[Key, Any]):
    """A read-only mapping, by key or by another name of the key's site."""

    def __init__(self, keys: Mapping[Key, Any], make: Callable[[Key], Any], known: list[Entry]) -> None:
        self._keys, self._make = keys, make
        self._known = [e for e in known if e.key in keys]

    def __getitem__(self, key: Key) -> Any:
        return self._make(find_key(key, self._known))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())  # the form that torch.load accepts with weights_only


def _name(key: Key) -> Key:
    """The key with sites replaced by their names."""
    if isinstance(key, Site):
        return key.hook_name
    return tuple(_name(part) for part in key) if isinstance(key, tuple) else key


def _valid_at_last(call: Call, valid: Tensor) -> Tensor:
    generation = call.group.generation
    after = after_eos(generation) if generation is not None and generation.beams == 1 else None
    if after is None or after.shape[0] != call.batch:
        return valid
    own = after[:, call.start : call.start + call.length]
    valid = valid.clone()
    valid[:, : own.shape[1]] &= ~own
    return valid
