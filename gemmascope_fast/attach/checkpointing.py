"""Gradient checkpointing: a region of the model runs again in backward, and its splices must run again too.

After `model.gradient_checkpointing_enable()`, transformers runs each layer through the module's
`_gradient_checkpointing_func`.  While a splicing run is open, that function is wrapped on the instance.  So we
know that the first execution of a region belongs to the open call, and that the second, in backward, replays the
same call: it reads the same rows and makes the same edits, now with a graph, and records nothing.

A region that is checkpointed in another way cannot be followed, so a splice inside it is an error.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.edits import Edit

if TYPE_CHECKING:
    from gemmascope_fast.attach.run import Run

_FUNCTION = "_gradient_checkpointing_func"
_FILE = torch.utils.checkpoint.__file__
_LOCK = threading.RLock()
_WRAPPED: WeakKeyDictionary[nn.Module, _Wrapped] = WeakKeyDictionary()
_REPLAYING = threading.local()

HOW = "use model.gradient_checkpointing_enable(), or attach with mode 'observe'"


class _Wrapped:
    """The wrapped checkpointing function of one module, for all runs that splice."""

    def __init__(self, module: nn.Module) -> None:
        self.runs: tuple[Run, ...] = ()
        original = self.original = module.__dict__[_FUNCTION]

        @functools.wraps(original)
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            calls = [(run, call) for run in self.runs if (call := run.call()) is not None]
            return original(Region(function, calls) if calls else function, *args, **kwargs)

        self.wrapper = checkpointed

    def remove(self, module: nn.Module) -> None:
        if module.__dict__.get(_FUNCTION) is self.wrapper:
            setattr(module, _FUNCTION, self.original)


class Region:
    """A checkpointed region: runs first in its calls, and later as their replay."""

    def __init__(self, function: Callable[..., Any], calls: Sequence[tuple[Run, Call]]) -> None:
        self.function, self.calls, self.ran = function, calls, False
        self.edits = [state for run, call in calls for state in _states(run, call)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.ran:
            with ExitStack() as stack:
                stack.enter_context(_replaying())
                stack.enter_context(_as_they_were(self.edits))
                for run, call in self.calls:
                    stack.enter_context(run.replayed(call))
                return self.function(*args, **kwargs)
        self.ran = True
        outer = [call.region for _, call in self.calls]
        try:
            for _, call in self.calls:
                call.region = self
            return self.function(*args, **kwargs)
        finally:
            for (_, call), region in zip(self.calls, outer, strict=True):
                call.region = region


def checkpointing(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that would use checkpointing in a forward now."""
    if not torch.is_grad_enabled():
        return []
    return [m for m in modules if m.gradient_checkpointing and m.training and _FUNCTION in m.__dict__]


def wrap(module: nn.Module, run: Run) -> None:
    """Make a run follow the module's checkpointed regions from now on."""
    with _LOCK:
        known = _WRAPPED.get(module)
        if known is not None and module.__dict__.get(_FUNCTION) is not known.wrapper:
            known = None  # it was enabled again
        if known is None:
            runs = () if module not in _WRAPPED else _WRAPPED[module].runs
            known = _WRAPPED[module] = _Wrapped(module)
            known.runs = runs
            setattr(module, _FUNCTION, known.wrapper)
        if run not in known.runs:
            known.runs = (*known.runs, run)


def unwrap(module: nn.Module, run: Run) -> None:
    """Make the run stop following the module; does nothing if it did not follow it."""
    with _LOCK:
        known = _WRAPPED.get(module)
        if known is None:
            return
        known.runs = tuple(other for other in known.runs if other is not run)
        if not known.runs:
            known.remove(module)
            del _WRAPPED[module]


def elsewhere() -> bool:
    """Whether the current code was called by `torch.utils.checkpoint.checkpoint`."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "checkpoint" and frame.f_code.co_filename == _FILE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def recomputing() -> bool:
    """Whether this thread is in a backward pass, but not in a region that is followed."""
    return torch._C._current_graph_task_id() != -1 and not getattr(_REPLAYING, "depth", 0)


@contextmanager
def _replaying() -> Iterator[None]:
    _REPLAYING.depth = getattr(_REPLAYING, "depth", 0) + 1
    try:
        yield
    finally:
        _REPLAYING.depth -= 1


def _states(run: Run, call: Call) -> list[tuple[Edit, dict[str, Any]]]:
    """A snapshot of the run's edits in this call, because their numbers may change before the backward pass."""
    if call.interim.edits is None:
        call.interim.edits = [(edit, {k: _kept(v) for k, v in vars(edit).items()}) for edit in run.edits]
    return call.interim.edits


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):  # a tensor that is trained must stay the same tensor
        return value if value.requires_grad else value.clone()
    return list(value) if isinstance(value, list) else value


@contextmanager
def _as_they_were(states: Sequence[tuple[Edit, dict[str, Any]]]) -> Iterator[None]:
    now = [(edit, dict(vars(edit))) for edit, _ in states]
    try:
        for edit, state in states:
            vars(edit).update(state)
        yield
    finally:
        for edit, state in now:
            vars(edit).update(state)
