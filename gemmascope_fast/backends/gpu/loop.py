"""The fused loop of a decode step: encode → edit → decode → residual add, with nothing read back to the host.

It takes two launches in CUDA C++ (encode; then a kernel whose blocks compact the token's bitmap in shared memory,
decode and add), and three in Triton (encode, gather, decode and add), where programs cannot compact in shared memory.
Each 16-bit vector (and x in CUDA) is widened by one more small launch, so keep b_enc, b_dec and threshold in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemmascope_fast.backends.gpu import register
from gemmascope_fast.backends.gpu.decode import AHEAD, CONFIGS, MANY
from gemmascope_fast.backends.gpu.encode import FEW, FLOATS, FixedLatents, encode_fixed, widenable
from gemmascope_fast.backends.gpu.launch import cdiv, grid, kernels, on
from gemmascope_fast.errors import BackendError
from gemmascope_fast.ops._library import requested
from gemmascope_fast.ops.encode import check_encode

SCALE, CLAMP, ADD, MIN_CLAMP = range(4)  # same values in kernels/splice.py and csrc/cuda/splice.cu
BLOCK = CONFIGS[0].BLOCK


@dataclass(frozen=True)
class EditTable:
    """Edits of single features for every token, in the form that the kernels read; features ascending, each once."""

    features: Tensor  # int32 [edits]
    kind: Tensor  # int32 [edits]
    amount: Tensor  # fp32 [edits]
    d_sae: int  # features must be below it: the device does not check

    @classmethod
    def of(cls, entries: Iterable[tuple[int, int, float]], d_sae: int, device: torch.device | str = "cpu") -> EditTable:
        """Build from (feature, kind, amount) entries; kind is one of SCALE, CLAMP, ADD and MIN_CLAMP.

        Raises ValueError if two entries name the same feature, IndexError for a feature not below d_sae.
        """
        rows: dict[int, tuple[int, float]] = {}
        for feature, kind, amount in entries:
            if feature in rows:
                raise ValueError(f"edits: expected one edit per feature, got two of feature {feature}")
            rows[feature] = kind, amount
        features = sorted(rows)
        if features and features[-1] >= d_sae:
            raise IndexError(f"edits: expected features in [0, {d_sae}), got {features[-1]}")
        return cls(
            torch.tensor(features, dtype=torch.int32, device=device),
            torch.tensor([rows[f][0] for f in features], dtype=torch.int32, device=device),
            torch.tensor([rows[f][1] for f in features], dtype=torch.float32, device=device),
            d_sae,
        )


def splice(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    edits: EditTable | None = None,
    error: bool = False,
    capacity: int | None = None,
) -> tuple[Tensor, FixedLatents]:
    """x [T <= 16, d] → (fp32 [T, d_out], the latents before edits), without host synchronisation.

    error False: decode(latents) + Σ delta · W_dec; True: x + Σ delta · W_dec, or just x if nothing changes.
    capacity: how many latents fit; the default T · d_sae cannot overflow.  Rows that do not fit become NaN, and
    `FixedLatents.sparse` raises.
    """
    edits = EditTable.of((), W_enc.shape[1], x.device) if edits is None else edits
    _check(x, W_enc, b_enc, threshold, W_dec, b_dec, edits, error)
    capacity = x.shape[0] * W_enc.shape[1] if capacity is None else capacity
    if capacity < 0:
        raise ValueError(f"capacity: expected 0 or more, got {capacity}")
    if _backend() == "cuda":
        out, crow, col, values = torch.ops.gemmascope_fast_cuda.splice(
            x, W_enc, b_enc, threshold, W_dec, b_dec, edits.features, edits.kind, edits.amount, error, capacity
        )
        return out, FixedLatents(crow, col, values, W_enc.shape[1])
    latents = encode_fixed(x, W_enc, b_enc, threshold, capacity)
    return _decode(x, latents, W_dec, b_dec, edits, error), latents


def _backend() -> str:
    wanted = requested()
    if wanted == "cuda" and not register.compiled("splice"):
        raise BackendError(f"backend 'cuda' cannot run splice: {register.missing('splice', 'cuda')}")
    return "cuda" if wanted != "triton" and register.compiled("splice") else "triton"


def _check(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    edits: EditTable,
    error: bool,
) -> None:
    check_encode(x, W_enc, b_enc, threshold, None)
    if not 1 <= x.shape[0] <= FEW:
        raise ValueError(f"x: expected from 1 to {FEW} tokens, got {x.shape[0]}")
    if W_dec.dtype not in FLOATS:
        raise TypeError(f"W_dec: expected float32, bfloat16 or float16, got {W_dec.dtype}")
    if W_dec.dim() != 2 or W_dec.shape[0] != W_enc.shape[1] or b_dec.shape != W_dec.shape[1:]:
        raise ValueError(
            f"W_dec, b_dec: expected [d_sae = {W_enc.shape[1]}, d_out] and [d_out],"
            f" got {tuple(W_dec.shape)} and {tuple(b_dec.shape)}"
        )
    if error and W_dec.shape[1] != x.shape[1]:
        raise ValueError(f"W_dec: expected d_out = {x.shape[1]} with the error term, got {W_dec.shape[1]}")
    if edits.d_sae != W_enc.shape[1]:
        raise ValueError(f"edits: expected a table for d_sae = {W_enc.shape[1]}, got one for {edits.d_sae}")


def _decode(x: Tensor, latents: FixedLatents, W_dec: Tensor, b_dec: Tensor, edits: EditTable, error: bool) -> Tensor:
    module = kernels("splice", x, latents.values, W_dec, b_dec, edits.features, edits.kind, edits.amount)
    (T, _), d = x.shape, W_dec.shape[1]
    out = torch.empty(T, d, device=x.device)
    with on(x):
        module.splice_kernel[grid(T * cdiv(d, BLOCK), "splice")](
            widenable(x).float() if error else out, latents.crow_indices, latents.col_indices, latents.values,
            W_dec.contiguous(), b_dec.float().contiguous(), edits.features, edits.kind, edits.amount, out, T, d,
            latents.capacity, edits.features.numel(),
            ERROR=error, BLOCK=BLOCK, AHEAD=AHEAD, MANY=MANY, num_warps=CONFIGS[0].warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out
