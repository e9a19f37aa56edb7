"""The dispatcher's library `gemmascope_fast` and what every op declares about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

LIBRARY = torch.library.Library("gemmascope_fast", "DEF")

REQUESTED: ContextVar[str | None] = ContextVar("gemmascope_fast_backend", default=None)


def requested() -> str | None:
    """The backend that the surrounding `with gsf.backend(...)` asks for, or None."""
    return REQUESTED.get()


# Dynamo cannot trace a ContextVar.  This is torch.compiler.assume_constant_result without its import of dynamo.
requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


def expect_tensor(name: str, value: object, expected: str = "a torch.Tensor") -> None:
    """Raise TypeError where an argument is no tensor: a list or a numpy array."""
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        came = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{name}: expected {expected}, got {came}")


def in_dtype(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t.to(dtype), without the dispatcher where it is that already: it takes 10 us between a model's layers."""
    return t if t.dtype == dtype else t.to(dtype)


@dataclass(frozen=True)
class Cost:
    """Work of one call: bytes that must move (each input read once, each output written once), operations."""

    bytes: int
    flops: int


@dataclass
class Op:
    """One op: its schema's name, the eager reference, and what else can serve it.

    Calling it goes through the dispatcher, which takes the compiled kernel of the tensors' device where there
    is one and the reference where there is none; `gemmascope_fast.backend(name)` asks for one by name.
    """

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    dispatched: torch._ops.OpOverload = field(init=False)
    tensors: tuple[tuple[int, str], ...] = field(init=False)  # the arguments that must be tensors
    # backend name -> the callable for a call's arguments, or BackendError; filled in by gemmascope_fast.backends
    implementations: dict[str, Callable[[Sequence[Any]], Callable[..., Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dispatched = getattr(torch.ops.gemmascope_fast, self.name).default
        arguments = enumerate(self.dispatched._schema.arguments)
        self.tensors = tuple((i, a.name) for i, a in arguments if a.type.kind() == "TensorType")

    def __call__(self, *args: Any) -> Any:
        wanted = requested()
        if wanted is None:
            return self.dispatched(*args)
        # the dispatcher, which is passed by here, refuses these with words of its own
        for position, name in self.tensors:
            if position < len(args):
                expect_tensor(name, args[position])
        return self.implementations[wanted](args)(*args)

    def step(self, *args: Any) -> Any:
        """As a call, where the op is a step of another's work: a backend asked for by name was asked for the whole.
        "eager" is the reference throughout; with every other, this op is served as if nobody had asked.
        """
        return self.reference(*args) if requested() == "eager" else self.dispatched(*args)


OPS: dict[str, Op] = {}


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cost: Callable[..., Cost]) -> Op:
    """Define an op.  Compiled kernels override the reference per device when they are loaded."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gemmascope_fast::{name}", fake, lib=LIBRARY)
    op = Op(name, reference, cost)
    OPS[name] = op
    return op


def register_autograd(op: Op, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"gemmascope_fast::{op.name}", backward, setup_context=setup_context, lib=LIBRARY)
