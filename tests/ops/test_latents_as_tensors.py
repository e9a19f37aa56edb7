"""SparseLatents compared with the dense tensor, operation by operation."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import gemmascope_fast as gsf

LEADS = [(), (1,), (5,), (0,), (2, 5), (2, 0), (3, 1, 4)]
F = 7
NAN = float("nan")


def dense_case(lead, seed=0, dtype=torch.float32, negative=False):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(*lead, F, generator=g)
    values = values if negative else values.abs()
    return ((torch.rand(*lead, F, generator=g) < 0.5) * values).to(dtype)


def pair(lead, **more):
    dense = dense_case(lead, **more)
    return dense, gsf.SparseLatents.from_dense(dense)


def assert_same(ours, theirs):
    if isinstance(ours, gsf.SparseLatents):
        ours.validate()
        assert ours.shape == tuple(theirs.shape)
        ours = ours.to_dense()
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


I2 = torch.tensor([1, 0, -1, 1])
M5 = torch.tensor([True, False, True, True, False])
INDICES = {
    (): [..., (...,), (..., 3), (slice(None),), (..., [1, -1]), None, 3, [0, 2, 2], torch.tensor(4)],
    (5,): [
        0, -1, slice(None), slice(1, 4), slice(None, None, 2), slice(4, 1), slice(-3, None), [0, 2, -1], I2, M5, ...,
        None, (..., slice(None)), (0, slice(None)), (0, 3), (slice(1, 3), -2), (slice(None), [1, 4]), (M5, 2), (I2, 0),
        np.array([3, 1]), np.int64(2), range(2), torch.tensor([[0, 1], [2, 4]]), torch.tensor(3), I2.int(),
        M5.tolist(), M5.numpy(), [], torch.zeros(5, dtype=torch.bool), (2, [1, 1, 0]), (None, 2), (0, ..., 3),
        (0, torch.tensor([3, 6])),
    ],
    (2, 5): [
        0, -2, (0, 1), (1, -1), slice(None), (slice(None), 0), (slice(None), slice(1, 4)), (1, slice(None, None, 3)),
        torch.ones(2, 5, dtype=torch.bool), torch.arange(10).reshape(2, 5) % 3 == 0, (slice(None), M5), (0, M5),
        (1, I2), (slice(None), I2), (I2, I2), [1, 0], ..., (..., 2, slice(None)), (0, ...), (0, ..., slice(None)),
        (..., 3),
        (0, slice(None), 3), (slice(None), slice(None), [2, 0]), (0, 1, 4), (None, 0), (0, None), (slice(0, 0), 1),
        torch.tensor([True, False]), torch.tensor(1), (torch.tensor([[0], [1]]), torch.tensor([0, 3])),
        (slice(None), I2, 3), (0, 2, [5, 1]), (..., [1, 2]), (slice(1, 2), slice(2, 4), slice(None)),
    ],
    (3, 1, 4): [
        2, (0, 0), (0, 0, 3), (..., 1, slice(None)), (slice(None, None, 2), 0), (1, ..., 2), (I2, 0, I2), (0, 0, 0, 0),
    ],
    (2, 0): [0, (0, slice(None)), (slice(None), slice(0, 0)), torch.zeros(2, 0, dtype=torch.bool)],
}  # fmt: skip


@pytest.mark.parametrize(("lead", "key"), [(lead, key) for lead, keys in INDICES.items() for key in keys])
def test_indexing(lead, key):
    dense, latents = pair(lead)
    plain = tuple(list(k) if isinstance(k, range) else k for k in key) if isinstance(key, tuple) else key
    assert_same(latents[key], dense[list(key) if isinstance(key, range) else plain])


def test_steps_may_be_negative():
    dense, latents = pair((3, 5))
    assert_same(latents[::-1], dense.flip(0))
    assert_same(latents[1, ::-2], dense[1].flip(0)[::2])
    assert_same(latents[:, 3:0:-1], dense[:, 1:4].flip(1))


@pytest.mark.parametrize(
    ("lead", "key", "kind"),
    [
        ((), (0, 0), IndexError),
        ((), F, IndexError),
        ((5,), 5, IndexError),
        ((5,), -6, IndexError),
        ((5,), (0, F), IndexError),
        ((5,), (0, 0, 0), IndexError),
        ((5,), (slice(None), slice(0, 3)), IndexError),
        ((5,), torch.ones(4, dtype=torch.bool), IndexError),
        ((5,), torch.ones(5, F, dtype=torch.bool), IndexError),
        ((5,), torch.tensor([5]), IndexError),
        ((5,), torch.tensor([0.5]), IndexError),
        ((5,), (I2, [0, 1, 2, 3]), IndexError),
        ((5,), (..., 0, ...), IndexError),
        ((5,), (slice(None), slice(None), None), IndexError),
        ((2, 5), (0, 5), IndexError),
        ((2, 5), 2, IndexError),
        ((2, 5), torch.ones(10, dtype=torch.bool), IndexError),
        ((2, 5), torch.ones(2, 5, F, dtype=torch.bool), IndexError),
        ((5,), "a", TypeError),
        ((5,), 1.5, TypeError),
        ((5,), True, TypeError),
        ((5,), object(), TypeError),
        ((5,), {1}, TypeError),
    ],
)
def test_other_indices_are_errors_of_one_sentence(lead, key, kind):
    _dense, latents = pair(lead)
    with pytest.raises(kind) as raised:
        latents[key]
    assert "\n" not in str(raised.value)
    assert str(raised.value)


@pytest.mark.parametrize("lead", LEADS)
def test_size_and_iteration(lead):
    dense, latents = pair(lead)
    assert (len(latents), latents.ndim, latents.dim(), latents.numel()) == (
        len(dense), dense.ndim, dense.dim(), dense.numel(),
    )  # fmt: skip
    assert latents.size() == tuple(dense.size())
    assert latents.size(-1) == dense.size(-1)
    if not lead:
        with pytest.raises(TypeError, match="no rows to iterate over"):
            iter(latents)
        return
    parts = list(latents)
    assert len(parts) == len(dense)
    for part, theirs in zip(parts, dense, strict=True):
        assert_same(part, theirs)


def test_reshape_is_that_of_rows_and_of_tensors():
    dense, latents = pair((10,))
    assert latents.reshape(2, 5).values is latents.values
    for shape in ((2, 5), (5, 2), (-1, 5), (2, -1), (1, 10), (10,), (-1,)):
        assert_same(latents.reshape(*shape), dense.reshape(*shape, F))
        assert_same(latents.view(*shape, F), dense.view(*shape, F))
        assert_same(latents.reshape((*shape, F)), dense.reshape(*shape, F))
        assert_same(latents.reshape(torch.Size([2, 5])), dense.reshape(2, 5, F))
    for shape in ((3, 5), (-1, 3), (-1, -1), (-2, 5), (10, F + 1), ()):
        with pytest.raises(ValueError, match="shape: expected leading dimensions of 10 rows"):
            latents.reshape(*shape)
    one_row_of_two, dense = pair((2 * F,))[::-1]
    assert one_row_of_two.reshape(2, F).shape == (2, F, F)  # not a tensor's shape: that has 2 rows
    assert one_row_of_two.reshape(-1, F).shape == (2 * F, F)  # reads both ways
    assert gsf.SparseLatents.empty((3, 0, F)).reshape(0).shape == (0, F)
    assert pair((1,))[1].reshape().shape == (F,)
    assert pair((1,))[1].reshape(F).shape == (F,)


def dims_of(ndim):
    singles = [d for i in range(ndim) for d in (i, i - ndim)]
    pairs = [(i, j) for i in range(ndim) for j in range(i)]
    return [None, *singles, *pairs, tuple(range(ndim))]


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", LEADS)
def test_sum_and_mean(lead, dtype, keepdim):
    dense, latents = pair(lead, dtype=dtype, negative=True)
    for dim in dims_of(dense.ndim):
        for name in ("sum", "mean"):
            ours, wide = getattr(latents, name)(dim, keepdim), getattr(dense.double(), name)(dim, keepdim)
            assert ours.shape == wide.shape
            assert_same(ours, wide.to(dtype))
    with pytest.raises(IndexError, match="dim: expected one in"):
        latents.sum(dense.ndim)
    with pytest.raises(IndexError, match="dim: expected each dimension once"):
        latents.mean((-1, dense.ndim - 1))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("kind", ["positive", "negative", "nan", "whole", "ties", "stored zeros"])
@pytest.mark.parametrize("lead", LEADS)
def test_max(lead, kind, keepdim):
    dense, latents = pair(lead, negative=kind == "negative")
    if kind == "nan":
        dense = dense.masked_fill(dense > 0.8, NAN)
    if kind == "whole":
        dense = -1 - dense
    if kind == "ties":
        dense = dense.ceil()
    latents = gsf.SparseLatents.from_dense(dense)
    if kind == "stored zeros":
        latents = latents.with_values(torch.where(latents.values > 0.5, 0.0, -latents.values))
        dense = latents.to_dense()
    if not dense.numel():
        with pytest.raises(IndexError, match="max: expected at least one entry"):
            latents.max()
    else:
        assert_same(latents.max(), dense.max())
    for dim in range(-dense.ndim, dense.ndim):
        if not dense.shape[dim]:
            with pytest.raises(IndexError, match="max: expected a dimension with entries"):
                latents.max(dim)
            continue
        ours, theirs = latents.max(dim, keepdim), dense.max(dim, keepdim)
        assert_same(ours.values, theirs.values)
        assert_same(ours.indices, theirs.indices)
    with pytest.raises(IndexError, match="dim: expected one in"):
        latents.max(dense.ndim)


def test_gradients_of_reductions_and_indexing_are_those_of_the_dense_tensor():
    dense, latents = pair((3, 4))
    weight = torch.randn(F, generator=torch.Generator().manual_seed(1))
    for call in (
        lambda t: t.sum(0) @ weight,
        lambda t: t.mean((0, 2)),
        lambda t: t.mean(),
        lambda t: t.max(-1).values,
        lambda t: t.max(1)[0] @ weight,
        lambda t: t.max(),
        lambda t: t[1, :, 3],
        lambda t: (t * 3.0).sum(),
        lambda t: (t / 4)[0].sum(),
        lambda t: sum(part.sum() for part in t),
    ):
        leaf, values = dense.clone().requires_grad_(), latents.values.clone().requires_grad_()
        call(leaf).sum().backward()
        call(latents.with_values(values)).sum().backward()
        torch.testing.assert_close(values.grad, leaf.grad[dense != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalar", [2, 0.5, -1.5, 0, np.float32(3), np.float64(0.3), torch.tensor(2.5), True])
def test_times_a_scalar(scalar, dtype):
    dense, latents = pair((2, 5), dtype=dtype)
    assert_same(latents * scalar, (dense * scalar).to(dtype))
    assert_same(scalar * latents, (dense * scalar).to(dtype))
    assert_same(-latents, -dense)
    if scalar:
        assert_same(latents / scalar, (dense / scalar).to(dtype))


def test_what_is_no_scalar():
    latents = pair((2, 5))[1]
    for other in (torch.ones(5), "2", None, 1j, [2], torch.tensor(1j), latents):
        for call in (lambda: latents * other, lambda: other * latents, lambda: latents / other):  # noqa: B023
            with pytest.raises(TypeError, match=r"unsupported operand|can't multiply"):
                call()
    for bad in (NAN, float("inf"), -float("inf"), torch.tensor(NAN)):
        with pytest.raises(ValueError, match="scalar: expected a finite number"):
            latents * bad
    for zero in (0, 0.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="scalar: expected a number other than 0"):
            latents / zero


def test_topk_is_named_as_torchs():
    dense, latents = pair((2, 5))
    found, theirs = latents.topk(2), dense.topk(2)
    assert_same(found.values, theirs.values)
    fired = theirs.values > 0
    assert_same(found.indices[fired], theirs.indices[fired])
    assert bool((found.indices[~fired] == -1).all())
    values, indices = found
    assert values is found.values
    assert indices is found.indices
    assert latents[0].topk(2).values.shape == (5, 2)
    assert latents[0, 0].topk(3).indices.shape == (3,)


def test_repr_counts_rows_that_hold_something():
    dense = torch.zeros(4, 6)
    dense[1, :4] = dense[3, 2:] = 1.0
    latents = gsf.SparseLatents.from_dense(dense)
    assert "l0=4.0 over the 2 of 4 rows not empty" in repr(latents)
    assert "l0=4.0," in repr(latents[1::2])
    assert "l0=0.0 over the 0 of 2 rows not empty" in repr(latents[::2])
    stored = latents.with_values(torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]))  # zeros of a bandwidth do not count
    assert "l0=3.0 over" in repr(stored)
    assert "l0=?" in repr(latents.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", LEADS)
def test_torch_save_and_load(lead, dtype):
    latents = pair(lead, dtype=dtype)[1]
    both = {3: latents, "more": [latents.detach(), torch.ones(2)]}
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert found[3] == latents == found["more"][0]
    assert pickle.loads(pickle.dumps(latents)) == latents


def test_a_saved_file_is_loaded_by_another_process(tmp_path):
    dense, latents = pair((2, 5))
    torch.save(latents[1:], tmp_path / "part.pt")
    code = (
        "import sys, torch\n"
        "from gemmascope_fast import SparseLatents\n"
        "part = torch.load(sys.argv[1], weights_only=True)\n"
        "assert type(part) is SparseLatents and part.shape == (1, 5, 7)\n"
        "print(float(part.sum()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "part.pt"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(float(dense[1:].sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("col_indices", torch.tensor([99], dtype=torch.int32), IndexError, "col_indices"),
        ("crow_indices", torch.tensor([0, 5]), ValueError, "crow_indices"),
        ("crow_indices", torch.tensor([0, 1, 1]), ValueError, "crow_indices: expected 2 offsets"),
        ("values", torch.ones(3), ValueError, "values"),
        ("values", [1.0], ValueError, "SparseLatents: expected"),
        ("shape", (1, -3), IndexError, "col_indices"),
    ],
)
def test_a_forged_file_is_an_error(name, value, kind, message):
    latents = gsf.SparseLatents.from_dense(torch.eye(3)[:1])
    setattr(latents, name, value)
    file = io.BytesIO()
    torch.save(latents, file)
    file.seek(0)
    with pytest.raises((kind, pickle.UnpicklingError), match=message):
        torch.load(file, weights_only=True)
