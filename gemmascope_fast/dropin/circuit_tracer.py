"""circuit-tracer's transcoders with this package's ops (tested with circuit-tracer 0.5).

circuit-tracer encodes densely, [positions, d_transcoder] per layer, and then makes that sparse.  Here attribution
allocates nothing of that size: `encode_sparse` makes the COO tensor and the active encoder rows from latents that are
sparse from the start, and reconstructions are sparse decodes.  Its own methods for decoder vectors (also those read
lazily), saving and the pre-activations of one layer are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from torch import Tensor
from torch.nn import functional as F

from gemmascope_fast import ops
from gemmascope_fast.ops._exact import outside_autocast
from gemmascope_fast.ops._transforms import derivative_wanted
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemmascope_fast.sae.multi_site import CrossLayerTranscoder as OwnCrossLayerTranscoder
from gemmascope_fast.sae.topk_transcoder import TopKTranscoder
from gemmascope_fast.sae.weights import Fingerprint, fingerprint

FIRST = slice(0, 1)  # circuit-tracer zeroes the first position by default


class EncoderOf:
    """This package's encoder over rows [d_transcoder, d_model] of a transcoder. It reads them again in every call and
    never copies them.

    The latents of x have gradients with respect to x, rows and b_enc, but not to the threshold.
    """

    def __init__(self) -> None:
        self.seen: Fingerprint | None = None
        self.module: JumpReLUSAE | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (EncoderOf, ())  # a copy makes its own encoder from its own weights

    def latents(
        self, x: Tensor, rows: Tensor, b_enc: Tensor, threshold: Tensor | None, screen: bool | None
    ) -> SparseLatents:
        """SparseLatents [..., d_transcoder] of x [..., d_model]."""
        module, x = self._module(rows, b_enc, threshold), x.to(rows.dtype)
        if not derivative_wanted(x, rows, b_enc):
            return module.encode_sparse(x, screen=screen)
        # the module has detached views; the op itself gives the same bytes and has gradients
        crow, col, values = ops.encode(x.reshape(-1, x.shape[-1]), rows.t(), b_enc, module.threshold, None)
        return SparseLatents(crow, col, values.to(rows.dtype), (*x.shape[:-1], rows.shape[0]))

    def greatest(self, x: Tensor, rows: Tensor, b_enc: Tensor, k: int, screen: bool | None) -> SparseLatents:
        """Those of the k greatest latents of each row of x that are above 0."""
        module, x = self._module(rows, b_enc, None, k), x.to(rows.dtype)
        if derivative_wanted(x, rows, b_enc):
            crow, col, values = ops.encode_topk(x.reshape(-1, x.shape[-1]), rows.t(), b_enc, k)
            return SparseLatents(crow, col, values.to(rows.dtype), (*x.shape[:-1], rows.shape[0]))
        return module.encode_sparse(x, screen=screen)

    def _module(self, rows: Tensor, b_enc: Tensor, threshold: Tensor | None, k: int | None = None) -> JumpReLUSAE:
        given = (rows, b_enc) if threshold is None else (rows, b_enc, threshold)
        # each view is a new object, so compare the position of its data and the number of edits
        now = (k, *(part[1:] for part in fingerprint(*given)))
        if self.module is None or now != self.seen:
            theta = torch.zeros_like(b_enc) if threshold is None else threshold.detach().expand_as(b_enc).contiguous()
            if bool((theta < 0).any()):
                raise ValueError(
                    "activation_function.threshold: expected values of at least 0, or negative latents pass"
                )
            none = rows.detach().new_zeros(rows.shape[0], 0)  # d_out 0: the transcoder decodes by itself
            held = (rows.detach().t(), none, b_enc.detach(), none[0], theta.detach())
            self.module = JumpReLUTranscoder(*held) if k is None else TopKTranscoder(*held, k=k)
            self.seen = now
        return self.module


def as_coo(latents: SparseLatents, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(sparse COO [n_pos, d_transcoder], features int64 [nnz]) of the latents of positions in the mask `kept`."""
    features = latents.col_indices.long()
    at = torch.stack([kept.nonzero()[:, 0][latents.row_indices()], features])
    size = (kept.shape[0], latents.d_sae)
    # torch warns unless told whether to check indices; those of an encode need no check
    made = torch.sparse_coo_tensor(at, latents.values, size, is_coalesced=True, check_invariants=False)
    return made, features


def positions_kept(x: Tensor, zero_positions: Any) -> Tensor:
    """Mask [n_pos] of the positions of x [n_pos, d_model] that are not zeroed: only these are encoded."""
    kept = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    kept[zero_positions] = False
    return kept


def _screen(lazy: bool) -> bool | None:
    # for rows that are read from disk in every call, building a screen is not worth it
    return False if lazy else None


class PositiveTopK(TopK):
    """Top-k as this package's coders have it: of the k greatest those above 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def _threshold(activation: Any) -> Tensor | None:
    """JumpReLU's threshold; None for ReLU.  TypeError for any other activation."""
    if isinstance(activation, JumpReLU):
        return activation.threshold
    if activation is F.relu or activation is torch.relu or isinstance(activation, torch.nn.ReLU):
        return None
    raise TypeError(f"activation_function: expected JumpReLU, ReLU or, of one layer, TopK, got {activation}")


