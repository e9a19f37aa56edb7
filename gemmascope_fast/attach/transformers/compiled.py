"""Compiled models: code compiled before a hook was added runs without it (torch checks hooks only when they go).

So where anything in the model was compiled, attaching discards the compiled code; the next call compiles anew, with
the hooks as breaks in the graph.  Should a site not be reached all the same, the run says so (`Run._after`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

REASON = "an attached SAE reads the activations outside of the compiled graph; compile without fullgraph"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind `torch.compile(model)`; any other model as it is."""
    return getattr(model, "_orig_mod", model) if type(model).__name__ == "OptimizedModule" else model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was asked for, on the model, on a part of it, or by generate for a static cache."""
    return any(
        type(module).__name__ == "OptimizedModule"
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or "_compiled_call" in module.__dict__
        for module in model.modules()
    )


def forget() -> None:
    """Discard what torch.compile has compiled in this process: it cannot be done for one model alone."""
    import torch._dynamo

    torch._dynamo.reset()


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, never traced.  Where nothing has loaded the compiler there is nothing to do."""
    if "torch._dynamo" not in sys.modules:
        return function
    import torch._dynamo

    return torch._dynamo.disable(function, reason=REASON)
