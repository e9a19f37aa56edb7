"""The list of all kinds of coder that are stored in one file of weights.

Each class declares what its checkpoints contain: `kind`, `extra_arrays` and `extra_fields` (`sae/base.py`).  All other
code (our own files, `from_pretrained`, `attach`, `eval`, `extract`) uses this table.
"""

from __future__ import annotations

from typing import Any, TypeVar

from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemmascope_fast.sae.topk import AbsTopKSAE, TopKSAE
from gemmascope_fast.sae.topk_transcoder import TopKSkipTranscoder, TopKTranscoder

ARRAYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")  # arrays of every kind
# Other fields of our files, and other arguments of a coder's constructor.
_TAKEN = {"version", "kind", "hook_name", "hook_name_out", "model_name", "neuronpedia_id", "figures", "screen"}
_TAKEN |= {"screen_data", "cfg", *ARRAYS}

C = TypeVar("C", bound=Coder)
KINDS: dict[str, Any] = {}  # kind → its class, a Coder


def register(coder: type[C]) -> type[C]:
    """Add a class to the table under its `kind`; returns it, so it can be used as a decorator.

    ValueError if another class has that kind, if an extra array or field has a name that is taken or an unknown
    dimension, or if `reconstructs_input` contradicts the kind: the kinds of transcoders, and only these, contain the
    word "transcoder".
    """
    held = KINDS.get(coder.kind)
    if held is not None and held is not coder:
        raise ValueError(f"kind: {coder.kind!r} of {coder.__name__} is {held.__name__}'s already")
    names = [*coder.extra_arrays, *coder.extra_fields]
    if len(set(names)) != len(names) or set(names) & _TAKEN:
        raise ValueError(f"{coder.__name__}: expected names of their own for extra arrays and fields, got {names}")
    unknown = {dim for dims in coder.extra_arrays.values() for dim in dims} - {"d_in", "d_sae", "d_out"}
    if unknown:
        raise ValueError(f"{coder.__name__}.extra_arrays: expected d_in, d_sae and d_out, got {sorted(unknown)}")
    if coder.reconstructs_input == ("transcoder" in coder.kind):
        raise ValueError(f"{coder.__name__}: reconstructs_input {coder.reconstructs_input} contradicts {coder.kind!r}")
    KINDS[coder.kind] = coder
    return coder


for _coder in (
    JumpReLUSAE,
    TopKSAE,
    AbsTopKSAE,
    JumpReLUTranscoder,
    JumpReLUSkipTranscoder,
    TopKTranscoder,
    TopKSkipTranscoder,
):
    register(_coder)
