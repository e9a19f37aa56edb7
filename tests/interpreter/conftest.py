"""Tests in Triton's interpreter.  The switch must stand before triton is imported, so they run in a process of
their own: tests/test_triton_interpreter.py starts it, `TRITON_INTERPRET=1 pytest tests/interpreter` does by hand."""

import os
import random

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(params=["in order", "shuffled"], autouse=True)
def grid_order(request, monkeypatch):
    """Programs run in the grid's order and in a shuffled one: no result may depend on it."""
    if request.param == "in order":
        return
    from triton.runtime import interpreter

    def shuffled(self, *args_dev, **kwargs):
        axes = self.grid(kwargs) if callable(self.grid) else self.grid
        order = list(range(axes[0]))
        random.Random(len(order)).shuffle(order)
        builder = interpreter.interpreter_builder
        plain = type(builder).set_grid_idx
        builder.set_grid_idx = lambda x, y, z: plain(builder, order[x], y, z)
        try:
            return in_order(self, *args_dev, **kwargs)
        finally:
            del builder.set_grid_idx

    in_order = interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", shuffled)


@pytest.fixture
def same_bytes():
    """Equal dtype, shape and bits."""

    def bits(t):
        return t.contiguous().view({2: torch.int16, 4: torch.int32}[t.element_size()]) if t.is_floating_point() else t

    def check(got, want):
        got, want = ([v] if isinstance(v, torch.Tensor) else list(v) for v in (got, want))
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.dtype
            assert g.shape == w.shape
            assert torch.equal(bits(g), bits(w))

    return check
