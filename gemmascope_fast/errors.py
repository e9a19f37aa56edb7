"""Exceptions of the package's own.  Everything else it raises is ValueError, TypeError or IndexError."""

from importlib.util import find_spec


class GemmaScopeFastError(Exception):
    """Base class."""


class CheckpointError(GemmaScopeFastError):
    """A checkpoint is damaged, contradicts itself or is not there; the message names file and array."""


class AttachError(GemmaScopeFastError):
    """An SAE cannot be attached to this model, or a run cannot be read as asked."""


class BankError(GemmaScopeFastError):
    """A bank's budget has no room for an SAE: it is too large, or everything there is in use."""


class BackendError(GemmaScopeFastError):
    """A backend was asked for by name and cannot serve the op; the message says why."""


class StaleScreenError(GemmaScopeFastError):
    """A refined pre-activation lies outside the screen's bound: weights changed behind the screen's back."""


def require(module: str, extra: str, what: str) -> None:
    """ValueError naming the extra where a module is not installed; asked before the minutes are spent."""
    if find_spec(module) is None:
        raise ValueError(f"{what}: expected {module}, which is not installed; pip install 'gemmascope-fast[{extra}]'")
