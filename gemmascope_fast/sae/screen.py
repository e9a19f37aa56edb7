"""The certified screen: 8-bit rows that prove which features stay below threshold, so that only the rest are computed.

docs/how/screen.md derives the bound; `ops.screen_rows` builds what is kept per feature, `ops.encode_screened` uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemmascope_fast import backends, ops
from gemmascope_fast.errors import StaleScreenError
from gemmascope_fast.ops.screen_terms import MOST_DIRECTIONS, MOST_INPUTS, Row, table_stride

if TYPE_CHECKING:
    from gemmascope_fast.ops.codes import Codes

BLOCK = 1024  # rows hashed at a time
MASSIVE = 50.0  # times the median entry: Gemma's massive dimensions are hundreds of times it, the next ones 10 to 20
MOST_MASSIVE = 2
SCALE_REACH = 6  # scales stay within 2^±6 of their median: a dead dimension says nothing


@dataclass(frozen=True)
class Screen:
    """What the screen of one encoder keeps.

    code, code2: uint8 [⌈d_sae/4⌉, ⌈d_in/64⌉, 4, 64], the rows' two digits in tiles; code2 None without the second.
    table: fp32 [9 + k, table_stride(d_sae)] of `ops.screen_rows`.  centre: fp32 [d_in] or None, the fixed μ.
    scales: fp32 [d_in] or None, powers of two from 1 up: the rows' columns are multiplied by them before they are
    rounded, the activations' entries divided.  directions: fp32 [k, d_in] or None, of the scaled activations, taken out
    of them before they are rounded and added exactly.
    """

    code: Tensor
    code2: Tensor | None
    table: Tensor
    centre: Tensor | None
    directions: Tensor | None = None
    scales: Tensor | None = None

    @classmethod
    def build(
        cls,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        *,
        centre: Tensor | None = None,
        second_digit: bool = True,
        directions: Tensor | None = None,
        scales: Tensor | None = None,
        codes: Codes | None = None,
    ) -> Screen:
        """From W_enc [d_in, d_sae], b_enc and threshold [d_sae]; any of float32, bfloat16 and float16.

        centre: [d_in] near the mean of the activations; the nearer, the fewer features are left.  Answers do not
        depend on it.  second_digit: another byte a weight that takes away nearly all false candidates.
        directions: [k, d_in], k up to 128, along which activations vary most (`principal_directions`); what lies along
        them is multiplied in fp32, so that the int8 digits hold the rest alone.  They are made orthonormal.
        scales: [d_in], powers of two from 1 to 2^20 (`balancing_scales`).
        codes: nested codes of W_encᵀ, one scale a row, e.g. trained ones, as the first digit in place of the rows'
        own; the bound has their error as measured against these weights.
        Raises ValueError for d_in above 66,000, for a centre, directions, scales or codes of another shape or with
        entries that are not finite, for other scales, and for codes in groups.
        """
        if W_enc.shape[0] > MOST_INPUTS:
            raise ValueError(f"W_enc: the screen takes d_in up to {MOST_INPUTS}, got {W_enc.shape[0]}")
        if centre is not None:
            if centre.shape != W_enc.shape[:1]:
                raise ValueError(f"centre: expected [d_in = {W_enc.shape[0]}], got {tuple(centre.shape)}")
            # a copy: the caller may edit its own, b_dec say
            centre = _finite(centre.detach().to(W_enc.device, torch.float32, copy=True).contiguous(), "centre")
        if scales is not None:
            if scales.shape != W_enc.shape[:1]:
                raise ValueError(f"scales: expected [d_in = {W_enc.shape[0]}], got {tuple(scales.shape)}")
            scales = scales.detach().to(W_enc.device, torch.float32, copy=True).contiguous()
        if directions is not None:
            directions = _finite(directions.detach(), "directions")
            directions = directions if scales is None else directions / scales.to(directions.device)
            directions = _orthonormal(directions, W_enc.shape[0]).to(W_enc.device)
        # where the rows lie, which may be host memory (`JumpReLUSAE.pin_rows`)
        b_enc, threshold = b_enc.to(W_enc.device), threshold.to(W_enc.device)
        with torch.no_grad():
            code, code2, table = ops.screen_rows(
                W_enc, b_enc, threshold, centre, second_digit, directions, scales, *_first_digit(codes, W_enc.device)
            )
        return cls(code, code2 if second_digit else None, table, centre, directions, scales)

    def encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        digits: int = 0,
        bandwidth: float | None = None,
        mapped: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(crow_indices, col_indices, values fp32): the bytes of `ops.encode` on the same arguments.

        mapped: W_enc lies in a mapped file, whose pages are announced before they are read.
        Raises StaleScreenError where a refined pair lies outside its bound: the weights are not those of the build.
        """
        return _certified(*self.call(x, W_enc, b_enc, threshold, digits, bandwidth, mapped))

    def encode_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        per_batch: bool = False,
        digits: int = 0,
        mapped: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(crow_indices, col_indices, values fp32): the bytes of `ops.encode_topk` on the same arguments.

        The screen must have been built with thresholds of at most 0.  Raises as `encode`.
        """
        kept = (self.code, self.code2, self.table, self.centre)
        return _certified(
            *ops.encode_topk_screened(
                x, W_enc, b_enc, k, *kept, digits, self.directions, mapped, self.scales, per_batch
            )
        )

    def mirrored(self, W_enc: Tensor, b_enc: Tensor) -> Screen:
        """The screen of the same rows for -b_enc and for activations of the opposite sign.  The codes are shared."""
        centre = None if self.centre is None else -self.centre
        two = self.code2 is not None
        with torch.no_grad():
            *_codes, table = ops.screen_rows(
                W_enc, -b_enc, torch.zeros_like(b_enc), centre, two, self.directions, self.scales
            )
        return replace(self, table=table, centre=centre)

    def call(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        threshold: Tensor,
        digits: int = 0,
        bandwidth: float | None = None,
        mapped: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`ops.encode_screened` with all that the screen keeps, its statistics unread.

        The tensors belong together: a screen with scales or directions proves nothing without them.
        """
        kept = (self.code, self.code2, self.table, self.centre)
        weights = (W_enc, b_enc, threshold)
        return ops.encode_screened(x, *weights, *kept, digits, bandwidth, self.directions, mapped, self.scales)

    def tensors(self) -> dict[str, Tensor]:
        """What there is of code, code2, table, centre, directions and scales, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in named.items() if t is not None}

    def digest(self) -> str:
        """sha256 of the tensors: a stored screen that was damaged must not decide anything."""
        return _sha256(self.tensors().values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())


def _certified(crow: Tensor, col: Tensor, values: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latents, where every refined pair lay within its bound."""
    _survivors, refined, violations, _rest = stats.tolist()
    if violations:
        raise StaleScreenError(
            f"{violations} of {refined} refined pairs lie outside the screen's bound: the weights were changed in a"
            " way that nobody can see; call sae.prepare(force=True) after such an edit"
        )
    return crow, col, values


