"""The library `gemmascope_fast` of PyTorch's dispatcher, and the record that describes each op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gemmascope_fast.ops._transforms import (
    derivative_wanted,
    function_of,
    kernel_of,
    requested,
    sample_by_sample,
    transformed,
)

LIBRARY = torch.library.Library("gemmascope_fast", "DEF")


def expect_tensor(name: str, value: object, expected: str = "a torch.Tensor") -> None:
    """Raise TypeError if an argument is not a tensor, for example a list or a numpy array."""
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        came = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{name}: expected {expected}, got {came}")


def in_dtype(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t.to(dtype), without calling the dispatcher if t has that dtype already: a call costs 10 us."""
    return t if t.dtype == dtype else t.to(dtype)


@dataclass(frozen=True)
class Cost:
    """Work of one call: operations, and bytes that must move (each input read once, each output written once)."""

    bytes: int
    flops: int


@dataclass
class Op:
    """One op: the name in its schema, the eager reference, and its other implementations.

    A call goes through the dispatcher, which runs the compiled kernel for the tensors' device if there is one, and
    the reference otherwise. `gemmascope_fast.backend(name)` selects one by name.
    """

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    ragged: bool = False  # whether the sizes of the outputs depend on the data
    function: Any = None  # its autograd.Function, if it has gradients (`register_autograd`)
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
            return self._run(self.dispatched, args) if transformed() else self.dispatched(*args)
        # this path skips the dispatcher, which would raise its own errors for these
        for position, name in self.tensors:
            if position < len(args):
                expect_tensor(name, args[position])
        return self._run(self.implementations[wanted](args), args)

    def step(self, *args: Any) -> Any:
        """Call the op as a step inside another op. If the outer op runs on "eager", this one uses the reference too;
        with any other backend, it runs as if no backend had been requested.
        """
        return self._run(self.reference if requested() == "eager" else self.dispatched, args)

    def _run(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """run(*args) with the op's derivatives, in the cases where the dispatcher does not add them: references and the
        transforms of torch.func."""
        known = run is self.dispatched and not transformed()
        if known or self.function is None or torch.compiler.is_compiling() or not derivative_wanted(*args):
            return run(*args)
        given = self.dispatched._schema.arguments[len(args) :]
        return self.function.apply(run, *args, *(a.default_value for a in given))


OPS: dict[str, Op] = {}


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    ragged: bool = False,
) -> Op:
    """Define an op.  Compiled kernels override the reference per device when they are loaded.

    ragged: the sizes of the outputs depend on the data, so vmap cannot run over the op.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gemmascope_fast::{name}", fake, lib=LIBRARY)
    op = Op(name, reference, cost, ragged)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return sample_by_sample(op, info, in_dims, *args)

    torch.library.register_vmap(f"gemmascope_fast::{name}", vmap, lib=LIBRARY)
    OPS[name] = op
    return op


def register_autograd(op: Op, save: Callable[..., Any], backward: Callable[..., Any], jvp: Callable[..., Any]) -> None:
    """Register the derivatives of an op; ops/_transforms.py says what the three functions take and return."""
    op.function = function_of(op, save, backward, jvp)
    LIBRARY.impl(op.name, kernel_of(op, op.function), "Autograd", with_keyset=True)
