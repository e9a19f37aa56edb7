"""For tests and benchmarks: calibrated SAEs, error bounds, and the one order of summation written a second time.

`emulate_dot` and `emulate_decode` follow the fixed order of summation (docs/how/exact.md) in numpy alone, with every
fused multiply-add rounded once by error-free transformation; they share no code with the kernels, so equality of bytes
is evidence.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.ops.encode import kappa
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

# Share of the centred energy that the first n directions of Gemma 3 270M's layer-12 residual stream hold.
SPECTRUM = ((16, 0.47), (64, 0.78), (128, 0.92), (256, 0.98))
MASSIVE_DIMENSION, MASSIVE_VALUE, CENTRED_NORM = 163, 11.7e3, 6.2e3


# ---- synthetic SAEs and activations -----------------------------------------------------------------


def make_activations(seed: int, tokens: int, d: int, world: int = 0, massive: float = MASSIVE_VALUE) -> Tensor:
    """fp32 [tokens, d] with the spectrum, the mean and the one massive dimension of a Gemma residual stream.

    `world` fixes mean and directions, `seed` the tokens: SAE and text of one world belong together.
    """
    basis = torch.Generator().manual_seed(1000 + world)
    mean = _mean(d, massive, basis)
    x = mean.expand(tokens, d).clone()
    own = torch.Generator().manual_seed(seed)
    before, held = 0, 0.0
    for upto, share in SPECTRUM:
        count = min(upto, d) - before
        if count > 0:
            directions = torch.randn(count, d, generator=basis) / math.sqrt(d)
            spread = CENTRED_NORM * math.sqrt((share - held) / count)
            x += spread * torch.randn(tokens, count, generator=own) @ directions
        before, held = min(upto, d), share
    return x + CENTRED_NORM * math.sqrt(1 - held) / math.sqrt(d) * torch.randn(tokens, d, generator=own)


def _mean(d: int, massive: float, basis: torch.Generator) -> Tensor:
    mean = torch.randn(d, generator=basis) * (2.6e3 / math.sqrt(d))
    mean[MASSIVE_DIMENSION % d] = massive
    return mean


def make_sae(
    seed: int, d: int, F: int, l0: float, dtype: torch.dtype = torch.float32, world: int = 0, d_out: int | None = None
) -> JumpReLUSAE:
    """A random SAE of which about l0 features fire on a token of `make_activations(…, d, world)`.

    Encoder rows are unit vectors that lean on the activations' directions; the bias takes out the mean, as in
    trained SAEs, so that large products cancel; thresholds sit where l0 of F features pass them.
    """
    g = torch.Generator().manual_seed(seed)
    sample = make_activations(seed + 1, 128, d, world)
    mean = activations_mean(d, world)
    rows = leaning_rows(g, F, sample - mean)
    bias = -(rows @ mean)
    z = make_activations(seed + 2, 256, d, world) @ rows.t() + bias
    scale = z.std(dim=0)
    cut = standard_cut(z, scale, l0 / F)
    if d_out:
        decoder = torch.randn(F, d_out, generator=g) / math.sqrt(d_out)
    else:
        decoder = rows + 0.01 * torch.randn(F, d, generator=g)
    return JumpReLUSAE(
        rows.to(dtype).t(),
        decoder.to(dtype),
        bias.to(dtype),
        (torch.zeros(d_out) if d_out else mean).to(dtype),
        (cut * scale).to(dtype),
    )


def activations_mean(d: int, world: int = 0) -> Tensor:
    """The mean of `make_activations(…, d, world)`, fp32 [d]."""
    return _mean(d, MASSIVE_VALUE, torch.Generator().manual_seed(1000 + world))


def leaning_rows(g: torch.Generator, F: int, centred: Tensor) -> Tensor:
    """Unit rows, fp32 [F, d], that lean on the directions of centred activations [n, d]."""
    n, d = centred.shape
    lean = torch.randn(F, n, generator=g) @ centred / (CENTRED_NORM * math.sqrt(n))
    rows = torch.randn(F, d, generator=g) / math.sqrt(d) + lean
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def standard_cut(z: Tensor, scale: Tensor, share: float) -> Tensor:
    """What this share of z / scale exceeds, at least 0; z [tokens, F], scale [F]."""
    standard = (z / scale.clamp_min(1e-30)).flatten()
    rank = max(1, min(standard.numel(), round(standard.numel() * (1 - share))))
    # kthvalue on a sample: a few million numbers settle the quantile
    step = max(1, standard.numel() // 4_000_000)
    part = standard[::step]
    return part.kthvalue(max(1, min(part.numel(), round(rank / step)))).values.clamp_min(0)


# ---- error bounds -----------------------------------------------------------------------------------


def pre_activations64(x: Tensor, sae: JumpReLUSAE) -> Tensor:
    """z = x @ W_enc + b_enc in fp64, [N, d_sae], from the values that fp32 sees."""
    return _product64(x, sae.W_enc, sae.b_enc)


def _product64(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.float().double() @ W_enc.detach().double() + b_enc.detach().double()


def dot_bound(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """fp64 [N, d_sae]: how far the fixed order's fp32 z may lie from the exact one, κ(Σ|x||w| + |b|) and underflow."""
    d = x.shape[-1]
    size = x.float().double().abs() @ W_enc.detach().double().abs() + b_enc.detach().double().abs()
    return kappa(d) * size + (d + 16) * 2.0**-149


FEATURES_AT_ONCE = 1 << 16  # fp64 copies of a million rows would take three times what the rows take


