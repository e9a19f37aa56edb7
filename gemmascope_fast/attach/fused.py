"""The fused loop (gpu/loop.py) in attach: encodes, edits and decodes a generated token in two or three launches.

It runs only if it gives the same bytes as the separate steps that it replaces:

- modes "splice" and "splice+error", no gradient needed, up to 16 rows a call, all selected by `tokens`;
- no edits in "splice", or edits of features (Scale, Ablate, Clamp, Add, MinClamp) for every row, one per feature; no
  Mask, no Direction;
- an SAE that reads and writes one site, with fp32 weights in memory (with 16-bit weights the separate steps round);
- tensors on a GPU, or Triton's interpreter requested by name.
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
MOST_ENTRIES = 1 << 22  # latents that the loop allocates room for: 32 MiB, freed within the hook
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations: a sum with float64 would not be in fp32


def edit_table(edits: Iterable[FeatureEdit], d_sae: int, device: torch.device | str = "cpu") -> loop.EditTable:
    """Convert Scale, Ablate, Clamp, Add and MinClamp to what the fused loop reads; their selections are ignored.

    Raises TypeError for other edits, ValueError if two name one feature, IndexError for one not below d_sae.
    """
    return loop.EditTable.of(((f, *_entry(edit)) for edit in edits for f in edit.features), d_sae, device)


def _entry(edit: FeatureEdit) -> tuple[int, float]:
    if isinstance(edit, Scale):
        return loop.SCALE, edit.factor
    if isinstance(edit, Ablate):
        return loop.CLAMP, 0.0  # not multiplication by 0, which would turn an infinite latent into NaN
    if isinstance(edit, Clamp):
        return loop.CLAMP, edit.value
    if isinstance(edit, Add):
        return loop.ADD, edit.strength
    if isinstance(edit, MinClamp):
        return loop.MIN_CLAMP, edit.value
    raise TypeError(f"edits: expected Scale, Ablate, Clamp, Add or MinClamp, got {type(edit).__name__}")


class Fused:
    """The fused loop of one tap: `encode` runs it when the site is read, `result` returns its output at the write."""

    def __init__(self, tap: Tap, edits: list[FeatureEdit]) -> None:
        self.tap, self.edits = tap, edits
        self.table: tuple[Any, Any] | None = None  # with the edits' numbers when it was made: these may change

    @classmethod
    def of(cls, tap: Tap) -> Fused | None:
        """None if the tap can never use the fused loop."""
        given = [] if tap.plan is None else tap.plan.edits
        edits = [e for e in given if isinstance(e, FeatureEdit) and type(e) in PLAIN]
        features = [f for e in edits for f in e.features]
        one_site = tap.writes is tap.reads and not tap.reads.form and tap.entry.part is None and len(tap.sources) == 1
        nothing = not given and tap.state.mode == "splice+error"  # x passes unchanged: there is no decode to fuse
        if not tap.splices or not one_site or nothing or len(edits) < len(given) or len(set(features)) < len(features):
            return None
        return cls(tap, edits)

    def encode(self, sae: Coder, x: Tensor, rows: Tensor, call: Call) -> SparseLatents | None:
        """Latents of rows [n, d], the activation x at the site; None if the separate steps must run."""
        if not self._serves(sae, rows, call):
            return None
        key = (rows.device, [(e.features, e.amount) for e in self.edits])
        if self.table is None or self.table[0] != key:
            self.table = key, edit_table(self.edits, sae.d_sae, rows.device)
        error = self.tap.state.mode == "splice+error"
        weights = sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec
        out, fixed = loop.splice(rows, *weights, self.table[1], error)
        call.interim.fused[self.tap] = x, out
        found = fixed.sparse()
        # copied: a slice would keep the memory allocated for the maximum number of latents
        col, values = found.col_indices.clone(), found.values.clone()
        return SparseLatents(found.crow_indices, col, values, tuple(found.shape))

    def result(self, x: Tensor, call: Call) -> Tensor | None:
        """The replacement for x, [n, d_out] in x's dtype; None if the loop did not run, or if its error term belongs to
        another activation, because something wrote at the site in between."""
        read, out = call.interim.fused.pop(self.tap, (None, None))
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
