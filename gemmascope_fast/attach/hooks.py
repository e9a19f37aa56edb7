"""Forward hooks that can be taken away whole, even after their registration was interrupted halfway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def unhook(module: nn.Module, function: Callable[..., Any] | None) -> None:
    """Take a function away from a module's forward hooks and pre-hooks; nothing where it is not among them.

    By identity, not by torch's handle: a KeyboardInterrupt may come before the handle is returned.
    """
    flags = (
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    )
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for number in [number for number, hook in hooks.items() if hook is function]:
            for flag in flags:
                flag.pop(number, None)
            hooks.pop(number, None)
