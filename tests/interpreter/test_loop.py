"""The fused loop against encode, edit and decode one after the other, byte for byte."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.attach import Ablate, Add, Clamp, Mask, MinClamp, Scale
from gemmascope_fast.attach.fused import edit_table
from gemmascope_fast.backends.gpu import loop
from gemmascope_fast.errors import BackendError

EDITS = [Ablate(0), Scale(3, 2.5), Clamp(5, 1.5), Add([7, 31], -0.75), MinClamp(9, 0.5), Clamp(39, 0.0)]


def case(T, d, F, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(T, d, generator=g), torch.randn(F, d, generator=g).to(dtype)
    b, theta = torch.randn(F, generator=g).to(dtype), torch.rand(F, generator=g).to(dtype)
    W_dec, b_dec = torch.randn(F, d, generator=g).to(dtype), torch.randn(d, generator=g).to(dtype)
    return x, rows.t(), b, theta, W_dec, b_dec


def composed(args, edits, error):
    """What attach does: base, plus a decode of the deltas that are not zero."""
    x, W, b, theta, W_dec, b_dec = args
    crow, col, values = ops.encode(x, W, b, theta, None)
    base = x.float() if error else ops.decode(crow, col, values, W_dec, b_dec, None)
    old = torch.zeros(len(x), W.shape[1])
    old[torch.repeat_interleave(torch.arange(len(x)), crow.diff()), col.long()] = values
    delta = torch.zeros_like(old)
    for edit in edits:
        for f in edit.features:
            delta[:, [f]] = edit.delta(old[:, [f]], delta[:, [f]], torch.tensor([float(edit.amount)]))
    counts = torch.zeros(len(x) + 1, dtype=torch.int64)
    counts[1:] = (delta != 0).sum(1).cumsum(0)
    at = delta.nonzero()
    extra = ops.decode(counts, at[:, 1].int(), delta[delta != 0], W_dec, None, None)
    changed = (delta != 0).any(1)[:, None]
    return torch.where(changed, base + extra, base), (crow, col, values)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 4])
def test_equals_the_parts(T, dtype, error, same_bytes):
    args = case(T, 70, 40, dtype)
    for edits in ([], EDITS):
        want, csr = composed(args, edits, error)
        out, latents = loop.splice(*args, edit_table(edits, 40), error)
        same_bytes(out, want)
        sparse = latents.sparse()
        same_bytes((sparse.crow_indices, sparse.col_indices, sparse.values), csr)


def test_an_edit_that_changes_nothing_passes_bit_for_bit(same_bytes):
    args = case(2, 20, 40)
    args[0][:, ::3] = -0.0
    out, _ = loop.splice(*args, edit_table([Scale(3, 1.0), MinClamp(4, -1.0)], 40), True)
    same_bytes(out, args[0])


@pytest.mark.parametrize("error", [False, True])
def test_infinite_and_nan_latents(error, same_bytes):
    """NaN is not below a least value, infinity times one is no change, infinity ablated is not a NaN delta."""
    args = case(5, 20, 40)
    args[0][1, 3], args[0][2, 3], args[0][3, 3], args[0][4, 3] = float("nan"), float("inf"), -float("inf"), 3e38
    for edits in ([MinClamp(9, 0.5)], [Scale([3, 4, 5, 6], 1.0)], [Ablate([0, 1, 2, 3])], EDITS):
        want, csr = composed(args, edits, error)
        out, latents = loop.splice(*args, edit_table(edits, 40), error)
        # which NaN a sum gives is up to the machine
        same_bytes(out.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
        assert torch.equal(out.isnan(), want.isnan())
        same_bytes(latents.sparse().values, csr[2])


def test_a_row_beyond_the_capacity_is_nan():
    args = case(3, 20, 40)
    out, latents = loop.splice(*args, capacity=int(ops.encode(*args[:4], None)[1].numel()) - 1)
    assert bool(out[2].isnan().all())
    assert not bool(out[:2].isnan().any())
    with pytest.raises(BackendError, match="do not fit"):
        latents.sparse()


def test_bad_arguments():
    args = case(2, 20, 40)
    with pytest.raises(ValueError, match="from 1 to 16 tokens"):
        loop.splice(args[0].repeat(9, 1), *args[1:])
    with pytest.raises(ValueError, match="two of feature 3"):
        edit_table([Clamp(3, 1.0), Ablate(3)], 40)
    with pytest.raises(TypeError, match="Mask"):
        edit_table([Mask([3])], 40)
    with pytest.raises(IndexError, match=r"\[0, 40\), got 40"):
        edit_table([Clamp(40, 1.0)], 40)
    with pytest.raises(ValueError, match="table for d_sae = 40"):
        loop.splice(*args, edit_table([], 41))
    with pytest.raises(ValueError, match="W_dec, b_dec"):
        loop.splice(*args[:4], args[4][1:], args[5])
