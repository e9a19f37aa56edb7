"""Sparse autoencoders of the Gemma Scope family as modules: JumpReLU SAE, transcoder, skip transcoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from gemmascope_fast import ops
from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._library import expect_tensor, in_dtype
from gemmascope_fast.ops._transforms import derivative_wanted, transformed
from gemmascope_fast.ops.latents import SparseLatents, check_latents
from gemmascope_fast.sae.base import Coder
from gemmascope_fast.sae.config import SAEConfig
from gemmascope_fast.sae.pinned import pin_rows
from gemmascope_fast.sae.rows import Rows, as_rows
from gemmascope_fast.sae.screen import Screen, balancing_scales, decoder_spread, massive_dimensions
from gemmascope_fast.sae.screen_cache import ScreenCache, ScreenOptions
from gemmascope_fast.sae.straight_through import with_gradients
from gemmascope_fast.sae.weights import EncoderWeights, check_encoder, check_weights

S = TypeVar("S", bound="JumpReLUSAE")


class JumpReLUSAE(Coder):
    """x̂ = f @ W_dec + b_dec with f = relu(z) · (z > threshold), z = x @ W_enc + b_enc (Gemma Scope paper, section 1).
    Results are exact, and latents are sparse from the start (no dense tensor is made).

    Parameters have Gemma Scope's names and shapes: W_enc [d_in, d_sae] (a transposed view of [d_sae, d_in]
    storage), W_dec [d_sae, d_out], b_enc and threshold [d_sae], b_dec [d_out].
    """

    rows: Rows  # where the rows of W_enc and W_dec live
    screen_cache: ScreenCache  # the screen, built at first use

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        cfg: SAEConfig | None = None,
    ) -> None:
        super().__init__()
        check_weights(W_enc, W_dec, b_enc, b_dec, threshold)
        (d_in, d_sae), d_out = W_enc.shape, W_dec.shape[1]
        self.cfg = cfg or SAEConfig(d_in, d_sae, d_out)
        if (self.cfg.d_in, self.cfg.d_sae, self.cfg.d_out) != (d_in, d_sae, d_out):
            raise ValueError(f"cfg: expected d_in {d_in}, d_sae {d_sae}, d_out {d_out}, got {self.cfg}")
        self.W_enc = nn.Parameter(as_rows(W_enc.detach()))
        self.W_dec = nn.Parameter(W_dec.detach())
        self.b_enc = nn.Parameter(b_enc.detach())
        self.b_dec = nn.Parameter(b_dec.detach())
        self.threshold = nn.Parameter(threshold.detach())
        self.rows = Rows()
        self.screen_cache = ScreenCache()

    @classmethod
    def from_weights(
        cls,
        *,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        cfg: SAEConfig | None = None,
        **more: Any,
    ) -> JumpReLUSAE:
        """Build from tensors with Gemma Scope's names and shapes. All need the same floating dtype and the same device.

        Raises ValueError if shapes disagree or a threshold is not finite, TypeError for other dtypes.
        """
        return cls(W_enc, W_dec, b_enc, b_dec, threshold, cfg, **more)

    # ---- encode -------------------------------------------------------------------------------------

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        """x [..., d_in], any floating dtype (widened exactly; float64 is rounded to float32) → SparseLatents.

        screen: True or False turns the certified screen on or off; None chooses the faster way for this number of
        tokens. The result is the same, byte for byte.
        bandwidth ε: pairs with |z - threshold| < ε/2 are stored too, with value 0 if they did not fire, and the
        threshold gets its straight-through gradient.
        precision: "exact", or "tensor" to use op `encode_tensor` (tensor cores on a GPU). Its results are within the
        tolerance derived in ops/encode_tensor.py, not byte-exact. It cannot be combined with screen or bandwidth.
        Raises ValueError for a wrong d_in, device or precision, TypeError for integer or complex x, lists and arrays.
        """
        flat = self._tokens(x)
        self.rows.check()
        if precision != "exact":
            return self._encode_tensor(flat, x.shape[:-1], screen, bandwidth, precision)
        csr = self._encode_exact(flat, screen, bandwidth)
        if bandwidth is not None:
            csr = with_gradients((csr[0], csr[1], csr[2]), self.threshold, bandwidth)
        crow, col, values = csr
        return SparseLatents(crow, col, in_dtype(values, self.W_enc.dtype), (*x.shape[:-1], self.cfg.d_sae))

    def _encode_exact(
        self, flat: Tensor, screen: bool | None, bandwidth: float | None, **options: Any
    ) -> Sequence[Tensor]:
        """(crow_indices, col_indices, values fp32) of x [N, d_in]; options: those of `encode_unscreened`."""
        if self._unpacked(screen):
            return self.encode_unscreened(flat, self.encoder_weights(), bandwidth, **options)
        return self.screen_cache.encode(self, flat, screen, bandwidth, **options)

    def encode_unscreened(self, x: Tensor, weights: EncoderWeights, bandwidth: float | None) -> Sequence[Tensor]:
        """(crow_indices, col_indices, values fp32) of x [N, d_in], with every pair computed in full precision."""
        return ops.encode(x, *weights, bandwidth)

    def encode_screened(
        self, screen: Screen, x: Tensor, weights: EncoderWeights, bandwidth: float | None
    ) -> Sequence[Tensor]:
        """The same result as `encode_unscreened`, with a screen that was built from these weights."""
        return screen.encode(x, *weights, bandwidth=bandwidth, mapped=self.rows.holds(weights.W_enc))

    def check_encoder(self, weights: EncoderWeights) -> None:
        """Raise ValueError if the edited weights no longer fit this SAE."""
        check_encoder(weights, self.d_in, self.d_sae)

    def _unpacked(self, screen: bool | None) -> bool:
        """Whether to use plain op `encode`, which gives the same bytes. torch.compile cannot trace the screen, and
        weights that `torch.func` puts in place of the parameters have no screen."""
        if torch.compiler.is_compiling():
            return not screen
        replaced = type(self.W_enc) is not nn.Parameter
        if not replaced and not transformed():
            return False
        if screen and replaced:
            raise ValueError("screen: expected None or False when torch.func replaces the weights, got True")
        return not screen and not self.rows.only_through_screen

    def _encode_tensor(
        self, flat: Tensor, rows: tuple[int, ...], screen: bool | None, bandwidth: float | None, precision: str
    ) -> SparseLatents:
        if precision != "tensor":
            raise ValueError(f"precision: expected 'exact' or 'tensor', got {precision!r}")
        if screen or bandwidth is not None:
            raise ValueError("precision: 'tensor' takes neither screen nor bandwidth")
        if self.rows.only_through_screen:
            raise ValueError("precision: 'tensor' reads every row, which is too slow for rows in host memory")
        crow, col, values = ops.encode_tensor(flat, self.W_enc, self.b_enc, self.threshold)
        return SparseLatents(crow, col, values.to(self.W_enc.dtype), (*rows, self.cfg.d_sae))

    # ---- decode -------------------------------------------------------------------------------------

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Reconstruction [..., d_out] in the SAE's dtype from dense [..., d_sae] or sparse latents.

        Dense latents that need a gradient are decoded by a dense product, because zeros have gradients too.
        Raises ValueError for a wrong d_sae or device, TypeError if latents are neither a floating tensor nor
        SparseLatents, IndexError if col_indices are outside [0, d_sae).
        """
        check_latents(latents, self.cfg.d_sae, self.device)
        self.rows.check()
        if isinstance(latents, Tensor):
            if derivative_wanted(latents):
                return self._decode_dense(latents)
            latents = SparseLatents.from_dense(latents)
        if not torch.compiler.is_compiling():
            self.rows.prefetch(self.W_dec, latents.col_indices)
        out = ops.decode(latents.crow_indices, latents.col_indices, latents.values, self.W_dec, self.b_dec, None)
        return in_dtype(out, self.W_dec.dtype).reshape(*latents.shape[:-1], self.cfg.d_out)

    def prepare(self, force: bool = False, **options: Any) -> JumpReLUSAE:
        """Lay out the rows and build the certified screen now instead of at first use.

        force: rebuild even if no change was detected. Needed after edits that cannot be detected (`p.data.mul_()`, a
        numpy alias, inference tensors).
        The options are kept for later rebuilds. They affect speed only, never results:
        centre [d_in]: a point near the mean of the activations (default: b_dec if the SAE reconstructs its own input).
        sample [..., d_in]: activations. Their mean is used as the centre, and their spread balances the dimensions.
        directions: [k, d_in], or how many to find in the sample, along which activations vary most (default: the
        massive dimensions seen in b_dec; 0: none). With several tokens they leave fewer features to check again.
        second_digit (default True): a second byte per weight, which rules out nearly all rows that do not fire.
        codes: `matryoshka.Codes` of W_encᵀ with one scale a row (e.g. trained), used instead of the screen's own 8
        bits.
        """
        self.screen_cache.refresh(self, force=force)
        if options or self.screen_cache.stale():
            self.screen_cache.build(self, ScreenOptions.of(self.d_in, **options))
        return self

    def pin_rows(self, device: str | torch.device = "cuda") -> JumpReLUSAE:
        """Move the encoder's rows into pinned host memory and everything else to a CUDA device, in place.

        Every encode then uses the screen, whose codes are on the device, and reads over the bus only the rows that the
        screen could not rule out. The result is the same, byte for byte. Parameters no longer require gradients.
        Moving to another device with `.to` makes the rows resident again.
        Raises ValueError for another kind of device or mapped rows, BackendError if there is no CUDA device.
        """
        pin_rows(self, torch.device(device))
        return self

    def prefix(self: S, n: int) -> S:
        """The coder of the first n features: the same kind, on views of this one's weights, so no copy of a matrix.

        For Matryoshka SAEs, whose prefixes are trained to reconstruct on their own.  An edit of one is an edit of the
        other.  A top-k coder keeps min(k, n).  It has a screen of its own, built at first use.
        Raises ValueError unless 1 <= n <= d_sae, and where rows are not in memory (`rows="mmap"`, `pin_rows`).
        """
        if type(n) is not int or not 1 <= n <= self.d_sae:
            raise ValueError(f"n: expected 1 to d_sae = {self.d_sae}, got {n!r}")
        if self.rows.only_through_screen or not self.rows.in_memory:
            raise ValueError("prefix: expected rows in memory, got rows in a file or in pinned host memory")
        weights = self.screen_cache.refresh(self)  # rows one after the other, of which a view is rows too
        given: dict[str, Any] = {"W_enc": weights.W_enc[:, :n], "W_dec": self.W_dec[:n], "b_dec": self.b_dec}
        given |= {"b_enc": weights.b_enc[:n], "threshold": weights.threshold[:n]}
        for name, dims in self.extra_arrays.items():
            cut = tuple(slice(n) if dim == "d_sae" else slice(None) for dim in dims)
            given[name] = getattr(self, name)[cut]
        for name, field in self.extra_fields.items():
            value = getattr(self, name)
            given[name] = min(value, n) if field.most == "d_sae" else value
        return type(self)(**given, cfg=replace(self.cfg, d_sae=n), **self._layout())

    def _layout(self) -> dict[str, Any]:
        """What the constructor takes beside weights, fields and cfg."""
        return {}

    def encoder_weights(self) -> EncoderWeights:
        """The parameters that an encode reads, with their current values."""
        return EncoderWeights(self.W_enc, self.b_enc, self.threshold)

    def screen_centre(self) -> Tensor | None:
        """Where the screen centres activations unless told: b_dec is about their mean in an SAE."""
        return self.b_dec.detach().float() if self.reconstructs_input else None

    def screen_directions(self) -> Tensor | None:
        """What the screen takes out of activations unless told: the massive dimensions, [k, d_in]."""
        return massive_dimensions(self.b_dec.detach().float()) if self.reconstructs_input else None

    def screen_scales(self) -> Tensor | None:
        """How the screen balances dimensions unless a sample tells: by what the decoder writes into each."""
        if not self.reconstructs_input or not self.d_sae:
            return None
        return balancing_scales(self.W_enc.detach(), decoder_spread(self.W_dec.detach()), self.screen_directions())

    def packed_bytes(self) -> int:
        """Bytes used in addition to the parameters: the screen's codes and bounds."""
        return self.screen_cache.nbytes

    # ---- module plumbing ----------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> JumpReLUSAE:
        """A copy. Mapped rows stay in their file (`Rows.before_copy`); a screen of mapped rows is shared."""
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        self.rows.before_copy(self, memo)
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        if not made.rows.in_memory:
            # without this, building a screen would read every row
            self.screen_cache.share(self, made)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> JumpReLUSAE:
        super()._apply(fn, recurse)
        self.rows = self.rows.after_change(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.rows.before_pickle()
        return self.__dict__


class JumpReLUTranscoder(JumpReLUSAE):
    """Reads one site and reconstructs another: x̂ is the output at `cfg.site_out`."""

    kind = "transcoder"
    reconstructs_input = False


class JumpReLUSkipTranscoder(JumpReLUTranscoder):
    """A transcoder with an affine skip: x̂ = f @ W_dec + b_dec + x @ W_skip, with W_skip [d_in, d_out]."""

    kind = "skip_transcoder"
    extra_arrays: ClassVar[Mapping[str, tuple[str, ...]]] = {"W_skip": ("d_in", "d_out")}

    def __init__(self, *args: Any, W_skip: Tensor, **more: Any) -> None:
        super().__init__(*args, **more)
        expect_tensor("W_skip", W_skip)
        if W_skip.shape != (self.cfg.d_in, self.cfg.d_out):
            raise ValueError(
                f"W_skip: expected [d_in = {self.cfg.d_in}, d_out = {self.cfg.d_out}], got {tuple(W_skip.shape)}"
            )
        self.W_skip = nn.Parameter(W_skip.detach())

    def skip(self, x: Tensor) -> Tensor:
        """x @ W_skip in the SAE's dtype."""
        return exact_product(x, self.W_skip).to(self.W_dec.dtype)

    def reconstruct(self, latents: Tensor | SparseLatents, x: Tensor) -> Tensor:
        return self.decode(latents) + self.skip(x)
