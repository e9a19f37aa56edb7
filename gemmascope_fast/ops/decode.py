"""Op `decode`: sparse rows times a matrix of feature rows.

out[n] = sum over the row's features, in ascending order, of values · W_dec[f] by fused multiply-add; then b_dec.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemmascope_fast.ops._csr import check_csr, row_indices
from gemmascope_fast.ops._library import Cost, register, register_autograd
from gemmascope_fast.ops.sampled_dot import sampled_dot, tangent_of_dots
from gemmascope_fast.ops.transpose import csr_transpose

SCHEMA = (
    "decode(Tensor crow_indices, Tensor col_indices, Tensor values, Tensor W_dec, Tensor? b_dec=None,"
    " Tensor? row_scale=None) -> Tensor"
)


def decode_reference(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """crow_indices int64 [N+1], col_indices int32 [nnz], values [nnz], W_dec [d_sae, d_out] → fp32 [N, d_out].

    W_dec is float32, bfloat16, float16, or int8 with a row_scale [d_sae] that multiplies the values.
    """
    check_decode(crow_indices, col_indices, values, W_dec, b_dec, row_scale)
    col = col_indices.long()
    scaled = values.float() if row_scale is None else values.float() * row_scale.float()[col]
    out = torch.zeros(crow_indices.numel() - 1, W_dec.shape[1], device=W_dec.device)
    out = out.index_add(0, row_indices(crow_indices), scaled[:, None] * W_dec[col].float())
    return out if b_dec is None else out + b_dec.float()


def check_decode(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    row_scale: Tensor | None,
    pattern: bool = True,
) -> None:
    """What the native kernel checks, for the reference and the GPU.  pattern: also crow_indices and col_indices, which
    reads them back from a GPU."""
    if W_dec.dim() != 2:
        raise ValueError(f"W_dec: expected [d_sae, d_out], got {tuple(W_dec.shape)}")
    if W_dec.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        raise TypeError(f"W_dec: expected float32, bfloat16, float16 or int8, got {W_dec.dtype}")
    if W_dec.dtype == torch.int8 and row_scale is None:
        raise ValueError("row_scale: required for int8 W_dec")
    if pattern:
        check_csr(crow_indices, col_indices, W_dec.shape[0])
    if not values.is_floating_point():
        raise TypeError(f"values: expected a floating dtype, got {values.dtype}")
    shapes = (
        ("values", values, col_indices.shape),
        ("b_dec", b_dec, W_dec.shape[1:]),
        ("row_scale", row_scale, W_dec.shape[:1]),
    )
    for name, tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _fake(crow_indices: Tensor, col_indices: Tensor, values: Tensor, W_dec: Tensor, *_: object) -> Tensor:
    return W_dec.new_empty(crow_indices.shape[0] - 1, W_dec.shape[1], dtype=torch.float32)


def _cost(crow_indices: Tensor, col_indices: Tensor, values: Tensor, W_dec: Tensor, *_: object) -> Cost:
    nnz, d = col_indices.numel(), W_dec.shape[1]
    rows = min(nnz, W_dec.shape[0]) * d * W_dec.element_size()
    return Cost(bytes=rows + 8 * nnz + 4 * (crow_indices.numel() - 1) * d, flops=2 * nnz * d)


decode = register(SCHEMA, decode_reference, _fake, _cost)


# ---- gradients of decode and sampled_dot: each uses the other ------------------------------------------------


def _save(ctx, inputs, output):
    return inputs


def _decode_backward(ctx, needs, grad):
    """dvalues[i] = grad[n] · W_dec[f];  dW_dec[f] = sum over n, in ascending order, of values · grad[n]."""
    crow, col, values, W_dec, b_dec, row_scale = ctx.saved_tensors
    _crow, _col, need_values, need_W, need_b, need_scale = needs
    if row_scale is not None and (need_values or need_W or need_scale):
        raise ValueError("row_scale: decode with scaled rows has no gradient; decode with W_dec itself")
    dvalues = dW = db = None
    grad = grad.contiguous()
    if need_values:
        dvalues = sampled_dot.step(grad, W_dec, None, crow, col).to(values.dtype)
    if need_W:
        ccol, rows, order = csr_transpose.step(crow, col, W_dec.shape[0])
        dW = decode.step(ccol, rows, values[order], grad, None, None).to(W_dec.dtype)
    if need_b:
        db = grad.sum(0).to(b_dec.dtype)
    return None, None, dvalues, dW, db, None


def _decode_jvp(ctx, _crow, _col, dvalues, dW, db, dscale):
    """The output is linear in values, in W_dec and in b_dec."""
    crow, col, values, W_dec, _b_dec, row_scale = ctx.saved_tensors
    parts = [] if db is None else [db.float().expand(crow.numel() - 1, -1)]
    for v, rows, scale in (
        (dvalues, W_dec, row_scale),
        (values if dW is not None else None, dW, row_scale),
        (values if dscale is not None else None, W_dec, dscale),
    ):
        if v is not None:
            parts.append(decode.step(crow, col, v, rows, None, scale))
    return sum(parts[1:], parts[0])


def backward_of_dots(inputs: tuple[Tensor, ...], needs, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, rows and bias (of those that `needs` asks for) where z = x[n] · rows[f] + bias[f] on the pairs of
    a pattern.  inputs: x, rows, bias, crow_indices, col_indices; grad fp32 [nnz].

    dx[n] = sum of g · rows[f];  drows[f] = sum of g · x[n];  dbias[f] = sum of g: all sparse decodes.
    """
    x, rows, bias, crow, col = inputs
    need_x, need_rows, need_bias = needs[:3]
    dx = drows = dbias = None
    grad = grad.contiguous()
    if need_x:
        dx = decode.step(crow, col, grad, rows, None, None).to(x.dtype)
    if need_rows or need_bias:
        ccol, row, order = csr_transpose.step(crow, col, rows.shape[0])
        by_feature = grad[order]
        if need_rows:
            drows = decode.step(ccol, row, by_feature, x, None, None).to(rows.dtype)
        if need_bias:
            ones = torch.ones(x.shape[0], 1, device=x.device)
            dbias = decode.step(ccol, row, by_feature, ones, None, None)[:, 0].to(bias.dtype)
    return dx, drows, dbias


def _dot_backward(ctx, needs, grad):
    return (*backward_of_dots(ctx.saved_tensors, needs, grad), None, None)


def _dot_jvp(ctx, dx, drows, dbias, _crow, _col):
    x, rows, _bias, crow, col = ctx.saved_tensors
    return tangent_of_dots((x, dx), (rows, drows), dbias, crow, col)


register_autograd(decode, _save, _decode_backward, _decode_jvp)
register_autograd(sampled_dot, _save, _dot_backward, _dot_jvp)
