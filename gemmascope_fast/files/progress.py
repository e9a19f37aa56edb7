"""Progress on standard error: bars, a line, a spinner.  `quiet` silences all of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

BAR_BYTES = 256 << 20  # about a second from a slow disk: below it a bar would only flash
_QUIET = [False]


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Within the block nothing here prints, nor do the bars of libraries that import tqdm within it."""
    before, variable = _QUIET[0], os.environ.get("TQDM_DISABLE")
    _QUIET[0] = on or before
    if on:
        os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        _QUIET[0] = before
        if on and variable is None:
            del os.environ["TQDM_DISABLE"]


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar with tqdm's own options; a context manager, and an iterable where one is given."""
    from tqdm import tqdm

    return tqdm(iterable, disable=_QUIET[0], **options)


def close_bars() -> None:
    """End the line of every bar that an exception left open."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for each in list(getattr(tqdm, "_instances", ())):
            each.close()


def say(text: str) -> None:
    """One line."""
    if not _QUIET[0]:
        print(text, file=sys.stderr)


def status(text: str) -> AbstractContextManager[Any]:
    """A spinner beside `text` while the block runs, on a terminal."""
    from rich.console import Console

    return nullcontext() if _QUIET[0] else Console(stderr=True).status(text)


@contextmanager
def progress_bar(total: int, name: str, shown: bool | None) -> Iterator[Callable[[int], object]]:
    """A bar on stderr; gives the function to call with the bytes done.  shown: None is above 256 MB on a terminal."""
    if not ((total > BAR_BYTES and sys.stderr.isatty()) if shown is None else shown) or _QUIET[0]:
        yield lambda _bytes: None
        return
    with bar(total=total, unit="B", unit_scale=True, desc=name, leave=False) as own:
        yield own.update
