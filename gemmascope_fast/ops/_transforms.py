"""How an op behaves under autograd, forward-mode derivatives and the transforms of `torch.func`.

Each op with gradients is one `torch.autograd.Function` with a backward and a jvp. So reverse mode, forward mode and
any nesting of them use the same formulas on every backend.  vmap runs an op once for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

REQUESTED: ContextVar[str | None] = ContextVar("gemmascope_fast_backend", default=None)


RAGGED = (
    "each sample has its own number of latents; pass the samples as leading dimensions of one call instead, x of shape"
    " [samples, ..., d_in]"
)


def requested() -> str | None:
    """The backend that the surrounding `with gsf.backend(...)` requests, or None."""
    return REQUESTED.get()


# Dynamo cannot trace a ContextVar.  This is torch.compiler.assume_constant_result without importing dynamo.
requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def asked_for(name: str | None) -> Iterator[None]:
    """Make `requested()` return this name within the block."""
    token = REQUESTED.set(name)
    try:
        yield
    finally:
        REQUESTED.reset(token)


def transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vjp, jvp, vmap, …) is running."""
    return torch._C._are_functorch_transforms_active()


transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_samples(t: torch.Tensor, what: str) -> None:
    """Raise NotImplementedError if `t`, whose nonzero entries are to be counted, holds samples of vmap."""
    while transformed():
        if torch._C._functorch.is_batchedtensor(t):
            raise NotImplementedError(f"vmap cannot run over {what}: {RAGGED}")
        if not torch._C._functorch.is_functorch_wrapped_tensor(t):
            return
        t = torch._C._functorch.get_unwrapped(t)


def beyond_reverse() -> bool:
    """Whether forward mode or a transform of `torch.func` is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


beyond_reverse._dynamo_marked_constant = True  # type: ignore[attr-defined]


def derivative_wanted(*args: Any) -> bool:
    """Whether a derivative with respect to these arguments may be needed, in reverse or forward mode.

    Always True while forward mode or a transform of `torch.func` is active, because the derivatives that an outer
    transform needs are not visible from an inner one.
    """
    if beyond_reverse():
        return True
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def function_of(op: Any, save: Callable[..., Any], backward: Callable[..., Any], jvp: Callable[..., Any]) -> Any:
    """Make the autograd.Function of an op. It is applied to the function that runs the op, and the op's arguments.

    save(ctx, inputs, output): saves the tensors that backward and jvp read as `ctx.saved_tensors`; may set attributes.
    backward(ctx, needs, *grads): returns one gradient per argument; `needs` says which are wanted.
    jvp(ctx, *tangents): returns one tangent per output, None for integers.
    """

    class Derived(torch.autograd.Function):
        @staticmethod
        def forward(run: Callable[..., Any], *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return run(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            # autograd's worker threads do not inherit the context, so the backend is saved in the graph
            ctx.backend = requested()
            tensors = save(ctx, inputs[1:], output)
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.set_materialize_grads(False)  # otherwise missing tangents would be zeros that are multiplied
            ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            with asked_for(ctx.backend):
                return (None, *backward(ctx, ctx.needs_input_grad[1:], *grads))

        @staticmethod
        def jvp(ctx: Any, _run: Any, *tangents: Any) -> Any:
            with asked_for(ctx.backend):
                return jvp(ctx, *tangents)

        @staticmethod
        def vmap(info: Any, in_dims: Any, _run: Any, *args: Any) -> Any:
            return sample_by_sample(op, info, in_dims[1:], *args)

    Derived.__name__ = Derived.__qualname__ = f"{op.name}_derivatives"
    return Derived


def kernel_of(op: Any, function: Any) -> Callable[..., Any]:
    """The function that the dispatcher calls for its key "Autograd"."""
    dispatched = op.dispatched
    defaults = [a.default_value if a.has_default_value() else None for a in dispatched._schema.arguments]

    def autograd(keyset: Any, *args: Any) -> Any:
        if transformed():
            # under a transform, autograd.Function must be applied before the dispatcher, as `Op.__call__` does
            raise NotImplementedError(
                f"torch.ops.gemmascope_fast.{op.name} has no derivatives under torch.func: call"
                f" gemmascope_fast.ops.{op.name}"
            )
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            # the dispatcher omits arguments that equal their defaults
            return function.apply(dispatched, *args, *defaults[len(args) :])
        with torch._C._AutoDispatchBelowAutograd():
            return dispatched.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return autograd


def sample_by_sample(op: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """The vmap rule of every op: (outputs with the samples stacked in front, their batch dimensions).

    Raises NotImplementedError for an op whose outputs differ in size between samples.
    """
    if op.ragged:
        raise NotImplementedError(f"vmap cannot run over {op.name}: {RAGGED}")
    if not info.batch_size:
        raise NotImplementedError(f"vmap over {op.name}: expected at least one sample, got none")
    found = [op.step(*_sample(args, in_dims, i)) for i in range(info.batch_size)]
    if isinstance(found[0], torch.Tensor):
        return torch.stack(found), 0
    return type(found[0])(torch.stack(each) for each in zip(*found, strict=True)), type(found[0])([0] * len(found[0]))


def _sample(args: Any, dims: Any, i: int) -> Any:
    """The arguments of sample i. Lists of tensors come with lists of dimensions."""
    return [
        a if d is None else _sample(a, d, i) if isinstance(a, list | tuple) else a.select(d, i)
        for a, d in zip(args, dims, strict=True)
    ]
