"""Tensors in every layout: a launcher copies what a kernel cannot read directly."""

import pytest
import torch
from test_backend import calls


def transposed(t):
    """Columns in memory where rows are expected."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def strided(t):
    """Every second element of what is twice as long."""
    out = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 99, dtype=t.dtype)[..., ::2]
    return out.copy_(t)


def offset(t):
    """One element behind the start of its memory: not on 16 bytes."""
    return torch.cat((t.new_full((1,), 99), t.flatten()))[1:].view(t.shape)


def columns(t):
    """Some columns of what is wider."""
    out = torch.full((*t.shape[:-1], t.shape[-1] + 3), 99, dtype=t.dtype)[..., 1:-2]
    return out.copy_(t)


LAYOUTS = {f.__name__: f for f in (transposed, strided, offset, columns)}
CALLS = calls()


def flat(result):
    """The tensors of a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for part in result for t in flat(part)]
    count = min(int(result.count), result.capacity)  # FixedLatents: what lies beyond was never written
    return [result.crow_indices, result.col_indices[:count], result.values[:count]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_no_layout_changes_a_result(name, layout, same_bytes):
    function, tensors = CALLS[name]
    want = flat(function(*tensors))
    relaid = [LAYOUTS[layout](t) for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(relaid, tensors, strict=True))
    same_bytes(flat(function(*relaid)), want)
    same_bytes(flat(function(relaid[0], *tensors[1:])), want)
