"""The interface that every coder of one site has, however it stores its weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from gemmascope_fast.ops._exact import exact_product
from gemmascope_fast.ops._library import expect_tensor
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.config import SAEConfig

T = TypeVar("T", bound="Coder")


@dataclass(frozen=True)
class Field:
    """A value that a coder's checkpoint stores beside its arrays, and an attribute of the coder.

    type: int, float, bool or str.  least, most: of a number; the text "d_in", "d_sae" or "d_out" is that dimension.
    """

    type: type
    least: float | str | None = None
    most: float | str | None = None


class Coder(nn.Module):
    """Base class: encodes activations [..., d_in] to sparse latents [..., d_sae] and decodes them to [..., d_out].

    Subclasses give `encode_sparse` and `decode`, and have W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc and
    threshold [d_sae], and b_dec [d_out].  What a kind has beside these it declares in `extra_arrays` and
    `extra_fields`; its constructor takes each by name, and the object has an attribute of that name.
    """

    kind = "sae"
    extra_arrays: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # name → names of its dimensions: d_in, d_sae, d_out
    extra_fields: ClassVar[Mapping[str, Field]] = {}
    reconstructs_input: ClassVar[bool] = True  # so that b_dec and W_dec say what activations are like
    cfg: SAEConfig
    W_enc: Any
    W_dec: Any
    b_enc: Any
    b_dec: Any
    threshold: Any
    _load: ClassVar[Callable[..., Any]]  # loads any kind; set by gemmascope_fast.checkpoints.loading

    @classmethod
    def from_pretrained(
        cls: type[T],
        repo_or_folder: str | Path | None = None,
        sae_id: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        **options: Any,
    ) -> T:
        """Like `gsf.SAE.from_pretrained`, but a checkpoint of another kind is a TypeError that names it."""
        loaded = cls._load(repo_or_folder, sae_id, device=device, dtype=dtype, **options)
        if loaded.kind != cls.kind:
            place = repo_or_folder or options["release"]
            raise TypeError(
                f"{place}: expected a checkpoint of kind {cls.kind!r}, got {loaded.kind!r}"
                f" ({type(loaded).__name__}); gsf.SAE.from_pretrained loads every kind"
            )
        return loaded  # type: ignore[no-any-return]

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        """x [..., d_in] → SparseLatents [..., d_sae]."""
        raise NotImplementedError

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Dense [..., d_sae] or sparse latents → reconstruction [..., d_out]."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """Dense latents [..., d_sae] in the SAE's dtype, as SAELens returns them."""
        return self.encode_sparse(x).to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., d_in]: [..., d_out] in the SAE's dtype."""
        return self.reconstruct(self.encode_sparse(x), x)

    def reconstruct(self, latents: Tensor | SparseLatents, x: Tensor) -> Tensor:
        """Like `forward` for x [..., d_in], with latents that were already computed: [..., d_out]."""
        return self.decode(latents)

    def neuronpedia_url(self, feature: int) -> str:
        """The page of a feature on Neuronpedia.

        Raises ValueError where the SAE's page is not known (`cfg.metadata.neuronpedia_id` is None), IndexError for a
        feature outside of [0, d_sae), TypeError for what is no integer.
        """
        index = operator.index(feature)
        if not 0 <= index < self.d_sae:
            raise IndexError(f"feature: expected 0 to {self.d_sae - 1}, got {feature}")
        about = self.cfg.metadata.neuronpedia_id
        if about is None:
            raise ValueError(
                "neuronpedia_url: the page of this SAE on Neuronpedia is not known; set cfg.metadata.neuronpedia_id,"
                " such as 'gemma-2-2b/20-gemmascope-res-16k'"
            )
        return f"https://www.neuronpedia.org/{about}/{index}"

    def prepare(self: T, force: bool = False, **options: Any) -> T:
        """Build now what the first encode would otherwise build. Does nothing if there is nothing to build."""
        return self

    def packed_bytes(self) -> int:
        """Bytes of memory used in addition to the parameters."""
        return 0

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    @property
    def device(self) -> torch.device:
        """The device on which activations are expected."""
        device: torch.device = self.b_dec.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and of the results of `encode` and `decode`."""
        dtype: torch.dtype = self.W_enc.dtype
        return dtype

    def extra_repr(self) -> str:
        return f"d_in={self.cfg.d_in}, d_sae={self.cfg.d_sae}, site={self.cfg.hook_name}, dtype={self.dtype}"

    def _tokens(self, x: Tensor) -> Tensor:
        """Check x and reshape it to [N, d_in]."""
        expect_tensor("x", x)
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.cfg.d_in:
            raise ValueError(f"x: expected d_in = {self.cfg.d_in} in its last dimension, got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x: expected a tensor on {self.device}, like the SAE, got {x.device}")
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def _decode_dense(self, latents: Tensor) -> Tensor:
        """Decode with a dense product, because latents that are zero have gradients too."""
        dense = exact_product(latents, self.W_dec) + self.b_dec.float()
        return dense.to(self.W_dec.dtype)
