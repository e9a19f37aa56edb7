"""Makes coders of other libraries fast: objects of SAELens, SAEBench and circuit-tracer keep their interface, and
coders of dictionary_learning and sparsify are converted to this package's modules.

None of these libraries is needed to import this package. Each adapter imports its library when it gets one of its
objects, and states the versions that it was tested with.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

# top-level module of an object's class → adapter here, name on PyPI, tested versions
PEERS = {
    "sae_lens": ("saelens", "sae-lens", (6, 54), (7, 0)),
    "sae_bench": ("saebench", "sae-bench", (0, 6), (0, 7)),
    "circuit_tracer": ("circuit_tracer", "circuit-tracer", (0, 5), (0, 6)),
    "dictionary_learning": ("dictionary_learning", "dictionary-learning", (0, 1), (0, 2)),
    "sparsify": ("sparsify", "eai-sparsify", (1, 3), (1, 4)),
}


def accelerate(target: Any, *, inplace: bool | None = None) -> Any:
    """An SAE, transcoder or model of another library, computed with this package's ops unless something needs the
    dense latents.

    target:
    - an SAELens SAE (JumpReLU, standard, gated, top-k, AbsTopK) or transcoder: returns a new object of a subclass
      with its own weights; `inplace=True` changes the object itself and makes no second copy;
    - SAELens's HookedSAETransformer or SAETransformerBridge: every SAE attached to it, in place;
    - a custom SAE of SAEBench (JumpReLU, ReLU, top-k, batch top-k), also new or in place;
    - circuit-tracer's SingleLayerTranscoder, TranscoderSet or CrossLayerTranscoder, always in place;
    - a coder of dictionary_learning or sparsify: converted, `JumpReLUSAE`, `TopKSAE` or a top-k transcoder.

    Raises TypeError for anything else and for coders that cannot be expressed as these, ImportError for a version of
    the library that the adapter does not know.
    """
    for cls in type(target).__mro__:
        peer = cls.__module__.partition(".")[0]
        if peer in PEERS:
            return adapter(peer).accelerate(target, inplace)
    raise TypeError(
        f"target: expected an object of {', '.join(PEERS)}, got {type(target).__module__}.{type(target).__name__};"
        " this package's own modules need no acceleration"
    )


def adapter(peer: str) -> Any:
    """The adapter module of a library.  ImportError says what is missing, or which versions work."""
    name, package, least, below = PEERS[peer]
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed: pip install '{package}{_range(least, below)}'") from error
    if not least <= tuple(int(part) for part in found.split(".")[:2]) < below:
        raise ImportError(f"{package}: expected a version {_range(least, below)}, got {found}")
    return import_module(f"gemmascope_fast.dropin.{name}")


def _range(least: tuple[int, int], below: tuple[int, int]) -> str:
    return f">={least[0]}.{least[1]},<{below[0]}.{below[1]}"
