"""Coders of more than one site: cross-layer transcoders and crosscoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast import ops
from gemmascope_fast.ops._exact import exact_product, outside_autocast
from gemmascope_fast.ops._library import expect_tensor
from gemmascope_fast.ops.latents import SparseLatents, check_latents
from gemmascope_fast.sae.config import SAEMetadata
from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUTranscoder
from gemmascope_fast.sae.sites import Site


@dataclass
class MultiSiteConfig:
    """d_in and d_sae of one layer, and the sites read and written, in layer order (None if unknown)."""

    d_in: int
    d_sae: int
    n_layers: int
    sites: tuple[Site | None, ...]
    sites_out: tuple[Site | None, ...]
    metadata: SAEMetadata = field(default_factory=SAEMetadata)


class CrossLayerTranscoder(nn.Module):
    """Cross-layer transcoder: latents of layer i read site i and write to the outputs of layers i, i+1, …, n-1.

    `f_i = jumprelu(x_i @ W_enc[i] + b_enc[i])`,
    `x̂_l = Σ_{i ≤ l} f_i @ W_dec[i][:, l - i] + b_dec[l]  (+ x_l @ W_skip[l])`

    `layers[i]` is a JumpReLUTranscoder. Its W_dec is [d_sae, (n - i) · d], with the outputs side by side, and its
    b_dec is layer i's bias followed by zeros. So one sparse decode computes all outputs.
    """

    kind = "cross_layer_transcoder"

    def __init__(
        self, layers: Sequence[JumpReLUSAE], W_skip: Sequence[Tensor] | None = None, cfg: MultiSiteConfig | None = None
    ) -> None:
        super().__init__()
        n, d = len(layers), layers[0].d_in if layers else 0
        for i, layer in enumerate(layers):
            if (layer.cfg.d_in, layer.cfg.d_out) != (d, (n - i) * d):
                raise ValueError(
                    f"layers[{i}]: expected d_in {d} and d_out {(n - i) * d}, got {layer.cfg.d_in}, {layer.cfg.d_out}"
                )
        if not n:
            raise ValueError("layers: expected at least one")
        for i, skip in enumerate(W_skip or ()):
            if skip.shape != (d, d):
                raise ValueError(f"W_skip[{i}]: expected [{d}, {d}], got {tuple(skip.shape)}")
        self.layers = nn.ModuleList(layers)
        self.W_skip = nn.ParameterList(nn.Parameter(s.detach()) for s in W_skip) if W_skip else None
        if W_skip and len(W_skip) != n:
            raise ValueError(f"W_skip: expected one for each of {n} layers, got {len(W_skip)}")
        sites = tuple(layer.cfg.site for layer in layers)
        self.cfg = cfg or MultiSiteConfig(
            d, layers[0].d_sae, n, sites, tuple(layer.cfg.site_out for layer in layers), layers[0].cfg.metadata
        )

    @classmethod
    def from_weights(
        cls,
        *,
        W_enc: Sequence[Tensor],
        W_dec: Sequence[Tensor],
        b_enc: Sequence[Tensor],
        b_dec: Sequence[Tensor],
        threshold: Sequence[Tensor],
        W_skip: Sequence[Tensor] | None = None,
    ) -> CrossLayerTranscoder:
        """Build from one tensor per layer: `W_enc[i]` is [d, d_sae], `W_dec[i]` [d_sae, n, d] (only outputs i and later
        are used) or [d_sae, n - i, d], `b_enc[i]` and `threshold[i]` [d_sae], `b_dec[i]` [d], `W_skip[i]` [d, d].
        """
        n, layers = len(W_enc), []
        for i in range(n):
            decoder, d = W_dec[i], W_enc[i].shape[0]
            if decoder.dim() != 3 or decoder.shape[1] not in (n, n - i) or decoder.shape[2] != d:
                raise ValueError(f"W_dec[{i}]: expected [d_sae, {n} or {n - i}, {d}], got {tuple(decoder.shape)}")
            decoder = decoder[:, decoder.shape[1] - (n - i) :].reshape(decoder.shape[0], -1)
            bias = torch.nn.functional.pad(b_dec[i], (0, decoder.shape[1] - d))
            layers.append(JumpReLUTranscoder(W_enc[i], decoder, b_enc[i], bias, threshold[i]))
        return cls(layers, W_skip)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._layer(0).dtype

    def _layer(self, i: int) -> JumpReLUSAE:
        return self.layers[i]  # type: ignore[return-value]

    def encode_sparse(self, x: Tensor | Sequence[Tensor], screen: bool | None = None) -> list[SparseLatents]:
        """x [n_layers, ..., d] (or a list with one tensor per layer) → a list of SparseLatents [..., d_sae]."""
        self._check(x)
        return [self._layer(i).encode_sparse(x[i], screen) for i in range(self.n_layers)]

    def encode(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Dense latents [n_layers, ..., d_sae]."""
        found = [latents.to_dense() for latents in self.encode_sparse(x)]
        with outside_autocast(found[0].device):
            return torch.stack(found)

    def decode(self, latents: Sequence[SparseLatents] | Tensor) -> Tensor:
        """[n_layers, ..., d] in the coder's dtype. Adds source layers in order, in fp32, without the skip."""
        if len(latents) != self.n_layers:
            raise ValueError(f"latents: expected {self.n_layers} layers, got {len(latents)}")
        total: Tensor | None = None
        for i in range(self.n_layers):
            layer, sparse = self._layer(i), latents[i]
            check_latents(sparse, layer.d_sae, layer.device, f"latents[{i}]")
            sparse = SparseLatents.from_dense(sparse) if isinstance(sparse, Tensor) else sparse
            flat = ops.decode(
                sparse.crow_indices, sparse.col_indices, sparse.values, layer.W_dec, layer.b_dec, None
            ).reshape(*sparse.shape[:-1], self.n_layers - i, self.cfg.d_in)
            part = flat.movedim(-2, 0)
            total = part if total is None else torch.cat([total[:i], total[i:] + part])
        assert total is not None
        return total.to(self.dtype)

    def skip(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """x_l @ W_skip[l] for each layer; zeros if there is no skip."""
        self._check(x)
        if self.W_skip is None:
            return torch.stack([torch.zeros_like(x[i], dtype=torch.float32) for i in range(self.n_layers)]).to(
                self.dtype
            )
        return torch.stack([exact_product(x[i], skip) for i, skip in enumerate(self.W_skip)]).to(self.dtype)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Reconstruct outputs [n_layers, ..., d] from the inputs x [n_layers, ..., d]."""
        out = self.decode(self.encode_sparse(x))
        return out if self.W_skip is None else out + self.skip(x)

    def _check(self, x: Tensor | Sequence[Tensor]) -> None:
        if len(x) != self.n_layers:
            raise ValueError(f"x: expected one input for each of {self.n_layers} layers, got {len(x)}")
        for i in range(self.n_layers):
            expect_tensor(f"x[{i}]", x[i])


class Crosscoder(JumpReLUSAE):
    """One set of latents for n sites: z = Σ_l x_l @ W_enc[l] + b_enc, x̂_l = f @ W_dec[l] + b_dec[l].

    Stored as one SAE of all sites side by side: W_enc [n · d, d_sae], W_dec [d_sae, n · d], b_dec [n · d].
    x and x̂ have shape [..., n, d] or [..., n · d].
    """

    kind = "crosscoder"

    def __init__(self, *args: Any, sites: Sequence[Site | None] = (), n_layers: int | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.n_layers = n_layers or len(sites) or 1
        if self.cfg.d_in % self.n_layers:
            raise ValueError(f"W_enc: expected n · d rows for n = {self.n_layers} sites, got {self.cfg.d_in}")
        self.sites = tuple(sites)

    def _tokens(self, x: Tensor) -> Tensor:
        return super()._tokens(self._flat(x))

    def _layout(self) -> dict[str, Any]:
        return {"sites": self.sites, "n_layers": self.n_layers}

    def _flat(self, x: Tensor) -> Tensor:
        expect_tensor("x", x)
        d = self.cfg.d_in // self.n_layers
        return x.flatten(-2) if x.dim() > 1 and x.shape[-2:] == (self.n_layers, d) and d != self.cfg.d_in else x

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        return super().encode_sparse(self._flat(x), screen, bandwidth, precision)

    def forward(self, x: Tensor) -> Tensor:
        """x̂ in the same shape as x."""
        return super().forward(x).reshape(x.shape)
