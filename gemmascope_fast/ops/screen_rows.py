"""Op `screen_rows`: the two 8-bit digits of an encoder's rows, and their error bounds.

For a row w with scale s and zero point z: w = s (code - z) + e and e = s2 (code2 - 128) + e2.  The first digit is
the 8-bit min–max code of `ops.codes.quantize`, per channel.  Norms are summed in fp64 and rounded up.
`screen_terms` defines all constants and names; docs/how/screen.md derives them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemmascope_fast.ops._library import Cost, register
from gemmascope_fast.ops.screen_terms import (
    CANCEL,
    DOT_LOSS,
    HUGE,
    LEAST_GIVEN,
    MOST_BIAS,
    MOST_GIVEN,
    MOST_SCALE,
    SUM_UP,
    TILE_COLUMNS,
    TILE_ROWS,
    TINY,
    UNDERFLOW,
    UP,
    Row,
    direction_steps,
    dot_kappa,
    start_steps,
    table_stride,
)

SCHEMA = (
    "screen_rows(Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? centre, bool second_digit,"
    " Tensor? directions=None, Tensor? scales=None, Tensor? given=None, Tensor? given_scale=None,"
    " Tensor? given_zero=None)"
    " -> (Tensor code, Tensor code2, Tensor table)"
)
BLOCK = 1024  # rows processed at a time in fp64


def _padded(n: int, step: int) -> int:
    return -(-n // step) * step


def up32(v: Tensor) -> Tensor:
    """fp64 → the smallest fp32 that is not below it."""
    near = v.float()
    return torch.where(near.double() >= v, near, torch.nextafter(near, torch.full_like(near, math.inf)))


def screen_rows_reference(
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    centre: Tensor | None,
    second_digit: bool,
    directions: Tensor | None = None,
    scales: Tensor | None = None,
    given: Tensor | None = None,
    given_scale: Tensor | None = None,
    given_zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc [d_in, d_sae], b_enc and threshold [d_sae], centre fp32 [d_in] or None, directions fp32 [k, d_in] or None;
    scales fp32 [d_in] or None, powers of two from 1 to 2^20: the columns of W_enc are multiplied by them before coding,
    the entries of the activations are divided by them, and the directions are in that scaled space.
    given uint8 [d_sae, d_in], given_scale fp32 [d_sae], given_zero uint8 [d_sae]: a first digit made elsewhere (a
    trained code), used instead of the rows' own; its error is measured in the same way.
    Returns code and code2 uint8 [⌈d_sae/4⌉, ⌈d_in/64⌉, 4, 64] (code2 [0, …] without the second digit): tiles of four
    rows (`rows_of` undoes the tiling), zeros in rows beyond d_sae; and the table fp32 [9 + k, table_stride(d_sae)],
    whose last k rows are the encoder's products with the directions.  A row whose norm or bias is out of range has
    START = +inf and is never discarded.  Norms may differ from the native kernel's in their last bits.
    """
    d, F = W_enc.shape
    width, stride = _padded(d, TILE_COLUMNS), table_stride(F)
    device = W_enc.device
    if scales is not None and not bool(
        ((scales.frexp().mantissa == 0.5) & (scales >= 1) & (scales <= MOST_SCALE)).all()
    ):
        raise ValueError("scales: expected powers of two from 1 to 2^20")
    if (given is None) != (given_scale is None) or (given is None) != (given_zero is None):
        raise ValueError("given: expected a code with its scale and zero, or none of them")
    for name, tensor, dtype, shape in (
        ("given", given, torch.uint8, (F, d)),
        ("given_scale", given_scale, torch.float32, (F,)),
        ("given_zero", given_zero, torch.uint8, (F,)),
    ):
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    tiled = _padded(F, TILE_ROWS)
    code = torch.zeros(tiled, width, dtype=torch.uint8, device=device)
    code2 = torch.zeros(tiled if second_digit else 0, width, dtype=torch.uint8, device=device)
    V = W_enc.new_empty(0, d, dtype=torch.float64) if directions is None else directions.double()
    s = torch.ones(d, device=device) if scales is None else scales
    mu = None if centre is None else centre.double() / s
    table = torch.zeros(len(Row) + V.shape[0], stride, device=device)
    table[Row.START, F:] = -math.inf
    for start in range(0, F, BLOCK):
        rows = slice(start, min(F, start + BLOCK))
        out = (code[rows], code2[rows] if second_digit else None, table[:, rows])
        code_of = None
        if given is not None and given_scale is not None and given_zero is not None:
            code_of = given[rows].float(), given_scale[rows], given_zero[rows].float()
        _block(W_enc[:, rows].t().float() * s, b_enc[rows].double(), threshold[rows].double(), mu, V, code_of, out)
    return tiles(code), tiles(code2), table


