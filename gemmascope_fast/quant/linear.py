"""Matrices whose bit width can be changed at run time without changing their codes, and a linear layer made of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemmascope_fast.backends.gpu.launch import refuse_while_capturing
from gemmascope_fast.ops._exact import outside_autocast
from gemmascope_fast.ops._planes import rule_of
from gemmascope_fast.ops.codes import check_bits, check_mode, quantize
from gemmascope_fast.ops.matryoshka_linear import matryoshka_linear
from gemmascope_fast.quant.planes import Packed, in_huge_pages

if TYPE_CHECKING:
    from typing_extensions import Self

ACTIVATIONS = ("int8", "exact")


class MatryoshkaMatrix(nn.Module):
    """A matrix stored as one nested code. `set_bits` changes the width of all of these at run time."""

    scale: Tensor
    zero_point: Tensor
    overflow_crow: Tensor | None
    overflow_col: Tensor | None
    mode: str
    extra_precision: bool
    KEPT: tuple[str, ...] = ("scale",)  # buffers whose dtype does not change when the model is cast

    def __init__(
        self, packed: Packed, bits: int | None = None, mode: str | None = None, extra_precision: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._group_size, self._stored, self._made_for = packed.group_size, packed.stored, packed.mode
        for i, plane in enumerate(packed.planes):
            self.register_buffer(f"plane{i}", in_huge_pages(plane))
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero_point", packed.zero_point)
        crow, col = packed.overflow or (None, None)
        self.register_buffer("overflow_crow", crow)
        self.register_buffer("overflow_col", col)
        self.set_bits(packed.stored if bits is None else bits, mode or packed.mode, extra_precision)

    @property
    def packed(self) -> Packed:
        """The codes, scales and zero points, without copying the layer's tensors."""
        planes = tuple(getattr(self, f"plane{i}") for i in range(5) if hasattr(self, f"plane{i}"))
        crow, col = self.overflow_crow, self.overflow_col
        overflow = None if crow is None or col is None else (crow, col)
        return Packed(
            planes,
            self.scale,
            self.zero_point,
            self.out_features,
            self.in_features,
            self._group_size,
            self._stored,
            self._made_for,
            overflow,
        )

    def set_bits(self, bits: int, mode: str | None = None, extra_precision: bool | None = None) -> Self:
        """Use the slice to `bits` from now on.  ValueError for a width that the planes do not support."""
        check_bits(bits)
        mode = self.mode if mode is None else mode
        extra = self.extra_precision if extra_precision is None and mode == "matquant" else bool(extra_precision)
        check_mode(mode, extra)
        planes = self.packed.read(bits, mode)
        self.bits, self.mode, self.extra_precision = bits, mode, extra
        self._reads, self._rule = len(planes), rule_of(mode, extra)
        self._changed()
        return self

    def _changed(self) -> None:
        """Called when the width changes: drop what was computed from the codes."""

    @property
    def weight(self) -> Tensor:
        """The current weights, dequantised: a new fp32 [out_features, in_features] at each access."""
        return self.packed.dequantize(self.bits, self.mode, self.extra_precision)

    def nbytes(self) -> int:
        """Bytes of the matrix at the current width: planes, scales, zero points, overflow."""
        return self.packed.nbytes(self.bits, self.mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(dtype) may move a layer but must not round its scales
        kept = {name: getattr(self, name) for name in self.KEPT}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._changed()

    def extra_repr(self) -> str:
        groups = "per channel" if self._group_size is None else f"groups of {self._group_size}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, mode={self.mode},"
            f" {groups}, stored={self._stored}"
        )


class MatryoshkaLinear(MatryoshkaMatrix):
    """y = x · W_rᵀ + bias for x [..., in_features] of any floating dtype; y in the same dtype.

    W_r is the slice of one nested code to `bits` bits.  activations: "exact" does not round x; "int8" subtracts `mean`
    [in_features] (a fixed vector, e.g. the average input, multiplied in fp32) and rounds each token to int8.
    """

    bias: Tensor | None
    mean: Tensor | None
    KEPT = ("scale", "bias", "mean")

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        bits: int | None = None,
        mode: str | None = None,
        extra_precision: bool = False,
        activations: str = "int8",
        mean: Tensor | None = None,
    ) -> None:
        super().__init__(packed, bits, mode, extra_precision)
        for name, vector, size in (("bias", bias, self.out_features), ("mean", mean, self.in_features)):
            if vector is not None and vector.shape != (size,):
                raise ValueError(f"{name}: expected [{size}], got {tuple(vector.shape)}")
            self.register_buffer(name, None if vector is None else vector.detach().float().clone())
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations: expected one of {', '.join(ACTIVATIONS)}, got {activations!r}")
        self.activations = activations

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int | None = None, **options: Any) -> MatryoshkaLinear:
        """Min–max codes of a linear layer's weights, untrained; same options as the constructor."""
        mode = check_mode(options.get("mode") or "prefix")
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(Packed.of(quantize(linear.weight, group_size), mode), bias, **options)

    def _changed(self) -> None:
        self._offset: Tensor | None = None
        self._operands: tuple[list[Tensor], Tensor, Tensor, Tensor | None, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected in_features = {self.in_features} in its last dimension, got {tuple(x.shape)}"
            )
        exact = self.activations == "exact"
        # the mean's product is added to the bias once for this width, in fp32
        centred = self.mean is not None and not exact
        if centred and self._offset is None:
            refuse_while_capturing(self.scale.device, "the mean's part of the bias")
            self._offset = self._fold()
        if self._operands is None:
            # looking up a dozen buffers in the module would take longer than the product of a small layer
            planes = [getattr(self, f"plane{i}") for i in range(self._reads)]
            self._operands = (planes, self.scale, self.zero_point, self.overflow_crow, self.overflow_col)
        planes, scale, zero_point, crow, col = self._operands
        y = matryoshka_linear(
            x if x.dim() == 2 else x.reshape(-1, self.in_features),
            planes,
            scale,
            zero_point,
            self._offset if centred else self.bias,
            self.mean if centred else None,
            crow,
            col,
            self.out_features,
            self._group_size or 0,
            self.bits,
            self._rule,
            exact,
        )
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def _fold(self) -> Tensor:
        assert self.mean is not None
        with torch.no_grad(), outside_autocast(self.mean.device):
            offset = self.weight @ self.mean
            return offset if self.bias is None else offset + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations}"
