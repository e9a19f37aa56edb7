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

PRE_BYTES = 1 << 26  # dense pre-activations held at once
GATHERED = 1 << 14  # decoder rows dequantised at once


def screen_codes(screen: Screen, W_enc: Tensor) -> Codes:
    """The first digit of a screen as nested codes of the rows of W_enc [d_in, d_sae], its columns times
    `screen.scales`.  Rows that the screen leaves to refinement have no code in it, and get their own here."""
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
    """Rows that are read one by one: the decoder's, one a feature."""

    def forward(self, index: Tensor) -> Tensor:
        """Rows int64 [n] → fp32 [n, in_features]; the bytes of other rows are not used."""
        if self.extra_precision:
            return self.weight[index]
        return self.packed.rows(index, self.bits, self.mode)


class MatryoshkaSAE(Coder):
    """The SAE f = relu(z) · (z > threshold), x̂ = f · W_dec + b_dec with W_enc and W_dec sliced to any width.

    encoder: codes of W_encᵀ [d_sae, d_in] and b_enc; decoder: codes of W_dec [d_sae, d_out]; one scale and zero point a
    feature unless grouped.  `gsf.set_bits(sae, 4)` or `gsf.set_bits(sae, {"encoder": 8, "decoder": 4})` changes the
    widths.  Biases and thresholds stay fp32.  activations: "exact", or "int8": tokens rounded about `encoder.mean`.
    It encodes, decodes and attaches as a JumpReLUSAE; its own answer is that of the sliced weights, not of the SAE that
    it was made from.

    scales: fp32 [d_in] or None, powers of two: the encoder's codes are of W_enc's rows times them, activations are
    divided by them first, both exactly.
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
        """Min–max codes of an SAE's rows.  mean [d_in]: about which int8 activations are rounded (default b_dec).

        screen: the encoder's code is the one that the SAE's certified screen reads (one scale a row, dimensions
        balanced by `scales`), prepared now or stored with the SAE: a file that holds the screen holds this code.
        ValueError for a coder that is not a plain JumpReLU SAE, and for groups of the screen's code.
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

    # ---- the weights that serve now -------------------------------------------------------------------

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        """[d_in, d_sae] at the encoder's width: a new fp32 tensor at each access."""
        rows = self.encoder.weight
        return (rows if self.scales is None else rows / self.scales).t()

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """[d_sae, d_out] at the decoder's width: a new fp32 tensor at each access."""
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

        screen: None or False; its code is another use of the same rows.  ValueError for True, for a bandwidth (an SAE
        of codes is not trained), a precision other than "exact", a wrong d_in or device; TypeError for integer or
        complex x.
        """
        if precision != "exact":
            raise ValueError(f"precision: expected 'exact' for a MatryoshkaSAE (rows of codes), got {precision!r}")
        if screen or bandwidth is not None:
            raise ValueError("screen, bandwidth: expected neither for a MatryoshkaSAE, whose rows are codes already")
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
        """Reconstruction fp32 [..., d_out]; reads the rows that fired and no others.

        Dense latents that need a gradient are decoded by a dense product: zeros have gradients too.
        """
        check_latents(latents, self.d_sae, self.device)
        if isinstance(latents, Tensor) and derivative_wanted(latents):
            return self._decode_dense(latents)
        if isinstance(latents, Tensor):
            latents = SparseLatents.from_dense(latents)
        # a token may hold more than GATHERED latents, and is then a part of its own
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
        # ascending, so that a token's features are summed in their order
        rows, col = torch.unique(latents.col_indices[start:end].long(), return_inverse=True)
        values = latents.values[start:end].float()
        return ops.decode(crow, col.to(torch.int32), values, self.decoder(rows), self.b_dec, None)

    # ---- files ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Write codes, biases, thresholds and the configuration; gives the size in bytes."""
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
        """The inverse of `save`.  CheckpointError where the file holds something else or its arrays disagree."""
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
        # a cast moves the SAE; near a threshold rounded biases would decide otherwise
        kept = {name: getattr(self, name) for name in ("b_dec", "threshold", "scales")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if before is not None:
                setattr(self, name, before.to(getattr(self, name).device))
        return self
