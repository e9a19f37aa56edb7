"""Removes forward hooks completely, even if their registration was interrupted halfway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def unhook(module: nn.Module, function: Callable[..., Any] | None) -> None:
    """Remove a function from a module's forward hooks and pre-hooks; does nothing if it is not there.

    It compares identity and needs no handle, because a KeyboardInterrupt may come before torch returns the handle.
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
