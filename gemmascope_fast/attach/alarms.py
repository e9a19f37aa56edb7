"""`run.on_fire`: calls a function when a feature fires, before the next token is chosen or in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Call, Tokens
from gemmascope_fast.attach.entries import Key
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops.latents import SparseLatents


@dataclass(frozen=True)
class Fired:
    """One token on which a feature was above the alarm's threshold.  row: its row in the call, batch-major."""

    key: Key
    feature: int
    value: float
    call: int
    sequence: int
    position: int
    token_id: int


def stop(call: Call, output: Any, stopped: set[int]) -> None:
    """Make EOS the only possible next token of these sequences.  AttachError if that is impossible."""
    generation, logits = call.group.generation, getattr(output, "logits", None)
    if generation is None or not generation.eos or generation.beams > 1 or not isinstance(logits, Tensor):
        raise AttachError("on_fire: only a sequence of generate can be stopped, with an EOS token and no beam search")
    logits = logits.clone()
    rows = torch.tensor(sorted(stopped), device=logits.device) - call.group.base
    logits[rows, -1] = -torch.inf
    logits[rows, -1, generation.eos[0]] = 0
    output.logits = logits


class Alarm:
    """Returned by `run.on_fire`.  fired: events so far; dropped: events lost because the queue was full (sync=False
    only); errors: what fn raised in the background."""

    def __init__(
        self,
        key: Key,
        feature: int,
        threshold: float,
        fn: Callable[[Fired], Any],
        sync: bool,
        capacity: int,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.key, self.feature, self.threshold, self.fn, self.sync = key, feature, threshold, fn, sync
        self.fired = self.dropped = 0
        self.errors: list[Exception] = []
        self._queue: queue.Queue[Fired | None] = queue.Queue(capacity)
        self._worker: threading.Thread | None = None

    def update(self, latents: SparseLatents, tokens: Tokens) -> set[int]:
        """Call the function, or queue the call, for each token above the threshold; returns the sequences to stop."""
        values = latents.features([self.feature])[:, 0]
        stopped: set[int] = set()
        for row in (values > self.threshold).nonzero()[:, 0].tolist():
            event = Fired(
                self.key, self.feature, float(values[row]), int(tokens.call[row]), int(tokens.sequence[row]),
                int(tokens.position[row]), int(tokens.token_id[row]),
            )  # fmt: skip
            self.fired += 1
            if not self.sync:
                self._put(event)
            elif self.fn(event) is True:
                stopped.add(event.sequence)
        return stopped

    def _put(self, event: Fired) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="gemmascope-fast alarm", daemon=True)
            self._worker.start()
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self.fn(event)
            except Exception as error:  # noqa: BLE001 kept in `errors`; the model continues
                self.errors.append(error)

    def close(self) -> None:
        """Wait until all queued events are handled; called when the run ends."""
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join()
            self._worker = None
