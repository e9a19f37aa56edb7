"""State shared by a run and its taps while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.entries import Key


@dataclass
class State:
    """mode and error_grad: those of the run.  call: the model call that this thread is in, None outside of one.
    recomputed: whether gradient checkpointing computes it again.  path: for integrated gradients, a key and the factor
    for its latents.  seconds: time spent in hooks so far.  owner: the thread that entered the run."""

    mode: str
    error_grad: bool
    call: Callable[[], Call | None]
    recomputed: Callable[[], bool]
    path: tuple[Key, float] | None = None
    seconds: float = 0.0
    owner: int | None = None
