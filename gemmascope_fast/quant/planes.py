"""Storage of codes as bit planes: reading a prefix of r bits reads r/8 of the bytes.

A weight matrix is cut into blocks of 16 rows and units of 32 columns.  The most significant bits come first, in planes
of 2, 1, 1, 2 and 2 bits; plane p is uint8 [out/16][in/32][64·width]:

    width 2: byte [block][unit][v][lane][c], field j of it = the two bits of row 16·block + lane,
             column 32·unit + 4·(4v + j) + c;   v 0…1, j 0…3 (field j is bits 2j and 2j+1)
    width 1: byte [block][unit][lane][c], bit j of it = the bit of that row, column 32·unit + 4j + c;   j 0…7

so that 64 bytes, shifted and masked, are 16 rows × 4 columns: an operand of an 8-bit dot product whose 16 lanes are 16
outputs.  Rows and columns are padded with code 0; scales and zero points are [out/16][groups][16].
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemmascope_fast.ops._planes import PREFIX, ROWS, UNIT, WIDTHS, add_overflow, rule_of, unblocked
from gemmascope_fast.ops.codes import Codes, check_bits, check_mode, group_count, slice_codes
from gemmascope_fast.ops.matryoshka_dequantize import dequantize, on_grid
from gemmascope_fast.ops.matryoshka_pack import matryoshka_pack
from gemmascope_fast.ops.matryoshka_slice import matryoshka_slice, resliced, unpack


def bits_read(bits: int, mode: str = "prefix", stored: int = 8) -> int:
    """Bits per weight that a slice to `bits` reads out of `stored` bits: whole planes; "matquant" needs one more bit.

    Raises ValueError if fewer are stored.
    """
    check_bits(bits)
    check_mode(mode)
    if bits == stored:
        return stored
    need = bits + (mode == "matquant")
    held = [sum(WIDTHS[stored][:n]) for n in range(1, len(WIDTHS[stored]) + 1)]
    enough = [b for b in held if b >= need]
    if not enough:
        raise ValueError(f"bits: a {mode} slice to {bits} needs {need} bits per weight, but {stored} are stored")
    return enough[0]


HUGE = 1 << 21  # bytes of a huge page on x86-64; a plane smaller than two gains little


def in_huge_pages(plane: Tensor) -> Tensor:
    """Copy a large CPU plane into huge pages, if the OS provides them; return other planes unchanged.

    A product for one token reads each page once. With pages of 4 KiB, address translation takes up to a third of the
    time of a matrix that is not in cache.
    """
    size = plane.numel()
    if plane.device.type != "cpu" or size < 2 * HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return plane
    # private memory: shared memory gets huge pages only if the administrator enabled it
    space = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        space.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # an OS without them
        return plane
    whole = torch.frombuffer(space, dtype=torch.uint8)  # keeps `space` alive
    start = -whole.data_ptr() % HUGE
    return whole[start : start + size].view(plane.shape).copy_(plane)


def pack(codes: Tensor, stored: int = 8) -> tuple[Tensor, ...]:
    """Codes uint8 [out, in] below 2^stored → planes, most significant first, with op `matryoshka_pack`."""
    return tuple(matryoshka_pack.step(codes, check_bits(stored, "stored")))


def blocked(value: Tensor) -> Tensor:
    """[out, groups] → [out/16, groups, 16], padded with zeros."""
    rows, groups = value.shape
    padded = torch.nn.functional.pad(value, (0, 0, 0, -rows % ROWS))
    return padded.reshape(-1, ROWS, groups).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Packed:
    """A matrix in planes.  `stored` = 8 is the nested code, which gives every width. Less is a prefix of it, or a flat
    copy written by `materialize` (its code is then used unchanged at that width).

    planes: see the module docstring; scale float16 or float32 and zero_point uint8 [out/16, groups, 16].
    overflow: for a flat copy with extra precision, (crow int64 [out+1], col int32 [n]), the weights whose code is one
    above the top code, row by row.  mode: the slicing of a flat copy, and the default for the nested code.
    """

    planes: tuple[Tensor, ...]
    scale: Tensor
    zero_point: Tensor
    out_features: int
    in_features: int
    group_size: int | None = None
    stored: int = 8
    mode: str = "prefix"
    overflow: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        check_bits(self.stored, "stored")
        check_mode(self.mode)
        blocks, units = -(-self.out_features // ROWS), -(-self.in_features // UNIT)
        groups = group_count(self.in_features, self.group_size)
        if len(self.planes) != len(WIDTHS[self.stored]):
            raise ValueError(
                f"planes: expected {len(WIDTHS[self.stored])} for {self.stored} bits, got {len(self.planes)}"
            )
        wanted = [
            (f"plane {i}", p, (blocks, units, 64 * w))
            for i, (p, w) in enumerate(zip(self.planes, self.widths, strict=True))
        ]
        wanted += [(n, t, (blocks, groups, ROWS)) for n, t in (("scale", self.scale), ("zero_point", self.zero_point))]
        for name, tensor, shape in wanted:
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name}: expected {shape} for {self.out_features} × {self.in_features}, got {tuple(tensor.shape)}"
                )
            if name != "scale" and tensor.dtype != torch.uint8:
                raise TypeError(f"{name}: expected uint8, got {tensor.dtype}")
        if self.scale.dtype not in (torch.float16, torch.float32):
            raise TypeError(f"scale: expected float16 or float32, got {self.scale.dtype}")
        if self.overflow is not None:
            self._check_overflow(*self.overflow)

    def _check_overflow(self, crow: Tensor, col: Tensor) -> None:
        from gemmascope_fast.ops._csr import check_csr

        if self.mode != "matquant":
            raise ValueError("overflow: expected none with prefix slices")
        if crow.numel() != self.out_features + 1:
            raise ValueError(f"overflow: expected {self.out_features + 1} offsets, got {crow.numel()}")
        check_csr(crow, col, self.in_features)

    @classmethod
    def of(cls, codes: Codes, mode: str = "prefix") -> Packed:
        """Pack codes into the nested planes, without loss."""
        rows, columns = codes.q.shape
        return cls(
            pack(codes.q),
            blocked(codes.scale),
            blocked(codes.zero_point),
            rows,
            columns,
            codes.group_size,
            8,
            check_mode(mode),
        )

    @property
    def widths(self) -> tuple[int, ...]:
        return WIDTHS[self.stored]

    @property
    def flat(self) -> bool:
        """Whether only one width is available."""
        return self.stored < 8 and self.mode == "matquant"

    def codes(self) -> Codes:
        """Unpack the codes, without loss; ValueError if fewer than 8 bits are stored."""
        if self.stored != 8:
            raise ValueError(f"stored: expected the 8-bit code, got a copy of {self.stored} bits")
        q = matryoshka_slice.step(list(self.planes), self.out_features, self.in_features, 8, PREFIX)
        scale, zero = (unblocked(v, self.out_features).contiguous() for v in (self.scale, self.zero_point))
        return Codes(q, scale, zero, self.group_size)

    def read(self, bits: int, mode: str | None = None) -> tuple[Tensor, ...]:
        """Only the planes that a slice to `bits` reads."""
        wanted = self._check_read(bits, mode)
        total, count = 0, 0
        while total < wanted:
            total += self.widths[count]
            count += 1
        return self.planes[:count]

    def _check_read(self, bits: int, mode: str | None) -> int:
        mode = self.mode if mode is None else check_mode(mode)
        if self.flat and (bits != self.stored or mode != self.mode):
            raise ValueError(f"bits: a flat {self.mode} copy of {self.stored} bits has no {mode} slice to {bits}")
        return bits_read(bits, mode, self.stored)

    def sliced(self, bits: int, mode: str | None = None, extra_precision: bool = False) -> Tensor:
        """r-bit codes uint8 [out, in]."""
        mode = self.mode if mode is None else mode
        check_mode(mode, extra_precision)
        planes, rule = list(self.read(bits, mode)), rule_of(mode, extra_precision)
        code = matryoshka_slice.step(planes, self.out_features, self.in_features, bits, rule)
        if self.overflow is not None:
            code = add_overflow(code, *self.overflow)
        return code

    def dequantize(self, bits: int | None = None, mode: str | None = None, extra_precision: bool = False) -> Tensor:
        """The weights at a width, fp32 [out, in]; by default at the stored width."""
        bits = self.stored if bits is None else bits
        mode = self.mode if mode is None else mode
        check_mode(mode, extra_precision)
        return dequantize(
            list(self.read(bits, mode)),
            self.scale,
            self.zero_point,
            self.overflow,
            self.out_features,
            self.in_features,
            self.group_size or 0,
            bits,
            rule_of(mode, extra_precision),
        )

    def rows(self, index: Tensor, bits: int, mode: str | None = None) -> Tensor:
        """Weights of some rows, fp32 [n, in]; reads only the bytes of those rows."""
        mode = self.mode if mode is None else mode
        held = self._check_read(bits, mode)
        planes = self.read(bits, mode)
        block, lane = index.long() // ROWS, index.long() % ROWS
        units = planes[0].shape[1]
        code = torch.zeros(index.numel(), units, 8, 4, dtype=torch.uint8, device=index.device)
        for plane, width in zip(planes, self.widths, strict=False):
            taken = plane.reshape(-1, units, width, ROWS, 4)[block, :, :, lane]
            shifts = (torch.arange(8 // width, dtype=torch.uint8, device=index.device) * width).reshape(-1, 1)
            field = (taken[:, :, :, None] >> shifts) & ((1 << width) - 1)
            code = (code << width) | field.reshape(code.shape)
        flat = resliced(code.flatten(1)[:, : self.in_features], held, bits, rule_of(mode))
        if self.overflow is not None:
            crow, col = self.overflow
            for i, row in enumerate(index.tolist()):
                flat[i, col[crow[row] : crow[row + 1]].long()] += 1
        scale, zero = (unblocked(v, self.out_features)[index.long()] for v in (self.scale, self.zero_point))
        return on_grid(flat, scale, zero, self.group_size or 0, bits, rule_of(mode))

    def materialize(self, bits: int, mode: str | None = None, extra_precision: bool = False) -> Packed:
        """A flat copy with exactly `bits` bits per weight; extra precision is a sparse list in addition."""
        mode = self.mode if mode is None else mode
        check_mode(mode, extra_precision)
        if bits == 8:
            return replace(self, mode=mode)
        code = self.sliced(bits, mode, extra_precision)
        overflow = None
        if extra_precision:
            above = code > (1 << bits) - 1
            overflow = overflow_list(above)
            code = code - above.to(torch.uint8)
        return replace(self, planes=pack(code, bits), stored=bits, mode=mode, overflow=overflow)

    def prefix(self, bits: int) -> Packed:
        """Keep only the first planes (2, 3, 4 or 6 bits), as a file of that width; lower widths still work."""
        if bits not in (2, 3, 4, 6, 8) or self.mode != "prefix":
            raise ValueError(f"bits: must be 2, 3, 4, 6 or 8, of a prefix code (got {bits} of a {self.mode} code)")
        return replace(self, planes=self.read(bits), stored=bits)

    def nbytes(self, bits: int | None = None, mode: str | None = None) -> int:
        """Bytes read at `bits`: planes, scales, zero points, overflow; without `bits`, all bytes stored."""
        planes = self.planes if bits is None else self.read(bits, mode)
        tensors = [*planes, self.scale, self.zero_point]
        total = sum(t.numel() * t.element_size() for t in tensors)
        if self.overflow is not None:
            total += sum(t.numel() * t.element_size() for t in self.overflow)
        return total

    def to(self, device: torch.device | str) -> Packed:
        overflow = None if self.overflow is None else (self.overflow[0].to(device), self.overflow[1].to(device))
        planes = tuple(p.to(device) for p in self.planes)
        return replace(
            self, planes=planes, scale=self.scale.to(device), zero_point=self.zero_point.to(device), overflow=overflow
        )


def overflow_list(above: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean [out, in] → (crow int64 [out+1], col int32 [n])."""
    from gemmascope_fast.ops._csr import from_mask

    return from_mask(above)


__all__ = ["ROWS", "WIDTHS", "Packed", "bits_read", "pack", "slice_codes", "unpack"]