def tiles(rows: Tensor) -> Tensor:
    """uint8 [d_sae, width], both multiples of the tile → [d_sae/4, width/64, 4, 64]; four rows form one stream."""
    return rows.reshape(-1, TILE_ROWS, rows.shape[1] // TILE_COLUMNS, TILE_COLUMNS).transpose(1, 2).contiguous()


def rows_of(tiles: Tensor) -> Tensor:
    """The inverse of `tiles`."""
    return tiles.transpose(1, 2).reshape(tiles.shape[0] * TILE_ROWS, -1)


def _block(
    w: Tensor,
    b: Tensor,
    theta: Tensor,
    mu: Tensor | None,
    V: Tensor,
    given: tuple[Tensor, Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    code, code2, table = out
    d = w.shape[1]
    w64 = w.double()
    norm = w64.norm(dim=1) * SUM_UP
    mu64 = torch.zeros(d, dtype=torch.float64, device=w.device) if mu is None else mu.double()
    centred = b + w64 @ mu64
    projected = w64 @ V.t()
    across = projected.norm(dim=1) * SUM_UP
    good = (norm >= TINY) & (norm <= HUGE) & (across <= HUGE) & (b.abs() <= MOST_BIAS) & (centred.abs() <= MOST_BIAS)
    if given is not None:
        good &= (given[1] >= LEAST_GIVEN) & (given[1] <= MOST_GIVEN)
    w = torch.where(good[:, None], w, 1.0)  # any rows that can be coded: the table says that they are not used
    w64 = w.double()
    if given is None:
        s = (w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)) / 255
        zero = (-w.amin(1).clamp(max=0) / s).round()
        c = ((w / s[:, None]).round() + zero[:, None]).clamp(0, 255)
    else:
        c, s, zero = given
        s = torch.where(good, s, 1.0)
    e = w64 - s.double()[:, None] * (c - zero[:, None]).double()
    tau = theta.clamp(min=0)
    k = V.shape[0]
    beta = dot_kappa(d) * b.abs() + start_steps(k) * (centred.abs() + tau) + d * UNDERFLOW
    beta = (beta + DOT_LOSS * (b.abs() + norm * mu64.norm() * SUM_UP)) * (UP + direction_steps(k))
    made = torch.zeros_like(table)
    made[Row.SCALE], made[Row.ZERO] = s, zero
    made[Row.ERROR] = up32((e.norm(dim=1) * SUM_UP + CANCEL * norm) * UP)
    made[Row.NORM] = up32(torch.maximum(norm, across) * UP)
    made[Row.CENTRED_BIAS] = centred.float()
    made[len(Row) :] = projected.t().float()
    made[Row.SLACK] = up32(beta)
    made[Row.START] = up32(centred.float().double() + up32(beta).double() - tau)
    code[:, :d] = torch.where(good[:, None], c, 0.0).to(torch.uint8)
    code[:, d:] = torch.where(good, zero, 0.0).to(torch.uint8)[:, None]
    if code2 is not None:
        s2 = e.float().abs().amax(1) / 127
        per = torch.where(s2 > 1e-30, 1 / s2, 0.0)
        c2 = (e.float() * per[:, None]).round().clamp(-127, 127)
        left = e - s2.double()[:, None] * c2.double()
        made[Row.SCALE2] = s2
        made[Row.ERROR2] = up32((left.norm(dim=1) * SUM_UP + CANCEL * norm) * UP)
        code2[:, :d] = torch.where(good[:, None], c2 + 128, 0.0).to(torch.uint8)
        code2[:, d:] = torch.where(good, 128, 0).to(torch.uint8)[:, None]
    never = torch.zeros_like(table)
    never[Row.START] = math.inf
    table.copy_(torch.where(good, made, never))


def _fake(
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    centre: Tensor | None,
    second_digit: bool,
    directions: Tensor | None = None,
    scales: Tensor | None = None,
    *_given: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d, F = W_enc.shape
    k = 0 if directions is None else directions.shape[0]
    tiles, shape = -(-F // TILE_ROWS), (-(-d // TILE_COLUMNS), TILE_ROWS, TILE_COLUMNS)
    return (
        W_enc.new_empty(tiles, *shape, dtype=torch.uint8),
        W_enc.new_empty(tiles if second_digit else 0, *shape, dtype=torch.uint8),
        W_enc.new_empty(len(Row) + k, table_stride(F), dtype=torch.float32),
    )


def _cost(
    W_enc: Tensor, b_enc: Tensor, threshold: Tensor, centre: Tensor | None, second_digit: bool, *_: object
) -> Cost:
    made = (2 if second_digit else 1) * W_enc.numel()
    return Cost(bytes=W_enc.numel() * W_enc.element_size() + made, flops=20 * W_enc.numel())


screen_rows = register(SCHEMA, screen_rows_reference, _fake, _cost)
