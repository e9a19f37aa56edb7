"""The hooks themselves: one per module and end, shared by every run that has something there.

Sharing is what gives the order that `attach` promises: at one place every reader sees the activation as it came,
then the one splice replaces it; runs come and go in any order and the last one takes the hook away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from gemmascope_fast.attach.transformers.compiled import opaque
from gemmascope_fast.attach.transformers.structure import Place
from gemmascope_fast.errors import AttachError


class Visitor(Protocol):
    """What a run has at a place.  `read` sees x as it came, `write` gives what is to replace it or None; both do
    nothing in a call that is not its run's."""

    def read(self, x: Tensor, inputs: tuple[Any, ...]) -> None: ...

    def write(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor | None: ...


class _Hook:
    def __init__(self, module: nn.Module, end: str) -> None:
        self.visitors: tuple[Visitor, ...] = ()
        if end == "output":
            self.handle: Any = module.register_forward_hook(opaque(self._output))
        else:
            self.handle = module.register_forward_pre_hook(opaque(self._input), with_kwargs=True)

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
        # a tensor from transformers 5.x, a tuple that starts with one from 4.57
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
    """Put a visitor at a place; the returned function takes it away again."""
    with _LOCK:
        ends = _HOOKS.setdefault(place.module, {})
        hook = ends.get(place.end)
        if hook is None:
            hook = ends[place.end] = _Hook(place.module, place.end)
        hook.visitors = (*hook.visitors, visitor)

    def leave() -> None:
        with _LOCK:
            hook.visitors = tuple(v for v in hook.visitors if v is not visitor)
            if not hook.visitors and _HOOKS.get(place.module, {}).get(place.end) is hook:
                hook.handle.remove()
                del _HOOKS[place.module][place.end]

    return leave


def visitors(place: Place) -> tuple[Visitor, ...]:
    """Who is at a place now."""
    hook = _HOOKS.get(place.module, {}).get(place.end)
    return () if hook is None else hook.visitors
