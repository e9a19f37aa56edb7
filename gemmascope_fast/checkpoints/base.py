"""The dataclass that every checkpoint format returns: arrays that are not read yet, and what describes them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmascope_fast.checkpoints.kinds import ARRAYS, KINDS
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import MOST, integer, json_object, shown, text
from gemmascope_fast.files.regular import read_small
from gemmascope_fast.sae.base import Field
from gemmascope_fast.sae.sites import Site

MULTI = ("cross_layer_transcoder", "crosscoder")
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass
class Checkpoint:
    """A checkpoint before its weights are read.

    arrays: with Gemma Scope's names and shapes; W_skip is [d_in, d_out].
    threshold_value: the threshold of every feature, for formats that store one number or none (ReLU, BatchTopK).
    layers: for a cross-layer transcoder one checkpoint per layer, with W_dec [d_sae, n_outputs · d] and b_dec padded
    to n_outputs · d; for a crosscoder each layer's part of one set of latents; otherwise empty.
    normalisation: SAELens's normalize_activations; only "none" is supported.
    kind_known: False if neither the file nor its path says whether it is an SAE or a transcoder.
    subtracts_b_dec: the encoder reads x - b_dec; `build` folds that into b_enc.
    fields: what the kind's class declares in `extra_fields`, such as k of a top-k SAE.
    """

    path: Path
    kind: str
    arrays: dict[str, Entry]
    site: Site | None = None
    site_out: Site | None = None
    model_name: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    layers: tuple[Checkpoint, ...] = ()
    normalisation: str = "none"
    kind_known: bool = True
    subtracts_b_dec: bool = False
    threshold_value: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.kind not in MULTI:
            raise CheckpointError(
                f"{self.path}: kind: expected one of {', '.join((*KINDS, *MULTI))}, got {self.kind!r}"
            )
        if self.kind in MULTI:
            if not self.layers:
                raise CheckpointError(f"{self.path}: a {self.kind} without layers")
            return
        for name in set(self.fields) - set(KINDS[self.kind].extra_fields):
            having = ", ".join(kind for kind, coder in KINDS.items() if name in coder.extra_fields) or "nothing"
            raise CheckpointError(
                f"{self.path}: {name}: only {having} has one, got {name} = {shown(self.fields[name])} of kind"
                f" {self.kind}"
            )
        names = {*ARRAYS, *KINDS[self.kind].extra_arrays}
        if set(self.arrays) | {"threshold"} != names:
            raise CheckpointError(f"{self.path}: expected arrays {sorted(names)}, got {shown(sorted(self.arrays))}")
        if "threshold" not in self.arrays and self.threshold_value is None:
            raise CheckpointError(f"{self.path}: threshold: expected one number per feature, got none")
        self._check_shapes()

    def _check_shapes(self) -> None:
        if any(len(self.arrays[n].shape) != 2 for n in ("W_enc", "W_dec")):
            raise CheckpointError(f"{self.path}: W_enc and W_dec: expected two dimensions")
        for name, entry in self.arrays.items():
            if not entry.dtype.is_floating_point:
                raise CheckpointError(f"{self.path}: {name}: expected floating numbers, got {entry.dtype}")
            if 0 in entry.shape:
                raise CheckpointError(f"{self.path}: {name}: expected numbers, got the empty shape {entry.shape}")
        (d_in, d_sae), (_, d_out) = self.arrays["W_enc"].shape, self.arrays["W_dec"].shape
        want = {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "threshold": (d_sae,), "b_dec": (d_out,)}
        sizes, coder = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}, KINDS[self.kind]
        want |= {name: tuple(sizes[dim] for dim in dims) for name, dims in coder.extra_arrays.items()}
        for name, entry in self.arrays.items():
            if entry.shape != want.get(name, entry.shape):
                raise CheckpointError(f"{self.path}: {name}: expected {want[name]}, got {entry.shape}")
        if coder.reconstructs_input and d_in != d_out:
            raise CheckpointError(f"{self.path}: W_dec: expected d_out = d_in = {d_in} for an SAE, got {d_out}")
        for name, declared in coder.extra_fields.items():
            self._check_field(name, declared, sizes)

    def _check_field(self, name: str, declared: Field, sizes: dict[str, int]) -> None:
        """CheckpointError if a field is missing, has another type or is out of range."""
        value = self.fields.get(name)
        least, most = (sizes[end] if isinstance(end, str) else end for end in (declared.least, declared.most))
        if declared.type is int:
            integer(self.path, name, value, -MOST if least is None else int(least), MOST if most is None else int(most))
            return
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = number if declared.type is float else isinstance(value, declared.type)
        if right and number:
            right = (least is None or least <= value) and (most is None or value <= most)  # type: ignore[operator]
        if not right:
            limits = "" if least is None and most is None else f" from {least} to {most}"
            raise CheckpointError(f"{self.path}: {name}: expected {_TYPES[declared.type]}{limits}, got {shown(value)}")

    @property
    def transcodes(self) -> bool:
        """Whether it reads one site and writes another."""
        return "transcoder" in self.kind

    @property
    def d_in(self) -> int:
        return self.layers[0].d_in if self.layers else self.arrays["W_enc"].shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents; for a cross-layer transcoder, those of one layer."""
        return self.layers[0].d_sae if self.layers else self.arrays["W_enc"].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in the file."""
        return sum(e.nbytes for e in self.arrays.values()) + sum(c.nbytes for c in self.layers)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most a megabyte; CheckpointError if the file is something else."""
    try:
        content = read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    return json_object(path, "config", content)


def one_of(path: Path, what: str, value: Any, choices: Collection[str], optional: bool = False) -> Any:
    """Check that `value` is one of the allowed texts (or None, if `optional`), and return it."""
    if (value is None and optional) or (isinstance(value, str) and value in choices):
        return value
    raise CheckpointError(f"{path}: {what}: expected one of {', '.join(sorted(choices))}, got {shown(value)}")


def check_activation(path: Path, config: dict[str, Any], allowed: Sequence[str]) -> None:
    """CheckpointError if a config names an activation function that we do not support for its architecture. Otherwise
    such an SAE would load and give wrong latents."""
    for key in ("activation_fn", "activation_fn_str", "activation"):
        if config.get(key) is not None and not (isinstance(config[key], str) and config[key] in allowed):
            raise CheckpointError(
                f"{path}: {key}: expected {' or '.join(allowed)} for this architecture, got {shown(config[key])}, which"
                " is not supported: the latents would differ"
            )


def hook_site(path: Path, name: Any) -> Site | None:
    """The site for a hook name from a config; None stays None."""
    named = text(path, "hook name", name)
    return None if named is None else Site.from_hook_name(named)