def _check(transcoder: SingleLayerTranscoder) -> None:
    """TypeError for an activation function that is none of these."""
    if not isinstance(transcoder.activation_function, TopK):
        _threshold(transcoder.activation_function)


class AcceleratedTranscoder(SingleLayerTranscoder):
    """A SingleLayerTranscoder with latents that are sparse from the start."""

    def latents(self, input_acts: Tensor, rows: Tensor | None = None) -> SparseLatents:
        """SparseLatents [..., d_transcoder] of input_acts [..., d_model]; rows: W_enc, if it was read already."""
        held = self.__dict__.setdefault("_encoder", EncoderOf())
        rows = self.W_enc if rows is None else rows
        if isinstance(self.activation_function, TopK):
            k, screen = int(self.activation_function.k), _screen(self.lazy_encoder)
            found = held.greatest(input_acts, rows, self.b_enc, k, screen)
            if found.nnz == k * found.n_rows or isinstance(self.activation_function, PositiveTopK):
                return found
            return SparseLatents.from_dense(super().encode(input_acts))  # negative ones are among the k greatest
        threshold = _threshold(self.activation_function)
        return held.latents(input_acts, rows, self.b_enc, threshold, _screen(self.lazy_encoder))

    def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
        if not apply_activation_function:
            return super().encode(input_acts, apply_activation_function)
        return self.latents(input_acts).to_dense()

    def encode_sparse(self, input_acts: Tensor, zero_positions: Any = FIRST) -> tuple[Tensor, Tensor]:
        rows, kept = self.W_enc, positions_kept(input_acts, zero_positions)
        acts, features = as_coo(self.latents(input_acts[kept], rows), kept)
        return acts, rows[features]

    def forward(self, input_acts: Tensor) -> Tensor:
        latents, W_dec = self.latents(input_acts), self.W_dec
        out = ops.decode(latents.crow_indices, latents.col_indices, latents.values, W_dec, self.b_dec, None)
        out = out.to(W_dec.dtype).reshape(*latents.shape[:-1], W_dec.shape[1])
        if self.W_skip is None:
            return out
        with outside_autocast(input_acts.device):
            return out + self.compute_skip(input_acts)


