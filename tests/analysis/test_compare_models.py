"""Two models compared: figures recomputed by numpy or by hand; the command."""

import json

import numpy as np
import pytest
import torch
from tiny_model import F, letters, make_sae
from two_models import KEY, base, save_two

from gemmascope_fast import JumpReLUSAE, SparseLatents
from gemmascope_fast.analysis.compare.models import (
    by_span,
    changes,
    common_spans,
    gather,
    matched_features,
    matches,
    phi,
    token_ends,
)
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.cli import main as cli

sparse = pytest.importorskip("scipy.sparse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_two(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder / "a"))


def test_spans_end_where_both_have_a_token_end():
    # "the cat" as the| cat and t|he| c|at
    a, b, count = common_spans(np.array([3, 7]), np.array([1, 3, 5, 7]))
    assert (a.tolist(), b.tolist(), count) == ([0, 1], [0, 0, 1, 1], 2)
    a, b, count = common_spans(np.array([2, 5]), np.array([3, 5]))
    assert (a.tolist(), b.tolist(), count) == ([0, 0], [0, 0], 1)
    # left over at the end: with the last span
    a, b, count = common_spans(np.array([1, 2]), np.array([1, 3]))
    assert (a.tolist(), b.tolist(), count) == ([0, 0], [0, 0], 1)
    assert common_spans(np.array([], int), np.array([], int))[2] == 0


def test_the_largest_value_of_a_span_counts():
    dense = torch.tensor([[0, 2.0, 0], [1, 3, 0], [0, 0, 4]])
    span, feature, value = by_span(SparseLatents.from_dense(dense), np.array([0, 0, 1]))
    assert list(zip(span.tolist(), feature.tolist(), value.tolist(), strict=True)) == [(0, 0, 1), (0, 1, 3), (1, 2, 4)]


def test_correlations_are_numpys(monkeypatch):
    from gemmascope_fast.analysis.compare import models

    monkeypatch.setattr(models, "BLOCK", 4)
    rng = np.random.default_rng(0)
    a, b = rng.random((50, 9)) < 0.3, rng.random((50, 7)) < 0.4
    a[:, 2] = b[:, 5]
    b[:, 1] = True
    with np.errstate(invalid="ignore", divide="ignore"):
        want = np.nan_to_num(np.corrcoef(a.T, b.T)[:9, 9:])
    x, y = sparse.csc_array(a.astype(float)), sparse.csc_array(b.astype(float))
    got = np.concatenate([block for _, block in phi(x, y)])
    assert np.allclose(got, want)
    found = matched_features(x, y)
    assert np.allclose(found["correlation"], want.max(1).clip(min=0))
    assert found["match"][2] == 5
    assert found["back"][5] == 2
    assert np.allclose(found["back_correlation"], want.max(0).clip(min=0))
    assert found["back"][1] == -1


def test_the_same_features_in_another_order_are_matched(loaded):
    sae, order = make_sae(), torch.randperm(F, generator=torch.Generator().manual_seed(5))
    W = {n: getattr(sae, n).detach() for n in ("W_enc", "W_dec", "b_enc", "threshold")}
    other = JumpReLUSAE.from_weights(
        W_enc=W["W_enc"][:, order], W_dec=W["W_dec"][order], b_enc=W["b_enc"][order], threshold=W["threshold"][order],
        b_dec=sae.b_dec.detach(), cfg=sae.cfg,
    )  # fmt: skip
    texts = [letters(60, seed=i) for i in range(5)]
    a, b = gather((*loaded, {KEY: sae}), (*loaded, {KEY: other}), texts)
    assert a.shape == (300, F)
    found = matched_features(a, b)
    fires = (found["correlation"] > 0) & (np.asarray((a != 0).sum(0)).ravel() > 8)
    assert fires.sum() > 50
    assert np.allclose(found["correlation"][fires], 1)
    inverse = torch.argsort(order).numpy()
    assert np.mean(found["match"][fires] == inverse[fires]) == 1
    what = {r["feature"]: r["what"] for r in changes(a, b)}
    moved = [f for f in np.nonzero(fires)[0] if inverse[f] != f]
    assert sum(what[f] == "moved" for f in moved) > 0.9 * len(moved)
    assert {r["what"] for r in changes(a, a)} == {"kept"}
    listed = matches(a, b)
    assert [r["match_correlation"] for r in listed] == sorted((r["match_correlation"] for r in listed), reverse=True)
    for r in listed:
        assert r["match_correlation"] == found["correlation"][r["feature"]]
        assert (r["fired_a"], r["fired_b"]) == ((a[:, [r["feature"]]] != 0).sum(), (b[:, [r["match"]]] != 0).sum())
    fired = np.asarray((a != 0).sum(0)).ravel()
    assert {r["feature"] for r in listed} == set(np.nonzero((fired >= 3) & (found["match"] >= 0))[0].tolist())
    nothing = sparse.csc_array(a.shape)
    assert {r["what"] for r in changes(a, nothing)} == {"lost"}
    assert {r["what"] for r in changes(nothing, a)} == {"gained"}
    assert token_ends(loaded[1], "abc").tolist() == [1, 2, 3]


def test_compare_models_by_command(folder, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(letters(50, seed=i) for i in range(6)))
    words = [*base(folder, "compare models"), "--model-b", str(folder / "b"), "--text", str(text)]
    assert cli.main([*words, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert sum(found["counts"].values()) == len(found["features"]) > 0
    words += ["--sae-b", str(folder / "other.safetensors"), "--plot", str(tmp_path / "q.svg")]
    assert cli.main([*words, "--json", str(tmp_path / "g.json")]) == 0
    listed = json.loads((tmp_path / "g.json").read_text())["features"]
    assert listed[0]["match_correlation"] >= listed[-1]["match_correlation"]
    assert min(r["fired_a"] for r in listed) >= 3
