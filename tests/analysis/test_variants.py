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
    items,
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


def test_fitted_weights_prefer_what_is_right_and_stay_near_equal():
    made = votes()
    train = np.arange(20)
    weights = fit_weights(made, train)
    equal, fitted = (reliability(made.shares(w)[train], made.gold[train]) for w in (np.ones(made.size), weights))
    assert fitted["brier"] < equal["brier"]
    assert weights[1] < 0.7 * min(weights[0], weights[2])
    found = calibrate(made)
    assert found["groups"] == 40
    assert found["weighted"]["brier"] < found["equal"]["brier"]
    with pytest.raises(ValueError, match="at least one group with a label"):
        calibrate(Votes(made.predicted, made.kind, made.group, np.full(40, -1), 2, made.kinds, made.names))


def test_every_group_is_measured_with_weights_of_other_groups():
    made = votes(seed=3, groups=31)
    made.gold[5] = -1
    found = calibrate(made, seed=7)
    known = np.array([g for g in range(31) if g != 5])
    shares = np.empty((30, 2))
    order = np.random.RandomState(7).permutation(30)  # that of scikit-learn's KFold
    for part in np.split(order, 5):
        rest = np.setdiff1d(np.arange(30), part)
        shares[part] = made.shares(fit_weights(made, known[rest], 7))[known[part]]
    for name, own in (("equal", made.shares(np.ones(5))[known]), ("weighted", shares)):
        one_hot = np.eye(2)[made.gold[known]]
        assert found[name]["brier"] == pytest.approx(np.mean(np.sum((own - one_hot) ** 2, 1)))
        assert found[name]["accuracy"] == pytest.approx(np.mean(own.argmax(1) == made.gold[known]))
        assert sum(b["count"] for b in found[name]["bins"]) == 30
    plain = [made.predicted[0, 3 * g] == made.gold[g] for g in known]
    assert found["plain"]["accuracy"] == pytest.approx(np.mean(plain))
    assert list(found["weights"]) == ["as it is", "noise", "short", "model 0", "model 1"]


@pytest.mark.parametrize("groups", [1, 10, 24])
def test_few_groups_fit_no_weights(groups):
    """With ten groups, fitting once gave all weight to one kind of text and a random model."""
    found = calibrate(votes(groups=groups))
    assert (
        f"5 weights (kinds of text and models) need at least 25 groups with a label, and there are {groups}"
        in found["not_fitted"]
    )
    assert "weighted" not in found
    assert "weights" not in found
    assert {"plain", "equal"} <= set(found)


def test_items_have_every_vote():
    made = votes(groups=7)
    made.gold[2] = -1
    found = items(made, ["no", "yes"], ["one", "two"])
    shares = made.shares(np.ones(made.size))
    for g, row in enumerate(found):
        cast = [vote["label"] for vote in row["votes"]]
        assert len(cast) == 6
        assert row["confidence"] == pytest.approx(max(cast.count("no"), cast.count("yes")) / 6)
        assert row["label"] == ["no", "yes"][int(shares[g].argmax())]
        assert row["true_label"] == (None if g == 2 else ["no", "yes"][made.gold[g]])
    first = found[3]["votes"]
    assert [(v["kind"], v["model"]) for v in first[:3]] == [("as it is", "one"), ("as it is", "two"), ("noise", "one")]
    assert first[1]["label"] == ["no", "yes"][made.predicted[1, 9]]


def test_an_encoder_with_a_head_votes(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, id2label={0: "c", 1: "b", 2: "a"}, label2id={"c": 0, "b": 1, "a": 2},
    )  # fmt: skip
    encoder = transformers.BertForSequenceClassification(config).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    transformers.AutoTokenizer.from_pretrained(folder / "a").save_pretrained(tmp_path / "encoder")
    model, tokenizer = load_model(str(tmp_path / "encoder"))
    texts = [letters(n, seed=n) for n in range(3, 15)]
    got = classify(model, tokenizer, texts, ["a", "b"], "unused", at_once=5)
    with torch.no_grad():
        logits = [encoder(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    assert got.tolist() == [int(row[1] > row[2]) for row in logits]
    with pytest.raises(ValueError, match="the classifier knows c, b, a, and not d"):
        classify(model, tokenizer, texts, ["a", "d"], "unused")
    data = lines(tmp_path / "v.jsonl", [{"group": str(i), "text": text, "label": "a"} for i, text in enumerate(texts)])
    words = [*base(folder, "compare variants"), "--data", data, "--labels", "a", "b"]
    out = tmp_path / "f.json"
    assert cli.main([*words, "--also", str(tmp_path / "encoder"), "--json", str(out)]) == 0
    votes_ = [row["votes"][1] for row in json.loads(out.read_text())["items"]]
    stripped = classify(model, tokenizer, [text.strip() for text in texts], ["a", "b"], "unused")
    assert [v["label"] for v in votes_] == ["ab"[i] for i in stripped]


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
        for g in range(20)
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
        ({"group": "g0", "text": "x", "label": "b"}, "line 41: group 'g0' has label 'a' before"),
        ({"text": "x"}, "line 41: expected a group"),
    ]:
        capsys.readouterr()
        assert (
            cli.main([*base(folder, "compare variants"), "--data", lines(tmp_path / "w.jsonl", [*records, bad])]) == 1
        )
        assert message in capsys.readouterr().err
