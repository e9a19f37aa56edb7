"""Compiled models: code compiled before a hook was added ignores the hook (torch only checks for removed hooks).

So if anything in the model was compiled, attaching discards the compiled code. The next call compiles again, and hooks
become graph breaks.  If a site is still not reached, the run raises an error (`Run._after`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

REASON = "an attached SAE reads the activations outside of the compiled graph; compile without fullgraph"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`; any other model unchanged."""
    return getattr(model, "_orig_mod", model) if type(model).__name__ == "OptimizedModule" else model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was used on the model, on a part of it, or by generate for a static cache."""
    return any(
        type(module).__name__ == "OptimizedModule"
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or "_compiled_call" in module.__dict__
        for module in model.modules()
    )


def forget() -> None:
    """Discard all code that torch.compile compiled in this process, since that cannot be done for one model only."""
    import torch._dynamo

    torch._dynamo.reset()


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, never traced.  If the compiler is not loaded, there is nothing to do."""
    if "torch._dynamo" not in sys.modules:
        return function
    import torch._dynamo

    return torch._dynamo.disable(function, reason=REASON)
