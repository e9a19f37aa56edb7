"""Tests in Triton's interpreter, in a separate process: the variable must be set before triton is imported.

tests/backends/test_triton_interpreter.py starts it; by hand: `TRITON_INTERPRET=1 pytest tests/interpreter`.
"""

import os
import random
import sys

import pytest
import torch

COMPILED = (
    os.environ.get("GSF_PTX") == "1"
)  # tests/ptx/ptx_triton_plugin.py runs compiled kernels in the interpreter's place
collect_ignore_glob = [] if COMPILED or os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def in_order(executor, kept=[]):  # noqa: B006  the interpreter's own __call__, asked for once
    if not kept:
        kept.append(executor.__call__)
    return kept[0]


@pytest.fixture(autouse=True)
def grid_order(monkeypatch):
    """Programs run in a shuffled order: no result may depend on it."""
    from triton.runtime import interpreter

    def shuffled(self, *args_dev, **kwargs):
        # kernels read memory, not strides
        assert all(a.is_contiguous() for a in args_dev if isinstance(a, torch.Tensor))
        axes = self.grid(kwargs) if callable(self.grid) else self.grid
        order = list(range(axes[0]))
        random.Random(len(order)).shuffle(order)
        builder = interpreter.interpreter_builder
        plain = type(builder).set_grid_idx
        builder.set_grid_idx = lambda x, y, z: plain(builder, order[x], y, z)
        try:
            return run(self, *args_dev, **kwargs)
        finally:
            del builder.set_grid_idx

    run = in_order(interpreter.GridExecutor)
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


@pytest.fixture
def last_program(monkeypatch):
    """Only the last program of each grid runs: for tensors of which nobody can fill the whole."""
    if COMPILED:
        monkeypatch.setattr(sys.modules["ptx_library"].Options, "last_block_alone", True)
        return
    from triton.runtime import interpreter

    def last(self, *args_dev, **kwargs):
        builder, axes = interpreter.interpreter_builder, self.grid
        self.grid = (1,)
        builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (axes[0] - 1, y, z))
        try:
            return run(self, *args_dev, **kwargs)
        finally:
            del builder.set_grid_idx
            self.grid = axes

    run = in_order(interpreter.GridExecutor)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", last)
    # results lie in the arguments already: a copy of them would touch every page
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
