"""What a run and its taps share while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.entries import Key


@dataclass
class State:
    """mode and error_grad are the run's own.  call: the model's call that this thread is in, None outside of one.
    recomputed: whether it is computed again for gradient checkpointing.  path: the key whose latents are at this share
    of what they are, for integrated gradients.  seconds: time spent in hooks so far.  owner: the thread that entered
    the run."""

    mode: str
    error_grad: bool
    call: Callable[[], Call | None]
    recomputed: Callable[[], bool]
    path: tuple[Key, float] | None = None
    seconds: float = 0.0
    owner: int | None = None
