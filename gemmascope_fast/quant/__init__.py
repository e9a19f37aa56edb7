"""Running nested codes: matrices, linear layers, SAEs. Arithmetic is in ops/codes.py, training in training/nested/."""

from gemmascope_fast.ops.codes import Codes, grid, quantize, slice_codes
from gemmascope_fast.quant.linear import MatryoshkaLinear
from gemmascope_fast.quant.model import layers, load_, nbytes, quantize_, save, set_bits, targets
from gemmascope_fast.quant.planes import Packed, bits_read
from gemmascope_fast.quant.sae import MatryoshkaSAE

__all__ = [
    "Codes",
    "MatryoshkaLinear",
    "MatryoshkaSAE",
    "Packed",
    "bits_read",
    "grid",
    "layers",
    "load_",
    "nbytes",
    "quantize",
    "quantize_",
    "save",
    "set_bits",
    "slice_codes",
    "targets",
]
