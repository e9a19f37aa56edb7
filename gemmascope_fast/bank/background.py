"""What a bank brings ahead of its use: a queue, and a thread for as long as there is something in it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Wanted(NamedTuple):
    """An SAE to bring in the background; `spare` may not leave for it."""

    name: str
    spare: frozenset[str]
    announced: bool


class Background:
    """A queue of SAEs.  Its thread gives them to `fetch`, one after the other.

    `changed` is the store's lock: held around every method here and around `fetch`, which may let go of it meanwhile
    and raises nothing.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._queue: deque[Wanted] = deque()
        self._thread: threading.Thread | None = None

    def put(self, wanted: Iterable[Wanted], fetch: Callable[[Wanted], None]) -> None:
        """Queue what is not queued yet: what was announced behind everything else, anything else before it."""
        queued = {item.name for item in self._queue}
        new = [item for item in wanted if item.name not in queued]
        self._queue.extend(item for item in new if item.announced)
        self._queue.extendleft(item for item in reversed(new) if not item.announced)
        if self._queue and self._thread is None:
            # A thread for as long as there is work: an idle bank leaves none behind.  It alone holds `fetch`, a method
            # of the store: a reference from here would make a cycle, and keep a dropped bank's weights in memory.
            self._thread = threading.Thread(target=self._work, args=(fetch,), name="gemmascope-fast bank", daemon=True)
            self._thread.start()

    def forget_announced(self) -> None:
        """A later announcement takes the place of an earlier one."""
        self._queue = deque(item for item in self._queue if not item.announced)

    def stop(self) -> None:
        """Nothing more after what is being fetched."""
        self._queue.clear()

    def settle(self) -> None:
        """Wait until nothing is being fetched."""
        while self._thread is not None:
            self._changed.wait()

    def runs_here(self) -> bool:
        """Whether the caller is this queue's thread."""
        return threading.current_thread() is self._thread

    def _work(self, fetch: Callable[[Wanted], None]) -> None:
        with self._changed:
            while self._queue and threading.main_thread().is_alive():
                fetch(self._queue.popleft())
            self._thread = None
            self._changed.notify_all()
