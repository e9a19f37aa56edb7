"""Exceptions of this package.  All other errors that it raises are ValueError, TypeError or IndexError."""

from importlib.util import find_spec


class GemmaScopeFastError(Exception):
    """Base class."""


class CheckpointError(GemmaScopeFastError):
    """A checkpoint is damaged, contradicts itself or does not exist; the message names file and array."""


class AttachError(GemmaScopeFastError):
    """An SAE cannot be attached to this model, or a run cannot give what was requested."""


class BankError(GemmaScopeFastError):
    """A bank's budget has no room for an SAE: it is too large, or all others are in use."""


class BackendError(GemmaScopeFastError):
    """A backend requested by name cannot run the op; the message says why."""


class StaleScreenError(GemmaScopeFastError):
    """A pre-activation is outside the screen's bound: the weights were edited and this was not detected."""


def require(module: str, extra: str, what: str) -> None:
    """Raise ValueError naming the extra if a module is not installed. Called before long work begins."""
    if find_spec(module) is None:
        raise ValueError(f"{what}: expected {module}, which is not installed; pip install 'gemmascope-fast[{extra}]'")
