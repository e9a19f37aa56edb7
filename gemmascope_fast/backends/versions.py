"""Versions of this package and of what it stands on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

from gemmascope_fast._version import __version__


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Version by name of this package, Python and `packages`; None where a package is not installed."""
    found: dict[str, str | None] = {"gemmascope-fast": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
