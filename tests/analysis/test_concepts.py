"""Concepts: splits, detectors against their formulas, AUC by hand, steering that steers, the command."""

import json

import pytest
import torch
from tiny_model import LAYER, D, letters, make_sae, save_model

from gemmascope_fast import Site
from gemmascope_fast.analysis.concepts.data import BUNDLED, Example, load_examples, split
from gemmascope_fast.analysis.concepts.methods import Detector, auc_columns, diff_mean, linear_probe, text_scores
from gemmascope_fast.analysis.concepts.reft import fit_reft
from gemmascope_fast.analysis.concepts.run import Concepts
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli

pytest.importorskip("sklearn")


def pairs_auc(scores, positive):
    """Over all pairs, ties one half."""
    own = [s for s, p in zip(scores, positive, strict=True) if p]
    other = [s for s, p in zip(scores, positive, strict=True) if not p]
    return sum((a > b) + 0.5 * (a == b) for a in own for b in other) / (len(own) * len(other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


# Texts of the first half of the alphabet, of the second, and hard negatives: the second half with one early letter
EXAMPLES = (
    [Example(letters(12, seed=i, alphabet="abcdef "), "early", 1) for i in range(10)]
    + [Example(letters(12, seed=50 + i, alphabet="tuvwxyz "), "late", 1) for i in range(10)]
    + [Example("a" + letters(11, seed=80 + i, alphabet="tuvwxyz "), "early", 0) for i in range(4)]
)


@pytest.fixture(scope="module")
def concepts(folder):
    return Concepts(*load_model(str(folder)), make_sae(), LAYER, EXAMPLES)


def test_bundled_concepts_are_six_and_balanced():
    examples = load_examples(BUNDLED)
    assert len({e.text for e in examples}) == len(examples)
    parts = split(examples)
    assert len(parts) >= 6
    for part in parts:
        assert len(part.train_positive) == len(part.test_positive) == 6
        assert len(part.hard) >= 5
        assert not set(part.train) & set(part.test)
        assert {examples[i].concept for i in part.train_negative + part.test_negative}.isdisjoint({part.concept})
        assert all(examples[i].label == 1 for i in part.train)


def test_bad_labelled_texts_are_named(tmp_path):
    path = tmp_path / "c.jsonl"
    for record, message in [
        ('{"text": "x", "concept": "c", "label": 2}', "line 2: expected a text and a label"),
        ('{"text": " ", "concept": "c", "label": 1}', "line 2: expected a text"),
        ('{"text": "x", "label": 1}', "line 2: expected a string under 'concept'"),
        ("{", "line 2: expected one JSON object"),
    ]:
        path.write_text('{"text": "x", "concept": "c", "label": 1}\n' + record + "\n")
        with pytest.raises(ValueError, match=message):
            load_examples(path)
    few = [Example("x", "empty class", 0)] * 5
    with pytest.raises(ValueError, match="'empty class': expected at least 4 texts of label 1, got 0"):
        split(few)
    with pytest.raises(ValueError, match="expected another concept"):
        split([Example("x", "alone", 1)] * 5)
    alone = split([Example("x", "alone", 1)] * 5 + [Example("y", "alone", 0)] * 4)
    assert len(alone[0].train_negative) == len(alone[0].test_negative) == 2


def test_rows_are_those_of_plain_forwards(concepts):
    for example, rows in list(zip(EXAMPLES, concepts.rows, strict=True))[::7]:
        ids = torch.tensor([[1, *concepts.tokenizer(example.text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            want = concepts.model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]
        assert torch.allclose(rows, want, rtol=0, atol=64 * 2.0**-23 * float(want.abs().max()))


def test_auc_is_that_of_all_pairs():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (17, 9), generator=g).double()
    positive = torch.arange(17) % 3 == 0
    want = [pairs_auc(column.tolist(), positive.tolist()) for column in scores.t()]
    assert auc_columns(scores, positive).tolist() == pytest.approx(want)


def test_directions_have_their_formulas():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(40, 8, generator=g) + torch.arange(8), torch.randn(60, 8, generator=g)
    found = diff_mean(a, b)
    w = a.mean(0) - b.mean(0)
    assert torch.allclose(found.write, w / w.norm(), atol=1e-6)
    probe = linear_probe(a, b, c=1.0)
    scores = torch.cat([probe.scores(a), probe.scores(b)])
    assert pairs_auc(scores.tolist(), [True] * 40 + [False] * 60) > 0.99
    assert probe.write.norm() == pytest.approx(1, abs=1e-5)
    # the regression's own gradient vanishes at its weights: X'(p - y)·weights + w/C = 0 in standardised dimensions
    x = torch.cat([a, b]).double()
    x = (x - x.mean(0)) / x.std(0)
    y = torch.cat([torch.ones(40), torch.zeros(60)]).double()
    per_class = torch.cat([torch.full((40,), 100 / 80), torch.full((60,), 100 / 120)]).double()
    w = probe.read.double() * torch.cat([a, b]).double().std(0)
    gradient = x.t() @ (per_class * (torch.sigmoid(scores.double()) - y)) + w
    assert gradient.norm() < 0.05 * w.norm()


def test_detection_agrees_with_pairs_counted_by_hand(concepts):
    part = split(EXAMPLES)[0]
    assert part.concept == "early"
    for detector in concepts.fit(part, ("SAE", "DiffMean", "probe"), {}):
        got = concepts.detect(detector, part)
        raw = text_scores(detector, concepts.rows, concepts.latents, part.test).tolist()
        positive = [i in part.test_positive for i in part.test]
        assert got["auc"] == pytest.approx(pairs_auc(raw, positive))
        low, high = min(raw), max(raw)  # of the test texts, hard negatives among them
        own, others = ([(s - low) / (high - low) for s, p in zip(raw, positive, strict=True) if p is is_own]
                       for is_own in (True, False))  # fmt: skip
        assert got["separation"] == pytest.approx(sum(own) / len(own) - sum(others) / len(others))
        near = [(s, p) for s, p, i in zip(raw, positive, part.test, strict=True) if p or i in part.hard]
        assert got["auc_hard"] == pytest.approx(pairs_auc(*zip(*near, strict=True)))
        if detector.feature is not None:
            sizes = [concepts.latents[i].features([detector.feature]).max() for i in part.train_positive]
        else:  # in the activations' units, whatever those of the score are
            sizes = [((concepts.rows[i] - detector.mean) @ detector.write).max() for i in part.train_positive]
        assert got["max_act"] == pytest.approx(float(max(sizes)))


def test_the_chosen_feature_ranks_the_training_texts_best(concepts):
    part = split(EXAMPLES)[0]
    (detector,) = concepts.fit(part, ("SAE",), {})
    labels = [i in part.train_positive for i in part.train]
    dense = [concepts.latents[i].to_dense().amax(0) for i in part.train]
    each = [pairs_auc([float(row[f]) for row in dense], labels) for f in range(96)]
    assert each[detector.feature] == max(each)
    assert detector.feature == each.index(max(each))


def test_steering_adds_factor_times_the_largest_score(concepts):
    part = split(EXAMPLES)[0]
    detectors = concepts.fit(part, ("SAE", "DiffMean", "probe"), {})
    for detector in detectors:
        none, some = concepts.steer(detector, part, [0.0, 1.5])
        assert none["gain"] == pytest.approx(0, abs=1e-6)
        own, others = part.test_positive, part.test_negative[: len(part.test_positive)]
        changes = []
        for chosen in (own, others):
            losses = []
            for strength in (0.0, 1.5 * detector.max_act):
                total, count = 0.0, 0
                for i in chosen:
                    text = concepts.examples[i].text
                    ids = torch.tensor([[1, *concepts.tokenizer(text, add_special_tokens=False)["input_ids"]]])

                    def add(_m, _a, out, strength=strength):
                        return torch.cat([out[:, :1], out[:, 1:] + strength * detector.write], 1)  # noqa: B023

                    handle = concepts.model.model.layers[LAYER].register_forward_hook(add)
                    with torch.no_grad():
                        total += concepts.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                    handle.remove()
                    count += ids.shape[1] - 1
                losses.append(total / count)
            changes.append(losses[1] - losses[0])
        assert some["cost"] == pytest.approx(changes[1], abs=1e-4)
        assert some["gain"] == pytest.approx(changes[1] - changes[0], abs=1e-4)


def test_reft_lowers_its_loss_and_leaves_the_model_as_it_was(folder):
    model, tokenizer = load_model(str(folder))
    before = {n: p.clone() for n, p in model.named_parameters()}
    texts = [letters(20, seed=i, alphabet="ab") for i in range(4)]
    g = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(D, generator=g), dim=0)
    start = Detector("DiffMean", v, v, torch.zeros(D))

    def loss(detector):
        total = 0.0
        for text in texts:
            ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])

            def phi(_m, _a, out):
                a = torch.relu(out[:, 1:] @ detector.read)
                return torch.cat([out[:, :1], out[:, 1:] + a.topk(4, dim=1).values.mean() * detector.write], 1)

            handle = model.model.layers[LAYER].register_forward_hook(phi)
            with torch.no_grad():
                total += model(ids, labels=ids).loss.item()
            handle.remove()
        return total / len(texts)

    found = fit_reft(model, tokenizer, Site("resid", LAYER), texts, start, steps=25, lr=0.05, l1=0.0)
    assert loss(found) < loss(start) - 0.01
    assert found.write.norm() == pytest.approx(1, abs=1e-5)
    sparse = fit_reft(model, tokenizer, Site("resid", LAYER), texts, start, steps=25, lr=0.05, l1=10.0)
    assert not torch.allclose(sparse.write, found.write, atol=1e-2)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())
    assert not model.model.layers[LAYER]._forward_hooks


def test_concepts_by_command(folder, tmp_path, capsys):
    save(make_sae(), tmp_path / "sae.safetensors")
    data = tmp_path / "c.jsonl"
    data.write_text("\n".join(json.dumps(vars(e)) for e in EXAMPLES))
    words = ["concepts", "--model", str(folder), "--sae", str(tmp_path / "sae.safetensors"), "--data", str(data)]
    words += ["--factors", "0.5", "1", "--reft-steps", "2", "--json", str(tmp_path / "f.json"), "--prompt", "abc"]
    assert cli.main([*words, "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert [(r["concept"], r["method"]) for r in found["rows"][:4]] == [
        ("early", "SAE"), ("early", "DiffMean"), ("early", "probe"), ("early", "ReFT-r1")
    ]  # fmt: skip
    assert found["rows"][4]["auc_hard"] is None  # "late" has no hard negatives
    assert len(found["written"]) == 8
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert "DiffMean" in capsys.readouterr().out
    assert cli.main([*words, "--methods", "lasso", "--overwrite"]) == 1
    assert "lasso" in capsys.readouterr().err
