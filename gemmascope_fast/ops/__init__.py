"""Defines each op: schema, reference, fake, autograd, cost. Also SparseLatents and the arithmetic of nested codes."""

import importlib

from gemmascope_fast.ops._library import OPS, Cost, Op
from gemmascope_fast.ops.decode import decode, decode_reference
from gemmascope_fast.ops.encode import encode, encode_reference
from gemmascope_fast.ops.encode_screened import encode_screened, encode_screened_reference
from gemmascope_fast.ops.encode_tensor import encode_tensor, encode_tensor_reference
from gemmascope_fast.ops.encode_topk import encode_topk, encode_topk_reference
from gemmascope_fast.ops.encode_topk_screened import encode_topk_screened, encode_topk_screened_reference
from gemmascope_fast.ops.matryoshka_dequantize import matryoshka_dequantize, matryoshka_dequantize_reference
from gemmascope_fast.ops.matryoshka_linear import matryoshka_linear, matryoshka_linear_reference
from gemmascope_fast.ops.matryoshka_pack import matryoshka_pack, matryoshka_pack_reference
from gemmascope_fast.ops.matryoshka_slice import matryoshka_slice, matryoshka_slice_reference
from gemmascope_fast.ops.sampled_dot import sampled_dot, sampled_dot_reference
from gemmascope_fast.ops.screen_rows import screen_rows, screen_rows_reference
from gemmascope_fast.ops.transpose import csr_transpose, csr_transpose_reference

__all__ = [
    "OPS",
    "Cost",
    "Op",
    "csr_transpose",
    "csr_transpose_reference",
    "decode",
    "decode_reference",
    "encode",
    "encode_reference",
    "encode_screened",
    "encode_screened_reference",
    "encode_tensor",
    "encode_tensor_reference",
    "encode_topk",
    "encode_topk_reference",
    "encode_topk_screened",
    "encode_topk_screened_reference",
    "matryoshka_dequantize",
    "matryoshka_dequantize_reference",
    "matryoshka_linear",
    "matryoshka_linear_reference",
    "matryoshka_pack",
    "matryoshka_pack_reference",
    "matryoshka_slice",
    "matryoshka_slice_reference",
    "sampled_dot",
    "sampled_dot_reference",
    "screen_rows",
    "screen_rows_reference",
]

# Kernels register themselves, so importing the ops gives the fastest implementation, never silently the reference.
importlib.import_module("gemmascope_fast.backends")
