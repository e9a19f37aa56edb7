"""Versions of this package and its dependencies."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

from gemmascope_fast._version import __version__


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions by name: this package, Python and `packages`; None for a package that is not installed."""
    found: dict[str, str | None] = {"gemmascope-fast": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
