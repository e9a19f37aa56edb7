"""SparseLatents against dense tensors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import gemmascope_fast as gsf
from gemmascope_fast.dev.testing import same_bytes


def dense_case(rows, d_sae, seed=0, share=0.3, lead=None):
    g = torch.Generator().manual_seed(seed)
    dense = (torch.rand(rows, d_sae, generator=g) < share) * torch.randn(rows, d_sae, generator=g)
    return dense.reshape(*lead, d_sae) if lead else dense


shapes = st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(0, 50), st.sampled_from([0.0, 0.3, 1.0]))


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_dense_round_trip_and_validity(case):
    dense = dense_case(*case)
    latents = gsf.SparseLatents.from_dense(dense).validate()
    assert torch.equal(latents.to_dense(), dense)
    assert latents.nnz == int((dense != 0).sum())
    assert torch.equal(latents.l0(), (dense != 0).sum(-1))
    assert torch.equal(latents.row_indices(), dense.nonzero()[:, 0])
    assert latents == gsf.SparseLatents.from_dense(dense)
    assert len(latents) == latents.n_rows == case[0]


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 25))
def test_topk_is_torchs_padded(case, k):
    dense = dense_case(*case)
    dense[dense < 0] *= -1
    found = gsf.SparseLatents.from_dense(dense).topk(k)
    values, indices = found.values, found.indices
    kept = min(k, dense.shape[1])
    want = dense.topk(kept, dim=-1).values
    assert torch.equal(values[:, :kept], want)
    assert torch.equal(indices[:, :kept] >= 0, want > 0)
    assert not values[:, kept:].any()
    assert bool((indices[:, kept:] == -1).all())
    found = indices >= 0
    rows = torch.arange(dense.shape[0])[:, None].expand_as(indices)
    assert torch.equal(dense[rows[found], indices[found]], values[found])


def test_topk_of_ties_nan_and_negative_values():
    nan = float("nan")
    dense = torch.tensor([[3.0, 0, 3.0, nan], [-2.0, -1.0, 0, 0]])
    values, indices = gsf.SparseLatents.from_dense(dense).topk(3)
    assert indices.tolist() == [[3, 0, 2], [1, 0, -1]]
    assert values[0, 0].isnan()
    assert values[1].tolist() == [-1, -2, 0]
    with pytest.raises(ValueError, match="k: expected 0 or more, got -1"):
        gsf.SparseLatents.from_dense(dense).topk(-1)


@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_features_are_columns(case, data):
    dense = dense_case(*case)
    ids = data.draw(st.lists(st.integers(0, case[1] - 1), max_size=8))
    latents = gsf.SparseLatents.from_dense(dense)
    assert torch.equal(latents.features(ids), dense[:, ids])
    for bad in (case[1], -1):
        with pytest.raises(IndexError, match=r"ids: expected features in \[0"):
            latents.features([*ids, bad])


@settings(max_examples=100, deadline=None)
@given(shapes, st.data())
def test_slicing_is_that_of_rows(case, data):
    dense = dense_case(*case)
    latents, n = gsf.SparseLatents.from_dense(dense), case[0]
    bound = st.none() | st.integers(-12, 12)
    key = slice(data.draw(bound), data.draw(bound), data.draw(st.sampled_from([None, 1, 2, 5, -1, -3])))
    wanted = dense[list(range(*key.indices(n)))]
    assert torch.equal(latents[key].validate().to_dense(), wanted)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    assert torch.equal(latents[mask].validate().to_dense(), dense[mask])
    if n:
        rows = torch.tensor(data.draw(st.lists(st.integers(-n, n - 1), max_size=6)), dtype=torch.int64)
        assert torch.equal(latents[rows].validate().to_dense(), dense[rows])
        one = data.draw(st.integers(-n, n - 1))
        assert torch.equal(latents[one].to_dense(), dense[one])
    for bad in (n, -n - 1):
        with pytest.raises(IndexError, match="out of bounds for dimension 0"):
            latents[bad]
    with pytest.raises(IndexError, match="mask: expected"):
        latents[torch.ones(n + 1, dtype=torch.bool)]


def test_rows_out_of_range_are_an_index_error():
    latents = gsf.SparseLatents.from_dense(dense_case(4, 6))
    for rows in ([4], [-5], [0, 9]):
        with pytest.raises(IndexError):
            latents[torch.tensor(rows)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99)), min_size=1, max_size=4))
def test_cat_is_that_of_rows(parts):
    dense = [dense_case(rows, 7, seed) for rows, seed in parts]
    whole = gsf.SparseLatents.cat([gsf.SparseLatents.from_dense(d) for d in dense])
    assert torch.equal(whole.validate().to_dense(), torch.cat(dense))


def test_cat_of_none_or_of_unequal_widths():
    with pytest.raises(ValueError, match="cat: expected parts with the same d_sae"):
        gsf.SparseLatents.cat([])
    with pytest.raises(ValueError, match="cat: expected parts with the same d_sae"):
        gsf.SparseLatents.cat([gsf.SparseLatents.empty((1, 3)), gsf.SparseLatents.empty((1, 4))])


def test_leading_dimensions():
    dense = dense_case(6, 11, lead=(2, 3))
    latents = gsf.SparseLatents.from_dense(dense)
    assert latents.shape == (2, 3, 11)
    assert torch.equal(latents.to_dense(), dense)
    assert latents.l0().shape == (2, 3)
    assert [t.shape for t in latents.topk(4)] == [(2, 3, 4), (2, 3, 4)]
    assert latents.features([1, 2]).shape == (2, 3, 2)
    assert torch.equal(latents.reshape(6).to_dense(), dense.reshape(6, 11))
    assert torch.equal(latents.to_sparse_csr().to_dense(), dense.reshape(6, 11))
    assert "shape=(2, 3, 11)" in repr(latents)


def test_to_sparse_csr_passes_torchs_checks():
    latents = gsf.SparseLatents.from_dense(dense_case(5, 9))
    with torch.sparse.check_sparse_tensor_invariants():
        csr = latents.to_sparse_csr()
    assert csr.crow_indices().dtype == csr.col_indices().dtype == torch.int64


def test_gradients_live_on_values():
    dense = dense_case(5, 9)
    latents = gsf.SparseLatents.from_dense(dense)
    weight = torch.randn(5, 9)
    for form in (
        lambda s: (s.to_dense() * weight).sum(),
        lambda s: (s.features(range(9)) * weight).sum(),
        lambda s: (s[torch.arange(5)].to_dense() * weight).sum(),
        lambda s: (gsf.SparseLatents.cat([s[:2], s[2:]]).to_dense() * weight).sum(),
    ):
        values = latents.values.clone().requires_grad_()
        form(latents.with_values(values)).backward()
        assert torch.equal(values.grad, weight[dense != 0])
    values = latents.values.clone().requires_grad_()
    top, _ = latents.with_values(values).topk(9)
    top.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert not latents.with_values(values).detach().values.requires_grad


def test_nan_counts_as_not_zero_and_equality_is_of_bytes():
    dense = torch.tensor([[0.0, float("nan"), 1.0]])
    latents = gsf.SparseLatents.from_dense(dense)
    assert latents.nnz == 2
    assert latents.l0().tolist() == [2]
    assert latents == gsf.SparseLatents.from_dense(dense)
    assert latents != gsf.SparseLatents.from_dense(dense.nan_to_num(2.0))
    assert latents != latents.reshape(1, 1)
    assert latents != latents.to(torch.bfloat16)
    zero = latents.with_values(torch.tensor([0.0, 1.0]))
    assert zero != latents.with_values(torch.tensor([-0.0, 1.0]))
    assert zero.nonzero().col_indices.tolist() == [2]
    assert (latents == 3) is False
    with pytest.raises(TypeError):
        hash(latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype):
    latents = gsf.SparseLatents.from_dense(dense_case(6, 11, lead=(2, 3)).to(dtype))
    latents.save(tmp_path / "latents.safetensors")
    assert gsf.SparseLatents.load(tmp_path / "latents.safetensors") == latents
    latents[1:4].save(tmp_path / "part.safetensors")
    assert gsf.SparseLatents.load(tmp_path / "part.safetensors") == latents[1:4]


def test_moving_and_copying():
    latents = gsf.SparseLatents.from_dense(dense_case(5, 9))
    half = latents.to(torch.bfloat16)
    assert (half.dtype, half.col_indices.dtype, half.crow_indices.dtype) == (torch.bfloat16, torch.int32, torch.int64)
    assert latents.cpu() == latents == copy.deepcopy(latents)
    meta = latents.to("meta")
    assert {t.device.type for t in (meta.crow_indices, meta.col_indices, meta.values)} == {"meta"}


def test_is_a_pytree():
    latents = gsf.SparseLatents.from_dense(dense_case(5, 9))
    leaves, spec = pytree.tree_flatten({"a": latents, "b": 1})
    assert len(leaves) == 4
    assert pytree.tree_unflatten(leaves, spec)["a"] == latents
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2 if t.is_floating_point() else t, latents)
    assert same_bytes(doubled.values, latents.values * 2)


@pytest.mark.parametrize(
    ("crow", "col", "values", "kind", "message"),
    [
        ([0, 2, 3], [0, 4, 1], [1.0] * 3, IndexError, "col_indices"),
        ([0, 2, 3], [0, -1, 1], [1.0] * 3, IndexError, "col_indices"),
        ([0, 2, 3], [1, 0, 1], [1.0] * 3, ValueError, "ascending"),
        ([0, 2, 3], [1, 1, 1], [1.0] * 3, ValueError, "ascending"),
        ([0, 3, 2], [0, 1, 2], [1.0] * 3, ValueError, "crow_indices"),
        ([1, 2, 3], [0, 1, 2], [1.0] * 3, ValueError, "crow_indices"),
        ([0, 2, 3], [0, 1, 2], [1.0] * 2, ValueError, "values"),
    ],
)
def test_validate(crow, col, values, kind, message):
    latents = gsf.SparseLatents(torch.tensor(crow), torch.tensor(col, dtype=torch.int32), torch.tensor(values), (2, 4))
    with pytest.raises(kind, match=message):
        latents.validate()


def test_validate_takes_falling_columns_only_across_rows():
    crow, col = torch.tensor([0, 0, 2, 2, 4, 4]), torch.tensor([1, 3, 0, 2], dtype=torch.int32)
    gsf.SparseLatents(crow, col, torch.ones(4), (5, 4)).validate()


def test_constructor_checks_the_number_of_rows():
    with pytest.raises(ValueError, match="crow_indices: expected 4 offsets"):
        gsf.SparseLatents(torch.zeros(3), torch.zeros(0), torch.zeros(0), (3, 5))
    with pytest.raises(ValueError, match="crow_indices: expected"):
        gsf.SparseLatents(torch.zeros(3), torch.zeros(0), torch.zeros(0), ())
    with pytest.raises(TypeError, match="dense: expected a floating dtype"):
        gsf.SparseLatents.from_dense(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("ids", [[0, 5, 5, 19], [3], [], torch.tensor([19, 0, 7])])
def test_features_of_one_row_are_those_of_many(ids):
    """A decoded token is looked up in another way than a text."""
    dense = torch.zeros(3, 20)
    dense[0, [0, 5, 18]] = torch.tensor([1.5, float("nan"), 2.5])
    dense[1, [7, 19]] = torch.tensor([-1.0, float("inf")])
    latents = gsf.SparseLatents.from_dense(dense)
    for row in range(3):
        one = latents[row].features(ids)
        assert one.shape == (len(ids),)
        torch.testing.assert_close(one, dense[row, torch.as_tensor(ids, dtype=torch.int64)], equal_nan=True)
        torch.testing.assert_close(one, latents.features(ids)[row], equal_nan=True)
        for wrong in ([20], [-1], torch.tensor([3, 20])):
            with pytest.raises(IndexError, match="ids"):
                latents[row].features(wrong)