def _first_digit(codes: Codes | None, device: torch.device) -> tuple[Tensor, ...]:
    """What op `screen_rows` takes of codes: (q, scale fp32, zero), one scale a row; nothing where there are none."""
    if codes is None:
        return ()
    if codes.group_size is not None:
        raise ValueError(f"codes: expected one scale a row, got groups of {codes.group_size}")
    q, scale, zero = (t.to(device) for t in (codes.q, codes.scale[:, 0].float(), codes.zero_point[:, 0]))
    return q.contiguous(), scale.contiguous(), zero.contiguous()


def principal_directions(sample: Tensor, k: int) -> Tensor:
    """fp32 [k, d_in]: the k directions of greatest variance of activations [N, d_in] (their covariance, in fp64)."""
    x = sample.double()
    x = x - x.mean(0)
    _values, vectors = torch.linalg.eigh(x.t() @ x)  # ascending
    return vectors[:, -k:].flip(1).t().float().contiguous()


def massive_dimensions(mean: Tensor) -> Tensor | None:
    """fp32 [k, d_in]: unit vectors of up to MOST_MASSIVE entries of a mean activation [d_in] that stand out from it, or
    None.

    A residual stream's massive dimensions are large in every token but not equally large, so that they decide the scale
    of the digits.  On Gemma 3 270M's layer 12 (b_dec's entry 163 is 12,700, its others are below 800) taking out the
    one brought the false candidates of 1,024 tokens from 18.5 to 5.8 % of all pairs, the encode from 27.2 to 20.4 ms.
    """
    size = mean.abs()
    most = size.topk(min(MOST_MASSIVE, size.numel())).indices
    found = most[size[most] > MASSIVE * size.median()]
    return torch.nn.functional.one_hot(found, size.numel()).float() if found.numel() else None


