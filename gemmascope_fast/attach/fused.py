"""The fused loop (gpu/loop.py) inside attach: a decoded token's encode, edits and decode in two or three launches.

It serves where it gives the bytes of the steps that it replaces, and steps aside everywhere else:

- modes "splice" and "splice+error", no gradient asked for, up to 16 rows a call, none left out by `tokens`;
- no edits in "splice", or edits of features (Scale, Ablate, Clamp, Add, MinClamp) for every row, one a feature; no
  Mask, no Direction;
- an SAE that reads and writes one site, with fp32 weights in memory (with 16-bit ones the steps round in between);
- tensors on a GPU, or Triton's interpreter asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemmascope_fast.attach.calls import Call
from gemmascope_fast.attach.edits import Ablate, Add, Clamp, FeatureEdit, MinClamp, Scale
from gemmascope_fast.backends.gpu import loop
from gemmascope_fast.backends.gpu.encode import FEW
from gemmascope_fast.backends.gpu.launch import interpreted
from gemmascope_fast.ops._library import in_dtype, requested
from gemmascope_fast.ops._transforms import derivative_wanted
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.rows import Rows

if TYPE_CHECKING:
    from gemmascope_fast.attach.taps import Tap

PLAIN = (Scale, Ablate, Clamp, Add, MinClamp)
MOST_ENTRIES = 1 << 22  # latents that the loop makes room for: 32 MiB, given back within the hook
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations: a sum with float64 ones is not fp32's


def edit_table(edits: Iterable[FeatureEdit], d_sae: int, device: torch.device | str = "cpu") -> loop.EditTable:
    """What the fused loop reads of Scale, Ablate, Clamp, Add and MinClamp; their selections are not kept.

    Raises TypeError for other edits, ValueError where two name one feature, IndexError for one beyond d_sae.
    """
    return loop.EditTable.of(((f, *_entry(edit)) for edit in edits for f in edit.features), d_sae, device)


def _entry(edit: FeatureEdit) -> tuple[int, float]:
    if isinstance(edit, Scale):
        return loop.SCALE, edit.factor
    if isinstance(edit, Ablate):
        return loop.CLAMP, 0.0  # not a product with 0: an infinite latent would become NaN
    if isinstance(edit, Clamp):
        return loop.CLAMP, edit.value
    if isinstance(edit, Add):
        return loop.ADD, edit.strength
    if isinstance(edit, MinClamp):
        return loop.MIN_CLAMP, edit.value
    raise TypeError(f"edits: expected Scale, Ablate, Clamp, Add or MinClamp, got {type(edit).__name__}")


class Fused:
    """One tap's fused loop: `encode` runs it while the site is read, `result` is what it left for the write."""

    def __init__(self, tap: Tap, edits: list[FeatureEdit]) -> None:
        self.tap, self.edits = tap, edits
        self.table: tuple[Any, Any] | None = None  # of the edits as they were: numbers may change between calls

    @classmethod
    def of(cls, tap: Tap) -> Fused | None:
        """None where the tap can never be served."""
        given = [] if tap.plan is None else tap.plan.edits
        edits = [e for e in given if isinstance(e, FeatureEdit) and type(e) in PLAIN]
        features = [f for e in edits for f in e.features]
        one_site = tap.writes is tap.reads and not tap.reads.form and tap.entry.part is None and len(tap.sources) == 1
        nothing = not given and tap.state.mode == "splice+error"  # what comes goes on: there is no decode to fuse
        if not tap.splices or not one_site or nothing or len(edits) < len(given) or len(set(features)) < len(features):
            return None
        return cls(tap, edits)

    def encode(self, sae: Coder, x: Tensor, rows: Tensor, call: Call) -> SparseLatents | None:
        """Latents of rows [n, d], of what passes at the site as x; None where the steps must serve."""
        if not self._serves(sae, rows, call):
            return None
        key = (rows.device, [(e.features, e.amount) for e in self.edits])
        if self.table is None or self.table[0] != key:
            self.table = key, edit_table(self.edits, sae.d_sae, rows.device)
        error = self.tap.state.mode == "splice+error"
        weights = sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec
        out, fixed = loop.splice(rows, *weights, self.table[1], error)
        call.scratch["fused", self.tap] = x, out
        found = fixed.sparse()
        # copied: a slice would keep the room for everything that might have fired
        col, values = found.col_indices.clone(), found.values.clone()
        return SparseLatents(found.crow_indices, col, values, tuple(found.shape))

    def result(self, x: Tensor, call: Call) -> Tensor | None:
        """What is to go on in place of x, [n, d_out] in x's dtype; None where the loop did not run, or where the
        error term is that of another activation: somebody wrote at the site in between."""
        read, out = call.scratch.pop(("fused", self.tap), (None, None))
        if out is None or (self.tap.state.mode == "splice+error" and read is not x):
            return None
        return in_dtype(out if out.device == x.device else out.to(x.device), x.dtype)

    def _serves(self, sae: Coder, rows: Tensor, call: Call) -> bool:
        wanted = requested()
        there = wanted in (None, "triton", "cuda") if rows.is_cuda else wanted == "triton" and interpreted()
        n = rows.shape[0]
        return (
            there
            and call.chosen is None
            and 1 <= n <= FEW
            and n * sae.d_sae <= MOST_ENTRIES
            and rows.dtype in DTYPES
            and not torch.is_grad_enabled()
            and not derivative_wanted(rows)
            and self.tap.state.path is None
            and type(sae) is JumpReLUSAE
            and sae.dtype == torch.float32
            and type(sae.rows) is Rows
            and all(edit.everywhere for edit in self.edits)
        )
