"""Loads SAEs of a bank in the background before they are used: a queue, and a thread while it is not empty."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Wanted(NamedTuple):
    """An SAE to load in the background; those in `spare` must not be evicted for it."""

    name: str
    spare: frozenset[str]
    announced: bool


class Background:
    """A queue of SAEs.  Its thread passes them to `fetch` one by one.

    `changed` is the store's lock. It is held around every method here and around `fetch`, which may release it for a
    while and raises nothing.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._queue: deque[Wanted] = deque()
        self._thread: threading.Thread | None = None

    def put(self, wanted: Iterable[Wanted], fetch: Callable[[Wanted], None]) -> None:
        """Queue what is not queued yet: announced SAEs at the end, others before all announced ones."""
        queued = {item.name for item in self._queue}
        new = [item for item in wanted if item.name not in queued]
        self._queue.extend(item for item in new if item.announced)
        self._queue.extendleft(item for item in reversed(new) if not item.announced)
        if self._queue and self._thread is None:
            # The thread exists only while there is work.  Only the thread refers to `fetch`, a method of the store. A
            # reference from this object would make a cycle, and keep the weights of a deleted bank in memory.
            self._thread = threading.Thread(target=self._work, args=(fetch,), name="gemmascope-fast bank", daemon=True)
            self._thread.start()

    def forget_announced(self) -> None:
        """Drop earlier announcements; a later one replaces them."""
        self._queue = deque(item for item in self._queue if not item.announced)

    def stop(self) -> None:
        """Fetch nothing more after the current SAE."""
        self._queue.clear()

    def settle(self) -> None:
        """Wait until nothing is being fetched."""
        while self._thread is not None:
            self._changed.wait()

    def runs_here(self) -> bool:
        """Whether the caller runs in this queue's thread."""
        return threading.current_thread() is self._thread

    def _work(self, fetch: Callable[[Wanted], None]) -> None:
        with self._changed:
            while self._queue and threading.main_thread().is_alive():
                fetch(self._queue.popleft())
            self._thread = None
            self._changed.notify_all()
