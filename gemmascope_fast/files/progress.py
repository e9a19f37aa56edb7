"""A progress bar over bytes, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BAR_BYTES = 256 << 20  # about a second of reading from a slow disk: for less, a bar would only flash


@contextmanager
def progress_bar(total: int, name: str, shown: bool | None) -> Iterator[Callable[[int], object]]:
    """A bar on stderr; returns the function to call with numbers of bytes done. None: above 256 MB on a terminal."""
    if not ((total > BAR_BYTES and sys.stderr.isatty()) if shown is None else shown):
        yield lambda _bytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False) as bar:
        yield bar.update