@dataclass
class SupportCheck:
    """How a support compares with fp64: `wrong` pairs outside the bound, `unsure` pairs within it, the largest
    share of the bound that a stored value's error takes."""

    wrong: int
    unsure: int
    worst_value: float

    @property
    def equal(self) -> bool:
        return self.wrong == 0 and self.worst_value <= 1


def compare_support(latents: SparseLatents, x: Tensor, sae: JumpReLUSAE) -> SupportCheck:
    """Latents of finite x [N, d_in] against an fp64 evaluation, pair by pair."""
    wrong = unsure = 0
    worst = 0.0
    blocks = itertools.product(range(0, x.shape[0], 64), range(0, sae.d_sae, FEATURES_AT_ONCE))
    for start, first in blocks:
        part, ours = x[start : start + 64], latents[start : start + 64].detach()
        here = slice(first, first + FEATURES_AT_ONCE)
        W, b, tau = sae.W_enc[:, here], sae.b_enc[here], sae.threshold[here].detach().double().clamp(min=0)
        z, bound = _product64(part, W, b), dot_bound(part, W, b)
        columns = ours.col_indices.long() - first
        inside = (columns >= 0) & (columns < len(b))
        at = (ours.row_indices()[inside], columns[inside])
        stored = torch.zeros_like(z, dtype=torch.bool)
        stored[at] = True
        sure = (z - tau).abs() > bound
        wrong += int((stored != (z > tau))[sure].sum())
        unsure += int((~sure).sum())
        if len(at[0]):
            worst = max(worst, float(((ours.values[inside].double() - z[at]).abs() / bound[at]).max()))
    return SupportCheck(wrong, unsure, worst)


def support_equal(latents: SparseLatents, x: Tensor, sae: JumpReLUSAE) -> bool:
    """The support equals fp64's wherever |z − θ| exceeds the bound of the dot, and values lie within it."""
    return compare_support(latents, x, sae).equal


# ---- the one order of summation, a second time ------------------------------------------------------


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """round_fp32(a·b + c), rounded once, for fp32 arrays.

    The product is exact in fp64.  The sum is rounded to odd there (its error by two-sum; 53 ≥ 2·24 + 2 bits),
    and rounding that to fp32 is then rounding the exact sum.
    """
    with np.errstate(all="ignore"):
        p, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        s = np.asarray(p + c64)
        back = s - p
        lost = (p - (s - back)) + (c64 - back)
        bits = s.view(np.int64)
        outward = np.where((lost > 0) == (s > 0), 1, -1)
        adjust = np.isfinite(s) & np.isfinite(lost) & (lost != 0) & ((bits & 1) == 0)
        odd = np.where(adjust, bits + outward, bits).view(np.float64)
        return odd.astype(np.float32)


def _numpy32(t: Tensor) -> np.ndarray:
    return t.detach().float().numpy()


def emulate_dot(x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None) -> np.ndarray:
    """Section 3a's z, fp32 [N, F], of x [N, d], W_enc [d, F], b_enc [F]: 16 lanes by fma, folds 8-4-2-1, bias last."""
    a, w = _numpy32(x), _numpy32(W_enc).T
    (n, d), f = a.shape, w.shape[0]
    padded = -(-d // 16) * 16
    a, w = (np.pad(m, ((0, 0), (0, padded - d))) for m in (a, w))
    acc = np.zeros((n, f, 16), np.float32)
    for k in range(0, padded, 16):
        acc = fma32(a[:, None, k : k + 16], w[None, :, k : k + 16], acc)
    with np.errstate(all="ignore"):
        for half in (8, 4, 2, 1):
            acc = acc[..., :half] + acc[..., half : 2 * half]
        z = acc[..., 0]
        return z if b_enc is None else z + _numpy32(b_enc)


def emulate_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, bandwidth: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What op `encode` must give, byte for byte."""
    z = emulate_dot(x, W_enc, b_enc)
    theta = _numpy32(threshold)
    with np.errstate(all="ignore"):
        keep = ~(z <= np.maximum(theta, np.float32(0)))
        if bandwidth is not None:
            keep |= np.abs(z - theta) < np.float32(bandwidth / 2)
    crow = np.zeros(z.shape[0] + 1, np.int64)
    crow[1:] = keep.sum(1).cumsum()
    values = z[keep]
    values[np.isnan(values)] = np.float32(np.nan)
    col = np.nonzero(keep)[1].astype(np.int32)
    return torch.from_numpy(crow), torch.from_numpy(col), torch.from_numpy(values)


def emulate_decode(
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """What op `decode` must give: features ascending by fma per output element, the bias last."""
    offsets, features, v = crow.numpy(), col.numpy(), _numpy32(values)
    w = _numpy32(W_dec)
    if row_scale is not None:
        v = v * _numpy32(row_scale)[features]
    out = np.zeros((len(offsets) - 1, w.shape[1]), np.float32)
    for n in range(len(offsets) - 1):
        for i in range(offsets[n], offsets[n + 1]):
            out[n] = fma32(np.broadcast_to(v[i], w.shape[1:]), w[features[i]], out[n])
    if b_dec is not None:
        with np.errstate(all="ignore"):
            out = out + _numpy32(b_dec)
    return torch.from_numpy(out)


# ---- comparing and forcing --------------------------------------------------------------------------


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes as integers of its width, so that equality is of bytes (NaN equals the same NaN)."""
    t = t.detach().contiguous()
    if not t.is_floating_point():
        return t
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bytes(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> bool:
    """Equal shapes, dtypes and bytes, of tensors or of sequences of them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(bits(a), bits(b)))
    return len(a) == len(b) and all(same_bytes(p, q) for p, q in zip(a, b, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch, and so every kernel here, uses this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
