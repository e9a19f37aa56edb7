"""The hooks themselves: one for each module and end, shared by all runs there.

Sharing makes the order that `attach` promises possible: at one place, every reader gets the original activation, then
the one splice replaces it. Runs come and go in any order, and the last one removes the hook.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gemmascope_fast.attach.hooks import unhook
from gemmascope_fast.attach.transformers.compiled import opaque
from gemmascope_fast.attach.transformers.structure import Place
from gemmascope_fast.errors import AttachError


class Visitor(Protocol):
    """What a run does at a place.  `read` gets the original x, `write` returns the replacement or None; both do
    nothing in a call of another run."""

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None: ...

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None: ...


class _Hook:
    def __init__(self, end: str) -> None:
        self.visitors: tuple[Visitor, ...] = ()
        self.end, self.function = end, opaque(self._output if end == "output" else self._input)

    def register(self, module: nn.Module) -> None:
        if self.end == "output":
            module.register_forward_hook(self.function)
        else:
            module.register_forward_pre_hook(self.function, with_kwargs=True)

    def _pass(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None:
        visitors = self.visitors
        for visitor in visitors:
            visitor.read(x, inputs)
        new = None
        for visitor in visitors:
            written = visitor.write(x if new is None else new, inputs)
            new = new if written is None else written
        return new

    def _output(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        # a tensor since transformers 5.x, a tuple that begins with one in 4.57
        if isinstance(output, Tensor):
            return self._pass(output, inputs)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            new = self._pass(output[0], inputs)
            return None if new is None else _with_first(output, new)
        raise AttachError(f"{type(module).__name__}: expected a tensor or a tuple of them, got {type(output).__name__}")

    def _input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            new = self._pass(args[0], args)
            return None if new is None else ((new, *args[1:]), kwargs)
        for name in ("hidden_states", "input", "x"):
            if isinstance(kwargs.get(name), Tensor):
                new = self._pass(kwargs[name], args)
                return None if new is None else (args, {**kwargs, name: new})
        raise AttachError(f"{type(module).__name__}: expected a tensor as its first argument")


def _with_first(output: tuple[Any, ...], first: Tensor) -> tuple[Any, ...]:
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: first})  # type: ignore[attr-defined]
    return (first, *output[1:])


_LOCK = threading.RLock()
_HOOKS: WeakKeyDictionary[nn.Module, dict[str, _Hook]] = WeakKeyDictionary()


def visit(place: Place, visitor: Visitor) -> Callable[[], None]:
    """Register a visitor at a place; `leave`, or the returned function, removes it."""
    with _LOCK:
        ends = _HOOKS.setdefault(place.module, {})
        hook = ends.get(place.end)
        if hook is None:
            hook = ends[place.end] = _Hook(place.end)
            hook.register(place.module)
        hook.visitors = (*hook.visitors, visitor)
    return partial(leave, place, visitor)


def leave(place: Place, visitor: Visitor) -> None:
    """Remove a visitor; does nothing if it is not there.  After an interrupted `visit`, removes what is there."""
    with _LOCK:
        ends = _HOOKS.get(place.module, {})
        hook = ends.get(place.end)
        if hook is None:
            return
        hook.visitors = tuple(v for v in hook.visitors if v is not visitor)
        if not hook.visitors:
            unhook(place.module, hook.function)
            del ends[place.end]


def visitors(place: Place) -> tuple[Visitor, ...]:
    """The visitors at a place now."""
    hook = _HOOKS.get(place.module, {}).get(place.end)
    return () if hook is None else hook.visitors