class AcceleratedCrossLayerTranscoder(CrossLayerTranscoder):
    """A CrossLayerTranscoder with latents that are sparse from the start, layer by layer."""

    def latents(self, x: Tensor, layer: int, rows: Tensor | None = None) -> SparseLatents:
        """SparseLatents [..., d_transcoder] of one layer's x [..., d_model]; rows: its W_enc, if it was read."""
        held = self.__dict__.setdefault("_encoders", [EncoderOf() for _ in range(self.n_layers)])
        rows = self._get_encoder_weights(layer) if rows is None else rows
        threshold = _threshold(self.activation_function)
        theta = None if threshold is None else threshold[layer].reshape(-1)
        return held[layer].latents(x, rows, self.b_enc[layer], theta, _screen(self.lazy_encoder))

    def encode(self, x: Tensor) -> Tensor:
        return torch.stack([self.latents(x[i], i).to_dense() for i in range(self.n_layers)])

    def encode_layer(self, x: Tensor, layer_id: int, apply_activation_function: bool = True) -> Tensor:
        if not apply_activation_function:
            return super().encode_layer(x, layer_id, apply_activation_function)
        return self.latents(x, layer_id).to_dense()

    def encode_sparse(self, x: Tensor, zero_positions: Any = FIRST) -> tuple[Tensor, Tensor]:
        acts, active = [], []
        for layer in range(self.n_layers):
            rows, kept = self._get_encoder_weights(layer), positions_kept(x[layer], zero_positions)
            sparse, features = as_coo(self.latents(x[layer][kept], layer, rows), kept)
            acts.append(sparse)
            active.append(rows[features])
        return torch.stack(acts).coalesce(), torch.cat(active)

    def select_decoder_vectors(self, features: Tensor) -> tuple[Tensor, ...]:
        if features._nnz() if features.is_sparse else features.any():
            return super().select_decoder_vectors(features)
        none = torch.zeros(0, dtype=torch.int64, device=features.device)
        return none, none, none, torch.zeros(0, self.d_model, dtype=self.dtype, device=features.device), none

    def compute_reconstruction(
        self,
        pos_ids: Tensor,
        layer_ids: Tensor,
        decoder_vectors: Tensor,
        input_acts: Tensor | None = None,
        n_pos: int | None = None,
    ) -> Tensor:
        """Like circuit-tracer's; n_pos: number of positions, needed if the last ones have no active feature."""
        if n_pos is None:
            n_pos = input_acts.shape[1] if input_acts is not None else int(pos_ids.max()) + 1
        sums = decoder_vectors.new_zeros(self.n_layers * n_pos, self.d_model)
        sums = sums.index_add(0, layer_ids * n_pos + pos_ids, decoder_vectors)
        out = sums.reshape(self.n_layers, n_pos, self.d_model) + self.b_dec[:, None]
        if self.W_skip is None:
            return out
        if input_acts is None:
            raise ValueError("input_acts: a transcoder with a skip needs its inputs, got None")
        with outside_autocast(input_acts.device):
            return out + input_acts @ self.W_skip

    def decode(self, features: Tensor, input_acts: Tensor | None = None) -> Tensor:
        at, layers, _, vectors, _ = self.select_decoder_vectors(features)
        return self.compute_reconstruction(at, layers, vectors, input_acts, features.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        # decode adds the skip (circuit-tracer 0.5 adds it here once more, or fails without inputs)
        return self.decode(self.encode_sparse(x, zero_positions=slice(0, 0))[0], x)


def accelerate(target: Any, inplace: bool | None) -> Any:
    """See `gemmascope_fast.dropin.accelerate`."""
    if inplace is False:
        raise ValueError("inplace: circuit-tracer's transcoders are always accelerated in place, got False")
    if isinstance(target, TranscoderSet):
        for transcoder in target.transcoders:
            _check(transcoder)
        for transcoder in target.transcoders:
            accelerate(transcoder, inplace)
        return target
    for plain, fast in (
        (SingleLayerTranscoder, AcceleratedTranscoder),
        (CrossLayerTranscoder, AcceleratedCrossLayerTranscoder),
    ):
        if type(target) in (plain, fast):
            _check(target) if plain is SingleLayerTranscoder else _threshold(target.activation_function)
            target.__class__ = fast
            return target
    raise TypeError(
        "target: expected circuit-tracer's SingleLayerTranscoder, TranscoderSet or CrossLayerTranscoder, got"
        f" {type(target).__name__}"
    )


def transcoder(source: JumpReLUTranscoder | TopKTranscoder, layer: int) -> AcceleratedTranscoder:
    """Convert a transcoder of this package (with or without skip) for circuit-tracer; the weights are shared."""
    if not isinstance(source, JumpReLUTranscoder | TopKTranscoder):
        raise TypeError(
            f"source: expected a JumpReLUTranscoder or TopKTranscoder of this package, got {type(source).__name__}"
        )
    skip = isinstance(source, JumpReLUSkipTranscoder)
    ranked = isinstance(source, TopKTranscoder)
    activation: Any = PositiveTopK(source.k) if ranked else JumpReLU(source.threshold.detach(), bandwidth=0.1)
    sizes = {"d_model": source.d_in, "d_transcoder": source.d_sae, "layer_idx": layer}
    made = AcceleratedTranscoder(
        activation_function=activation, skip_connection=skip, device=torch.device("meta"), dtype=source.dtype, **sizes
    )
    weights: Any = source
    state = {name: getattr(weights, name).detach() for name in ("W_dec", "b_enc", "b_dec")}
    state["W_enc"] = source.W_enc.detach().t()
    if not ranked:
        state["activation_function.threshold"] = source.threshold.detach()
    if skip:
        state["W_skip"] = weights.W_skip.detach().t().contiguous()
    made.load_state_dict(state, assign=True)
    return made


def transcoder_set(
    sources: dict[int, JumpReLUTranscoder | TopKTranscoder],
    feature_input_hook: str,
    feature_output_hook: str,
    scan: str | list[str] | None = None,
) -> TranscoderSet:
    """Make circuit-tracer's TranscoderSet from this package's transcoders, one for each layer from 0 on."""
    made = {layer: transcoder(source, layer) for layer, source in sources.items()}
    return TranscoderSet(made, feature_input_hook, feature_output_hook, scan)


def cross_layer_transcoder(
    source: OwnCrossLayerTranscoder, feature_input_hook: str, feature_output_hook: str, scan: str | None = None
) -> AcceleratedCrossLayerTranscoder:
    """Convert this package's CrossLayerTranscoder for circuit-tracer.  Its encoders are stacked, so they are copied."""
    n, d = source.n_layers, source.cfg.d_in
    made = AcceleratedCrossLayerTranscoder(
        n,
        source.cfg.d_sae,
        d,
        activation_function="jump_relu",
        skip_connection=source.W_skip is not None,
        lazy_decoder=False,
        feature_input_hook=feature_input_hook,
        feature_output_hook=feature_output_hook,
        scan=scan,
        device=torch.device("meta"),
        dtype=source.dtype,
    )
    layers: list[Any] = list(source.layers)
    state: dict[str, Any] = {
        "W_enc": torch.stack([layer.W_enc.detach().t() for layer in layers]),
        "b_enc": torch.stack([layer.b_enc.detach() for layer in layers]),
        "b_dec": torch.stack([layer.b_dec.detach()[:d] for layer in layers]),
        "activation_function.threshold": torch.stack([layer.threshold.detach()[None] for layer in layers]),
    }
    for i, layer in enumerate(layers):
        state[f"W_dec.{i}"] = layer.W_dec.detach().reshape(-1, n - i, d)
    if source.W_skip is not None:
        state["W_skip"] = torch.stack([skip.detach() for skip in source.W_skip])
    made.load_state_dict(state, assign=True)
    return made
