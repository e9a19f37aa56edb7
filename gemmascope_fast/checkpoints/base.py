"""The dataclass that every checkpoint format returns: arrays that are not read yet, and what describes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.fields import integer, json_object, shown, text
from gemmascope_fast.files.regular import read_small
from gemmascope_fast.sae.sites import Site

REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
SINGLE = ("sae", "topk_sae", "transcoder", "skip_transcoder")
MULTI = ("cross_layer_transcoder", "crosscoder")
KINDS = SINGLE + MULTI


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
    k: for a top-k SAE without thresholds.
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
    k: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    format: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CheckpointError(f"{self.path}: kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.k is not None and self.kind != "topk_sae":
            raise CheckpointError(
                f"{self.path}: k: only a topk_sae has one, got k = {shown(self.k)} of kind {self.kind}"
            )
        if self.kind in MULTI:
            if not self.layers:
                raise CheckpointError(f"{self.path}: a {self.kind} without layers")
            return
        names = set(REQUIRED) | ({"W_skip"} if self.kind == "skip_transcoder" else set())
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
        want["W_skip"] = (d_in, d_out)
        for name, entry in self.arrays.items():
            if entry.shape != want.get(name, entry.shape):
                raise CheckpointError(f"{self.path}: {name}: expected {want[name]}, got {entry.shape}")
        if self.kind in ("sae", "topk_sae") and d_in != d_out:
            raise CheckpointError(f"{self.path}: W_dec: expected d_out = d_in = {d_in} for an SAE, got {d_out}")
        if self.kind == "topk_sae":
            integer(self.path, "k", self.k, 1, d_sae)

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
