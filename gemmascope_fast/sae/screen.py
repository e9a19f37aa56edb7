"""The certified screen: 8-bit rows prove which features stay below threshold, and only the rest are computed.

docs/how/screen.md derives the bound. `ops.screen_rows` builds the screen, `ops.encode_screened` uses it.
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
MASSIVE = 50.0  # times the median entry; Gemma's massive dimensions are hundreds of times it, the next 10 to 20
MOST_MASSIVE = 2
SCALE_REACH = 6  # scales stay within 2^±6 of their median, so that a dead dimension cannot get an extreme one


@dataclass(frozen=True)
class Screen:
    """What the screen stores for one encoder.

    code, code2: uint8 [⌈d_sae/4⌉, ⌈d_in/64⌉, 4, 64], first and second digit of the rows, in tiles. code2 may be None.
    table: fp32 [9 + k, table_stride(d_sae)], see `ops.screen_rows`.  centre: fp32 [d_in] or None, the fixed μ.
    scales: fp32 [d_in] or None, powers of two ≥ 1. Before rounding, the columns of the rows are multiplied by them and
    the entries of the activations are divided by them.  directions: fp32 [k, d_in] or None, in the scaled space. They
    are removed from the activations before rounding, and their part is added back exactly.
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
        """Build from W_enc [d_in, d_sae], b_enc and threshold [d_sae] in float32, bfloat16 or float16.

        The options affect speed only, never results.
        centre: [d_in], near the mean of the activations. The nearer it is, the fewer features are left to compute.
        second_digit: a second byte per weight, which removes nearly all false candidates.
        directions: [k, d_in], k up to 128, along which activations vary most (`principal_directions`). The part along
        them is computed in fp32, so that the int8 digits hold only the rest. They are made orthonormal.
        scales: [d_in], powers of two from 1 to 2^20 (`balancing_scales`).
        codes: nested codes of W_encᵀ with one scale a row (e.g. trained), used as first digit instead of our
        own. Their error is measured against these weights and enters the bound.
        Raises ValueError for d_in above 66,000; for a centre, directions, scales or codes of wrong shape or with
        values that are not finite; for scales out of range; and for codes in groups.
        """
        if W_enc.shape[0] > MOST_INPUTS:
            raise ValueError(f"W_enc: the screen takes d_in up to {MOST_INPUTS}, got {W_enc.shape[0]}")
        if centre is not None:
            if centre.shape != W_enc.shape[:1]:
                raise ValueError(f"centre: expected [d_in = {W_enc.shape[0]}], got {tuple(centre.shape)}")
            # a copy, because the caller may edit the original (for example b_dec)
            centre = _finite(centre.detach().to(W_enc.device, torch.float32, copy=True).contiguous(), "centre")
        if scales is not None:
            if scales.shape != W_enc.shape[:1]:
                raise ValueError(f"scales: expected [d_in = {W_enc.shape[0]}], got {tuple(scales.shape)}")
            scales = scales.detach().to(W_enc.device, torch.float32, copy=True).contiguous()
        if directions is not None:
            directions = _finite(directions.detach(), "directions")
            directions = directions if scales is None else directions / scales.to(directions.device)
            directions = _orthonormal(directions, W_enc.shape[0]).to(W_enc.device)
        # on the device where the rows are stored, which may be host memory (`JumpReLUSAE.pin_rows`)
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
        """(crow_indices, col_indices, values fp32), byte for byte those of `ops.encode` with the same arguments.

        mapped: W_enc is in a mapped file; its pages are prefetched before they are read.
        Raises StaleScreenError if an exact pre-activation is outside its bound: the weights changed since the build.
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
        """(crow_indices, col_indices, values fp32), byte for byte those of `ops.encode_topk` with the same arguments.

        The screen must have been built with thresholds of at most 0.  Raises the same errors as `encode`.
        """
        kept = (self.code, self.code2, self.table, self.centre)
        return _certified(
            *ops.encode_topk_screened(
                x, W_enc, b_enc, k, *kept, digits, self.directions, mapped, self.scales, per_batch
            )
        )

    def mirrored(self, W_enc: Tensor, b_enc: Tensor) -> Screen:
        """A screen of the same rows for -b_enc and for activations of opposite sign.  The codes are shared."""
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
        """Call `ops.encode_screened` with this screen's tensors, without reading its statistics.

        The tensors belong together: a screen with scales or directions is wrong without them.
        """
        kept = (self.code, self.code2, self.table, self.centre)
        weights = (W_enc, b_enc, threshold)
        return ops.encode_screened(x, *weights, *kept, digits, bandwidth, self.directions, mapped, self.scales)

    def tensors(self) -> dict[str, Tensor]:
        """Those of code, code2, table, centre, directions and scales that this screen has, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in named.items() if t is not None}

    def digest(self) -> str:
        """sha256 of the tensors. A stored screen that was damaged must not be used."""
        return _sha256(self.tensors().values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())


