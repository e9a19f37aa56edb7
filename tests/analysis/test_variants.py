"""Variants of a prompt: figures recomputed by hand; the command."""

import json

import numpy as np
import pytest
import torch
from tiny_model import letters
from two_models import base, lines, save_two

from gemmascope_fast.analysis.compare.variants import (
    Votes,
    calibrate,
    classify,
    fit_weights,
    groups_of,
    label_scores,
    load_variants,
    reliability,
    stability,
)
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_two(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder / "a"))


def votes(seed=0, groups=40, bad=1):
    """Three kinds; the votes of kind `bad` are arbitrary, the others' mostly right."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 2, groups)
    kind, group = np.tile(np.arange(3), groups), np.repeat(np.arange(groups), 3)
    right = rng.random((2, 3 * groups)) < np.where(kind == bad, 0.5, 0.9)
    predicted = np.where(right, gold[group], 1 - gold[group])
    return Votes(predicted, kind, group, gold, 2, ["as it is", "noise", "short"], [str(g) for g in range(groups)])


def test_shares_are_weighted_votes():
    made = Votes(np.array([[0, 1, 1], [1, 1, 0]]), np.array([0, 1, 0]), np.array([0, 0, 1]), np.array([0, 1]), 2,
                 ["x", "y"], ["g", "h"])  # fmt: skip
    got = made.shares(np.array([1.0, 0.5, 2.0, 3.0]))
    # group g: votes 0 (2·1), 1 (2·0.5), 1 (3·1), 1 (3·0.5); group h: 1 (2·1), 0 (3·1)
    assert np.allclose(got, [[2 / 7.5, 5.5 / 7.5], [3 / 5, 2 / 5]])
    assert np.allclose(made.shares(np.zeros(4)), 0.5)
    assert reliability(got, made.gold)["brier"] == pytest.approx(((5.5 / 7.5) ** 2 * 2 + (3 / 5) ** 2 * 2) / 2)


def test_fitted_weights_are_no_worse_and_leave_noise_out():
    made = votes()
    train = np.arange(20)
    weights = fit_weights(made, train)
    equal, fitted = (reliability(made.shares(w)[train], made.gold[train]) for w in (np.ones(made.size), weights))
    assert fitted["brier"] < equal["brier"]
    assert weights[1] < 0.5 * max(weights[0], weights[2])
    found = calibrate(made)
    assert found["train_groups"] + found["test_groups"] == 40
    assert found["weighted"]["brier"] < found["equal"]["brier"]
    with pytest.raises(ValueError, match="at least four groups"):
        calibrate(Votes(made.predicted, made.kind, made.group, np.full(40, -1), 2, made.kinds, made.names))


def test_weights_are_measured_on_groups_that_they_were_not_fitted_to():
    made = votes(seed=3, groups=24)
    made.gold[5] = -1
    found = calibrate(made, seed=7)
    known = np.array([g for g in range(24) if g != 5])
    train, test = np.split(np.random.default_rng(7).permutation(known), [11])
    weights = fit_weights(made, train, 7)
    assert list(found["weights"].values()) == weights.tolist()
    for name, own in (("equal", np.ones(5)), ("weighted", weights)):
        shares = made.shares(own)[test]
        one_hot = np.eye(2)[made.gold[test]]
        assert found[name]["brier"] == pytest.approx(np.mean(np.sum((shares - one_hot) ** 2, 1)))
        assert found[name]["accuracy"] == pytest.approx(np.mean(shares.argmax(1) == made.gold[test]))
        assert sum(b["count"] for b in found[name]["bins"]) == len(test)


def test_reliability_by_hand():
    shares = np.array([[0.95, 0.05], [0.92, 0.08], [0.3, 0.7], [0.55, 0.45]])
    found = reliability(shares, np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.5
    want = (2 * abs(0.5 - 0.935) + abs(1 - 0.7) + abs(0 - 0.55)) / 4
    assert found["ece"] == pytest.approx(want)
    assert [b["count"] for b in found["bins"]] == [1, 1, 2]


def test_stability_of_sets():
    found = stability([{1, 2}, {2, 3}, {9}, {9}, set()], {"a": [0, 1], "b": [2, 3], "c": [4]})
    assert found["by_group"]["a"] == pytest.approx(1 / 3)
    assert found["jaccard"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["across"] == 0


def test_labels_are_the_likeliest_continuations(loaded):
    model, tokenizer = loaded
    texts, labels = [letters(n, seed=n) for n in range(4, 20)], ["ab", "c", "de", "f"]
    got = classify(model, tokenizer, texts, labels, "{text}:", at_once=2)
    every = label_scores(model, tokenizer, texts, labels, "{text}:", at_once=3).tolist()
    for text, best, own in zip(texts, got, every, strict=True):
        scores = []
        for label in labels:
            prompt = [1, *tokenizer(text + ":", add_special_tokens=False)["input_ids"]]
            answer = tokenizer(" " + label, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)))
        assert best == int(np.argmax(scores))
        assert own == pytest.approx(scores, abs=1e-4)
    with pytest.raises(ValueError, match="--template"):
        classify(model, tokenizer, texts, labels, "no place")


def test_variants_by_command(folder, tmp_path, capsys):
    records = [
        {"group": f"g{g}", "text": letters(12, seed=g)[: 12 - k], "kind": ["as it is", "cut"][k], "label": "ab"[g % 2]}
        for g in range(8)
        for k in range(2)
    ]
    data = lines(tmp_path / "v.jsonl", records)
    words = [*base(folder, "compare variants"), "--data", data, "--labels", "a", "b", "--also", str(folder / "b")]
    assert cli.main([*words, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["features"]["jaccard"] > found["features"]["across"]
    assert set(found["calibration"]["weights"]) == {"as it is", "cut", "model 0", "model 1"}
    assert groups_of(load_variants(data))["g1"] == [2, 3]
    for bad, message in [
        ({"group": "g0", "text": "x", "label": "b"}, "line 17: group 'g0' has label 'a' before"),
        ({"text": "x"}, "line 17: expected a group"),
    ]:
        capsys.readouterr()
        assert (
            cli.main([*base(folder, "compare variants"), "--data", lines(tmp_path / "w.jsonl", [*records, bad])]) == 1
        )
        assert message in capsys.readouterr().err
