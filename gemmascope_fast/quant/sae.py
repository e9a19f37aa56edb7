"""`MatryoshkaSAE`: an SAE whose encoder and decoder rows are slices of nested codes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from gemmascope_fast import ops
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.ops._csr import check_columns, from_mask, row_indices
from gemmascope_fast.ops._transforms import derivative_wanted
from gemmascope_fast.ops.codes import Codes, check_mode, quantize
from gemmascope_fast.ops.latents import SparseLatents, check_latents
from gemmascope_fast.ops.screen_rows import Row, rows_of
from gemmascope_fast.quant import storage
from gemmascope_fast.quant.linear import MatryoshkaLinear, MatryoshkaMatrix
from gemmascope_fast.quant.planes import Packed
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.config import SAEConfig, SAEMetadata
from gemmascope_fast.sae.jumprelu import JumpReLUSAE
from gemmascope_fast.sae.screen import Screen
from gemmascope_fast.sae.sites import Site

PRE_BYTES = 1 << 26  # size of dense pre-activations held at a time
GATHERED = 1 << 14  # decoder rows dequantised at a time


def screen_codes(screen: Screen, W_enc: Tensor) -> Codes:
    """The screen's first digit as nested codes of W_enc [d_in, d_sae] by rows, with columns times `screen.scales`.
    Rows that the screen always computes exactly have no usable code in it, and are coded here."""
    d, F = W_enc.shape
    q = rows_of(screen.code)[:F, :d].contiguous()
    scale, zero = screen.table[Row.SCALE, :F, None].clone(), screen.table[Row.ZERO, :F, None].to(torch.uint8)
    without = (screen.table[Row.START, :F] == torch.inf).nonzero()[:, 0]
    if without.numel():
        rows = W_enc[:, without].t().float()
        own = quantize(rows if screen.scales is None else rows * screen.scales)
        q[without], scale[without], zero[without] = own.q, own.scale, own.zero_point
    return Codes(q, scale, zero)


class MatryoshkaRows(MatryoshkaMatrix):
    """Rows that are read individually: those of the decoder, one per feature."""

    def forward(self, index: Tensor) -> Tensor:
        """Rows int64 [n] → fp32 [n, in_features]; bytes of other rows are not used."""
        if self.extra_precision:
            return self.weight[index]
        return self.packed.rows(index, self.bits, self.mode)


class MatryoshkaSAE(Coder):
    """The SAE f = relu(z) · (z > threshold), x̂ = f · W_dec + b_dec with W_enc and W_dec sliced to any width.

    encoder: codes of W_encᵀ [d_sae, d_in] and b_enc. decoder: codes of W_dec [d_sae, d_out]. They have one scale and
    zero point per feature unless grouped.  `gsf.set_bits(sae, 4)` or `gsf.set_bits(sae, {"encoder": 8, "decoder": 4})`
    changes the widths.  Biases and thresholds stay fp32.  activations: "exact", or "int8" (tokens minus `encoder.mean`,
    rounded). It encodes, decodes and attaches like a JumpReLUSAE. Its results are those of the sliced weights, not
    those of the SAE it was made from.

    scales: fp32 [d_in] or None, powers of two. The encoder's codes are of W_enc's rows times the scales, and
    activations are first divided by them; both are exact.
    """

    encoder: MatryoshkaLinear
    decoder: MatryoshkaRows
    threshold: Tensor  # type: ignore[assignment]
    b_dec: Tensor  # type: ignore[assignment]
    scales: Tensor | None

    def __init__(
        self,
        encoder: MatryoshkaLinear,
        decoder: MatryoshkaRows,
        b_dec: Tensor,
        threshold: Tensor,
        cfg: SAEConfig | None = None,
        scales: Tensor | None = None,
    ) -> None:
        super().__init__()
        d_sae, d_in, d_out = encoder.out_features, encoder.in_features, decoder.in_features
        if decoder.out_features != d_sae or encoder.bias is None:
            raise ValueError(f"decoder: expected {d_sae} rows and an encoder with a bias, got {decoder.out_features}")
        vectors = (("b_dec", b_dec, d_out), ("threshold", threshold, d_sae), ("scales", scales, d_in))
        for name, vector, size in vectors:
            if vector is not None and vector.shape != (size,):
                raise ValueError(f"{name}: expected [{size}], got {tuple(vector.shape)}")
        self.cfg = cfg or SAEConfig(d_in, d_sae, d_out)
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("b_dec", b_dec.detach().float().clone())
        self.register_buffer("threshold", threshold.detach().float().clone())
        self.register_buffer("scales", None if scales is None else scales.detach().float().clone())

    @classmethod
    def from_sae(
        cls,
        sae: JumpReLUSAE,
        group_size: int | None = None,
        *,
        bits: int = 8,
        mode: str = "prefix",
        activations: str = "exact",
        mean: Tensor | None = None,
        screen: bool = False,
    ) -> MatryoshkaSAE:
        """Min–max codes of an SAE's rows.  mean [d_in]: subtracted before int8 rounding of activations (default b_dec).

        screen: use the code of the SAE's certified screen for the encoder (one scale a row, dimensions balanced by
        `scales`). It is prepared now, or was stored with the SAE: a file that has the screen has this code.
        ValueError for a coder that is not a plain JumpReLU SAE, or if groups are requested with the screen's code.
        """
        if type(sae) is not JumpReLUSAE:
            raise ValueError(f"sae: expected a JumpReLU SAE, got a {type(sae).__name__} of kind {sae.kind!r}")
        check_mode(mode)
        scales = None
        if screen:
            if group_size is not None:
                raise ValueError(f"group_size: the screen's code has one scale a row, got groups of {group_size}")
            made = sae.prepare().screen_cache.screen
            assert made is not None
            codes, scales = screen_codes(made, sae.W_enc.detach()), made.scales
        else:
            codes = quantize(sae.W_enc.t(), group_size)
        centre = (sae.b_dec if mean is None else mean).to(sae.device)
        encoder = MatryoshkaLinear(Packed.of(codes, mode), sae.b_enc, bits, mode, activations=activations, mean=centre)
        if scales is not None and encoder.mean is not None:
            encoder.mean.div_(scales)
        decoder = MatryoshkaRows(Packed.of(quantize(sae.W_dec, group_size), mode), bits, mode)
        return cls(encoder, decoder, sae.b_dec, sae.threshold, copy.deepcopy(sae.cfg), scales).to(sae.device)

    # ---- the weights at the current width -------------------------------------------------------------

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """[d_in, d_sae] at the encoder's current width: a new fp32 tensor at each access."""
        rows = self.encoder.weight
        return (rows if self.scales is None else rows / self.scales).t()

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """[d_sae, d_out] at the decoder's current width: a new fp32 tensor at each access."""
        return self.decoder.weight

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        assert self.encoder.bias is not None
        return self.encoder.bias

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    # ---- encode and decode ----------------------------------------------------------------------------

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        """x [..., d_in], any floating dtype → SparseLatents of the sliced SAE, values fp32.

        screen: None or False, because the rows are codes already.  Raises ValueError for True, for a bandwidth (an SAE
        of codes cannot be trained), a precision other than "exact", a wrong d_in or device; TypeError for integer or
        complex x.
        """
        if precision != "exact":
            raise ValueError(f"precision: expected 'exact' for a MatryoshkaSAE (rows of codes), got {precision!r}")
        if screen or bandwidth is not None:
            raise ValueError("screen, bandwidth: a MatryoshkaSAE supports neither: its rows are codes already")
        flat = self._tokens(x).float()
        flat = flat if self.scales is None else flat / self.scales
        at_once = max(1, PRE_BYTES // (4 * self.d_sae))
        parts = [self._fire(self.encoder(part)) for part in flat.split(at_once)]
        whole = SparseLatents.cat(parts)
        return SparseLatents(whole.crow_indices, whole.col_indices, whole.values, (*x.shape[:-1], self.d_sae))

    def _fire(self, z: Tensor) -> SparseLatents:
        crow, col = from_mask((z > self.threshold.clamp(min=0)) | z.isnan())
        return SparseLatents(crow, col, z[row_indices(crow), col.long()], tuple(z.shape))

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Reconstruction fp32 [..., d_out]; reads only the rows that fired.

        Dense latents that need a gradient are decoded by a dense product, because zeros have gradients too.
        """
        check_latents(latents, self.d_sae, self.device)
        if isinstance(latents, Tensor) and derivative_wanted(latents):
            return self._decode_dense(latents)
        if isinstance(latents, Tensor):
            latents = SparseLatents.from_dense(latents)
        # a token may have more than GATHERED latents; it is then a part by itself
        part_of = latents.crow_indices[:-1].div(GATHERED, rounding_mode="floor")
        sizes = torch.unique_consecutive(part_of, return_counts=True)[1].tolist()
        parts, first = [], 0
        for size in sizes:
            parts.append(self._decode_rows(latents, first, first + size))
            first += size
        whole = torch.cat(parts) if parts else self.b_dec.new_empty(0, self.cfg.d_out)
        return whole.reshape(*latents.shape[:-1], self.cfg.d_out)

    def _decode_rows(self, latents: SparseLatents, first: int, last: int) -> Tensor:
        start, end = int(latents.crow_indices[first]), int(latents.crow_indices[last])
        crow = latents.crow_indices[first : last + 1] - start
        check_columns(latents.col_indices[start:end], self.d_sae)
        # ascending, so that a token's features are added in order
        rows, col = torch.unique(latents.col_indices[start:end].long(), return_inverse=True)
        values = latents.values[start:end].float()
        return ops.decode(crow, col.to(torch.int32), values, self.decoder(rows), self.b_dec, None)

    # ---- files ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Write codes, biases, thresholds and the configuration; returns the size in bytes."""
        beside = {"encoder.bias": self.b_enc, "b_dec": self.b_dec, "threshold": self.threshold}
        if self.encoder.mean is not None:
            beside["encoder.mean"] = self.encoder.mean
        if self.scales is not None:
            beside["scales"] = self.scales
        site, metadata = self.cfg.site, self.cfg.metadata
        about = {
            "kind": "matryoshka_sae",
            "activations": self.encoder.activations,
            "hook_name": None if site is None else site.hook_name,
            "metadata": asdict(metadata),
        }
        return storage.save(path, {"encoder": self.encoder.packed, "decoder": self.decoder.packed}, beside, about)

    @classmethod
    def load(cls, path: str | Path) -> MatryoshkaSAE:
        """The inverse of `save`.  CheckpointError if the file is of another kind or its arrays disagree."""
        held, beside, about = storage.load(path)
        if about.get("kind") != "matryoshka_sae":
            raise CheckpointError(f"{path}: expected a MatryoshkaSAE, got {about.get('kind')!r}")
        try:
            encoder = MatryoshkaLinear(
                held["encoder"],
                beside["encoder.bias"],
                activations=about["activations"],
                mean=beside.get("encoder.mean"),
            )
            decoder = MatryoshkaRows(held["decoder"])
            cfg = SAEConfig(encoder.in_features, encoder.out_features, decoder.in_features)
            cfg.metadata = SAEMetadata(**about["metadata"])
            cfg.site = None if about["hook_name"] is None else Site.from_hook_name(about["hook_name"])
            return cls(encoder, decoder, beside["b_dec"], beside["threshold"], cfg, beside.get("scales"))
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: arrays of a MatryoshkaSAE disagree: {error}") from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MatryoshkaSAE:
        # a cast moves the SAE but keeps fp32: near a threshold, rounded biases would change which features fire
        kept = {name: getattr(self, name) for name in ("b_dec", "threshold", "scales")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if before is not None:
                setattr(self, name, before.to(getattr(self, name).device))
        return self