def _certified(crow: Tensor, col: Tensor, values: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents if every exact pre-activation was within its bound."""
    _survivors, refined, violations, _rest = stats.tolist()
    if violations:
        raise StaleScreenError(
            f"{violations} of {refined} pre-activations are outside the screen's bound: the weights were edited in a"
            " way that PyTorch's version counter does not show; call sae.prepare(force=True) after such an edit"
        )
    return crow, col, values


def _first_digit(codes: Codes | None, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of op `screen_rows` for codes: (q, scale fp32, zero), one scale a row; empty without codes."""
    if codes is None:
        return ()
    if codes.group_size is not None:
        raise ValueError(f"codes: expected one scale a row, got groups of {codes.group_size}")
    q, scale, zero = (t.to(device) for t in (codes.q, codes.scale[:, 0].float(), codes.zero_point[:, 0]))
    return q.contiguous(), scale.contiguous(), zero.contiguous()


def principal_directions(sample: Tensor, k: int) -> Tensor:
    """fp32 [k, d_in]: the k directions of greatest variance of activations [N, d_in] (from their fp64 covariance)."""
    x = sample.double()
    x = x - x.mean(0)
    _values, vectors = torch.linalg.eigh(x.t() @ x)  # ascending
    return vectors[:, -k:].flip(1).t().float().contiguous()


def massive_dimensions(mean: Tensor) -> Tensor | None:
    """fp32 [k, d_in]: unit vectors of up to MOST_MASSIVE dimensions in which a mean activation [d_in] is unusually
    large, or None.

    The massive dimensions of a residual stream are large in every token, but not equally large, so they determine the
    scale of the digits. In Gemma 3 270M's layer 12, entry 163 of b_dec is 12,700 and the others are below 800. Removing
    that one reduced the false candidates of 1,024 tokens from 18.5 to 5.8 % of pairs, the encode from 27.2 to 20.4 ms.
    """
    size = mean.abs()
    most = size.topk(min(MOST_MASSIVE, size.numel())).indices
    found = most[size[most] > MASSIVE * size.median()]
    return torch.nn.functional.one_hot(found, size.numel()).float() if found.numel() else None


def balancing_scales(W_enc: Tensor, spread: Tensor, massive: Tensor | None = None) -> Tensor:
    """fp32 [d_in], powers of two from 1 to 2^12: (spread of the activations / size of the rows)^(3/8) in each
    dimension of W_enc [d_in, d_sae], rounded to a power of two.

    The bound multiplies the norm of each side (rows, activations) by the norm of the other side's rounding error.
    ‖x/s‖‖w·s‖ is smallest for the power 1/2, rounding errors for less; between 1/4 and 1/2 it made little difference.
    A scale changes only the bound, never a result.  spread: [d_in], a sample's standard deviations or
    `decoder_spread`.  massive: [k, d_in] unit vectors of dimensions that are removed. The activation has nothing left
    there, so they keep the common scale, because ‖x‖ with them is in the bound too.
    """
    steps = (0.375 * (spread.to(W_enc.device) / _column_size(W_enc.t())).log2()).nan_to_num(0.0, 99.0, -99.0)
    steps = (steps - steps.median()).round().clamp(-SCALE_REACH, SCALE_REACH)
    if massive is not None:
        steps[massive.bool().any(0).to(steps.device)] = 0.0
    return torch.exp2(steps - steps.min())


def decoder_spread(W_dec: Tensor) -> Tensor:
    """fp32 [d_in]: the mean square of what the features of an SAE [d_sae, d_in] write into each dimension.

    It replaces the standard deviation of the activations. It is squared because features also write into each
    dimension some of what belongs to the largest ones, which flattens the profile.
    """
    return _column_size(W_dec).square()


def _column_size(rows: Tensor) -> Tensor:
    """Root mean square of each column of rows [d_sae, d_in], fp32."""
    squares = torch.zeros(rows.shape[1], device=rows.device)
    for block in rows.detach().split(BLOCK):
        squares += block.float().square().sum(0)
    return squares.div_(max(1, rows.shape[0])).sqrt_()


def _orthonormal(directions: Tensor, d_in: int) -> Tensor:
    """An orthonormal basis of the same span, fp32 [k, d_in]."""
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
    """Bytes of a screen with default options for an encoder of these dimensions."""
    code = 4 * -(-d_sae // 4) * 64 * -(-d_in // 64)
    return 2 * code + 4 * ((len(Row) + MOST_MASSIVE) * table_stride(d_sae) + (1 + MOST_MASSIVE) * d_in)


def weights_digest(W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> str:
    """sha256 of everything a screen depends on: dtype, shape and bytes of the rows, biases and thresholds."""
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