def balancing_scales(W_enc: Tensor, spread: Tensor, massive: Tensor | None = None) -> Tensor:
    """fp32 [d_in], powers of two from 1 up to 2^12: (spread of the activations / size of the rows)^(3/8) in each
    dimension of W_enc [d_in, d_sae], rounded.

    The bound multiplies the norms of rows and activations with those of the other's rounding.  ‖x/s‖‖w·s‖ is least for
    the power 1/2, rounding errors for less; between 1/4 and 1/2 it mattered little.  A scale only moves the bound,
    never an answer.  spread: [d_in], a sample's standard deviations or `decoder_spread`.  massive: [k, d_in] unit
    vectors of dimensions that are taken out: nothing is left of the activation there, and they keep the common scale,
    since ‖x‖ with them stands in the bound too.
    """
    steps = (0.375 * (spread.to(W_enc.device) / _column_size(W_enc.t())).log2()).nan_to_num(0.0, 99.0, -99.0)
    steps = (steps - steps.median()).round().clamp(-SCALE_REACH, SCALE_REACH)
    if massive is not None:
        steps[massive.bool().any(0).to(steps.device)] = 0.0
    return torch.exp2(steps - steps.min())


def decoder_spread(W_dec: Tensor) -> Tensor:
    """fp32 [d_in]: the mean square of what an SAE's features [d_sae, d_in] write into each dimension.

    A stand-in for the activations' standard deviation.  Squared, since features write into every dimension what the
    largest hold, which flattens their profile.
    """
    return _column_size(W_dec).square()


def _column_size(rows: Tensor) -> Tensor:
    """Root mean square of each column of rows [d_sae, d_in], fp32."""
    squares = torch.zeros(rows.shape[1], device=rows.device)
    for block in rows.detach().split(BLOCK):
        squares += block.float().square().sum(0)
    return squares.div_(max(1, rows.shape[0])).sqrt_()


def _orthonormal(directions: Tensor, d_in: int) -> Tensor:
    """The same span in rows fp32 [k, d_in] of unit length."""
    k = directions.shape[0] if directions.dim() == 2 else 0
    if directions.shape != (k, d_in) or not 0 < k <= min(MOST_DIRECTIONS, d_in):
        raise ValueError(
            f"directions: expected [k, d_in = {d_in}] with k up to {min(MOST_DIRECTIONS, d_in)},"
            f" got {tuple(directions.shape)}"
        )
    basis, _ = torch.linalg.qr(directions.double().t())
    return basis.t().float().contiguous()


def _finite(t: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(t).all()):
        raise ValueError(f"{name}: expected finite values")
    return t


def most_bytes(d_in: int, d_sae: int) -> int:
    """Bytes of a screen with what it has unless told, for an encoder of these dimensions."""
    code = 4 * -(-d_sae // 4) * 64 * -(-d_in // 64)
    return 2 * code + 4 * ((len(Row) + MOST_MASSIVE) * table_stride(d_sae) + (1 + MOST_MASSIVE) * d_in)


def weights_digest(W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> str:
    """sha256 of what a screen depends on: dtype, shape and bytes of the rows, biases and thresholds."""
    return _sha256((W_enc.detach().t(), b_enc.detach(), threshold.detach()))


def _sha256(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
        for start in range(0, t.shape[0], BLOCK):
            block = t[start : start + BLOCK].contiguous().cpu()
            digest.update(block.view(torch.uint8).numpy().data if block.numel() else b"")
    return digest.hexdigest()


def pays(x: Tensor, W_enc: Tensor) -> bool:
    """Whether the screened encode of x [N, d_in] is faster than the full one, once built.

    On CPU it was at 640 × 4,096, 2,304 × 16,384 and × 65,536, and 3,584 × 16,384, from 1 to 1,024 tokens.
    The reference screens nothing, so without the extension, or where another backend is asked for, there is nothing to
    gain.
    """
    native = backends.NATIVE_MISSING is None and backends.requested() in (None, "native")
    return native and x.device.type == "cpu" and W_enc.shape[0] <= MOST_INPUTS
