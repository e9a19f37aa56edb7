"""Sets of texts, models, variants, a conversation: figures recomputed by scipy, numpy or by hand; the commands."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny_model import LAYER, F, letters, make_sae, save_model

from gemmascope_fast import JumpReLUSAE, SparseLatents, cli
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.compare import conversation as talk
from gemmascope_fast.compare.models import (
    Side,
    by_span,
    changes,
    common_spans,
    gather,
    matched_features,
    matches,
    phi,
    token_ends,
)
from gemmascope_fast.compare.pooled import pool, pooled
from gemmascope_fast.compare.sets import compare_pairs, compare_sets, covariates, separability
from gemmascope_fast.compare.variants import (
    Votes,
    brier,
    calibrate,
    classify,
    fit_weights,
    groups_of,
    label_scores,
    load_variants,
    reliability,
    stability,
)  # fmt: skip
from gemmascope_fast.demo_model import load_model

stats = pytest.importorskip("scipy.stats")
sparse = pytest.importorskip("scipy.sparse")
KEY = (LAYER, "resid")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    save_model(where / "a", "abcdefghijklmnopqrstuvwxyz \n:*-")
    save_model(where / "b", "abcdefghijklmnopqrstuvwxyz \n:*-", seed=1)
    save(make_sae(), where / "sae.safetensors")
    save(make_sae(seed=2), where / "other.safetensors")
    return where


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder / "a"))


def lines(path, records):
    path.write_text("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in records) + "\n")
    return str(path)


def base(folder, command):
    return [command, "--model", str(folder / "a"), "--sae", str(folder / "sae.safetensors")]


# ---- sets -------------------------------------------------------------------------------------------


def test_pooling_against_dense_rows(loaded):
    texts = [letters(n, seed=n) for n in (3, 40, 17)]
    sae = make_sae()
    for how in ("mean", "max", "rate"):
        got, tokens = pooled(*loaded, {KEY: sae}, texts, how, window=20)
        assert tokens.tolist() == [3, 40, 17]
        for row, text in zip(got.toarray(), texts, strict=True):
            rows = []
            ids = loaded[1](text, add_special_tokens=False)["input_ids"]
            for at in range(0, len(ids), 20):
                with torch.no_grad():
                    hidden = loaded[0](torch.tensor([[1, *ids[at : at + 20]]]), output_hidden_states=True).hidden_states
                rows.append(sae.encode(hidden[LAYER + 1][0, 1:]))
            dense = torch.cat(rows).detach().double()
            want = {"mean": dense.mean(0), "max": dense.amax(0), "rate": (dense != 0).double().mean(0)}[how]
            # rounding of the model's sums; a latent at the threshold of 1 may differ: 1/20 of a mean, 1 of a maximum
            assert np.mean(np.abs(row - want.numpy()) < 1e-4) > 0.98
    with pytest.raises(ValueError, match="--pool"):
        pool(SparseLatents.empty((1, 4)), "median")
    with pytest.raises(ValueError, match="text 2: expected at least one token"):
        pooled(*loaded, {KEY: sae}, ["a", ""], "mean")


def test_every_figure_of_two_sets_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.poisson(0.7, (14, 40)) * rng.random((14, 40)), rng.poisson(0.7, (11, 40)) * rng.random((11, 40))
    a[:, 3] += 2
    a[:, 5] = b[:, 5] = 0
    got = compare_sets(sparse.csr_array(a), sparse.csr_array(b))
    assert got["feature"][0] == 3
    assert 5 not in got["feature"]
    p = []
    for i, f in enumerate(got["feature"].tolist()):
        x, y = a[:, f], b[:, f]
        want = stats.mannwhitneyu(x, y, method="asymptotic")
        assert got["p"][i] == pytest.approx(want.pvalue)
        assert got["auc"][i] == pytest.approx(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))
        sd = np.sqrt((13 * x.var(ddof=1) + 10 * y.var(ddof=1)) / 23)
        assert got["d"][i] == pytest.approx((x.mean() - y.mean()) / sd)
        p.append(want.pvalue)
    # Benjamini and Hochberg: q_(i) = min over j >= i of p_(j) m / j
    order = np.argsort(p)
    ranked = np.array(p)[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1)
    assert np.allclose(got["q"][order], q)
    with pytest.raises(ValueError, match="at least two texts"):
        compare_sets(sparse.csr_array(a[:1]), sparse.csr_array(b))
    with pytest.raises(ValueError, match="--test"):
        compare_sets(sparse.csr_array(a), sparse.csr_array(b), test="t")


def test_permutation_agrees_with_every_permutation():
    rng = np.random.default_rng(1)
    both = rng.random((8, 3))
    got = compare_sets(sparse.csr_array(both[:4]), sparse.csr_array(both[4:]), test="permutation", permutations=4000)
    for i, f in enumerate(got["feature"]):
        own = abs(both[:4, f].mean() - both[4:, f].mean())
        splits = [np.isin(np.arange(8), s) for s in itertools.combinations(range(8), 4)]
        exact = np.mean([abs(both[s, f].mean() - both[~s, f].mean()) >= own - 1e-12 for s in splits])
        # five standard errors of a share of 4000 draws
        assert abs(got["p"][i] - exact) < 5 * np.sqrt(exact * (1 - exact) / 4000) + 1 / 4001


def test_shuffles_that_are_as_extreme_count():
    a, b = np.array([[2.0, 1], [2, 1], [1, 1], [1, 1]]), np.array([[1.0, 0], [1, 0], [2, 0], [2, 0]])
    got = compare_sets(sparse.csr_array(a), sparse.csr_array(b), test="permutation", permutations=500)
    p = dict(zip(got["feature"].tolist(), got["p"].tolist(), strict=True))
    assert p[0] == 1  # no difference of means is smaller than none
    assert 1 / 501 < p[1] < 0.1  # 2 of 70 splits part the texts as these two sets do


def test_pairs_with_one_covariate_agree_with_linear_regression():
    rng = np.random.default_rng(2)
    n = 60
    z = rng.normal(1, 1, n)
    noise = rng.normal(0, 0.1, (n, 3))
    y = np.stack([2 * z, 1 + 0 * z, 0 * z], 1) + noise  # length alone; content alone; nothing
    got = compare_pairs(sparse.csr_array(y + 5), sparse.csr_array(np.full((n, 3), 5.0)), z[:, None])
    at = {f: i for i, f in enumerate(got["feature"].tolist())}
    for f in range(3):
        fit = stats.linregress(z, y[:, f])
        sd = y[:, f].std(ddof=1)
        assert got["before"][at[f]] == pytest.approx(y[:, f].mean() / sd)
        assert got["p_before"][at[f]] == pytest.approx(stats.ttest_1samp(y[:, f], 0).pvalue, abs=1e-12)
        assert got["after"][at[f]] == pytest.approx(fit.intercept / sd)
        t = fit.intercept / fit.intercept_stderr
        assert got["p_after"][at[f]] == pytest.approx(2 * stats.t.sf(abs(t), n - 2), abs=1e-12)
    assert got["q_before"][at[0]] < 1e-6 < got["p_after"][at[0]]
    assert got["q_after"][at[1]] < 1e-6
    # a constant covariate and a repeated one take no part
    more = compare_pairs(
        sparse.csr_array(y + 5), sparse.csr_array(np.full((n, 3), 5.0)), np.stack([z, np.ones(n), 2 * z], 1)
    )
    assert np.allclose(more["after"], got["after"])
    with pytest.raises(ValueError, match="pairs: expected at least"):
        compare_pairs(sparse.csr_array(y[:2]), sparse.csr_array(y[:2]), z[:2, None])


def test_covariates_count_what_they_say():
    text = "Hello\n- one\n2. two\n**bold** `x`\n```\ncode\n```"
    assert covariates(text).tolist() == [np.log1p(len(text)), 6, 2, 10, 1]


def test_separability_is_of_held_out_texts():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 200))
    labels = np.arange(40) < 20
    # more dimensions than texts: a direction fitted to all of them would separate noise
    assert 0.2 < separability(x, labels) < 0.8
    x[labels, 7] += 30
    assert separability(x, labels) > 0.99
    with pytest.raises(ValueError, match="at least two texts"):
        separability(x[:3], [True, False, False][:3], folds=1)


def test_partners_share_a_fold():
    """Each pair has a direction of its own, much larger than what all pairs share: a partner in the training texts
    gives that direction under the other label, and turns the order round."""
    rng = np.random.default_rng(4)
    own = 20 * rng.normal(size=(24, 400))
    shift = 2 * rng.normal(size=400)
    x, labels = np.concatenate([own + shift, own - shift]), np.arange(48) < 24
    apart = separability(x, labels)
    together = separability(x, labels, paired=True)
    assert apart < 0.2
    assert together > 0.9
    with pytest.raises(ValueError, match="sets of one size"):
        separability(x[:40], labels[:40], paired=True)


def test_compare_by_command(folder, tmp_path, capsys):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("\n".join(letters(20, seed=i, alphabet="abc") for i in range(8)))
    b.write_text("\n".join(letters(20, seed=i, alphabet="xyz") for i in range(8)))
    words = [*base(folder, "compare-texts"), "--a", str(a), "--b", str(b), "--layers"]
    assert cli.main([*words, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["features"][0]["q"] < 0.05
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, "latents, model.layers.1.output"]
    assert min(row["auc"] for row in found["layers"]) > 0.9
    b.write_text("\n\n")
    capsys.readouterr()
    assert cli.main(words) == 1
    assert "--b: expected at least two texts, got 0: an empty class" in capsys.readouterr().err
    pairs = [{"chosen": letters(30, seed=i), "rejected": letters(10, seed=90 + i)} for i in range(12)]
    data = lines(tmp_path / "pairs.jsonl", pairs)
    assert cli.main([*base(folder, "compare-texts"), "--pairs", data, "--json", str(tmp_path / "g.json")]) == 0
    assert {"before", "after", "q_after"} <= set(json.loads((tmp_path / "g.json").read_text())["features"][0])
    data = lines(tmp_path / "pairs.jsonl", [*pairs, {"chosen": "a"}])
    assert cli.main([*base(folder, "compare-texts"), "--pairs", data]) == 1
    assert "pairs.jsonl, line 13: expected a string under 'rejected'" in capsys.readouterr().err
    assert cli.main([*base(folder, "compare-texts"), "--a", str(a)]) == 1


def test_reward_is_attributed_by_gradient_times_activation(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    from gemmascope_fast.compare.reward import attributed, load_reward_model

    config = transformers.AutoConfig.from_pretrained(folder / "a")
    config.num_labels = 1
    torch.manual_seed(0)
    where = tmp_path / "reward"
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(where)
    transformers.AutoTokenizer.from_pretrained(folder / "a").save_pretrained(where)
    model, tokenizer = load_reward_model(str(where))
    sae, texts = make_sae(), [letters(20, seed=i) for i in range(3)]
    got, rewards = attributed(model, tokenizer, {KEY: sae}, texts)
    for row, reward, text in zip(got.toarray(), rewards, texts, strict=True):
        ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        kept = []

        def hook(_m, _a, out):
            x = out[0, 1:].detach()
            z = x @ sae.W_enc
            f = (z * (z > 1)).detach().requires_grad_()
            kept.append(f)  # noqa: B023
            new = x + f @ sae.W_dec - (f @ sae.W_dec).detach()
            return torch.cat([out[:, :1], new[None]], 1)

        handle = model.model.layers[LAYER].register_forward_hook(hook)
        result = model(ids).logits[0, 0]
        handle.remove()
        (grad,) = torch.autograd.grad(result, kept[0])
        want = (grad * kept[0]).detach().sum(0).double().numpy()
        assert reward == pytest.approx(float(result), abs=1e-5)
        assert np.allclose(row, want, atol=1e-4 * np.abs(want).max())
    with pytest.raises(ValueError, match="text 1: expected 1 to 10 tokens"):
        attributed(model, tokenizer, {KEY: sae}, texts, window=10)
    pairs = [{"chosen": letters(30, seed=i), "rejected": letters(10, seed=90 + i)} for i in range(10)]
    words = ["compare-texts", "--model", str(where), "--sae", str(folder / "sae.safetensors"), "--reward", "--pairs"]
    out = tmp_path / "reward.json"
    assert cli.main([*words, lines(tmp_path / "p.jsonl", pairs), "--json", str(out)]) == 0
    found = json.loads(out.read_text())["pairs"]
    assert [row["pair"] for row in found] == list(range(1, 11))
    for row, pair in zip(found, pairs, strict=True):
        rows, rewards = attributed(model, tokenizer, {KEY: sae}, [pair["chosen"], pair["rejected"]])
        assert [row["chosen"], row["rejected"]] == pytest.approx(rewards.tolist(), abs=1e-6)
        difference = rows.toarray()[0] - rows.toarray()[1]
        shown = [f["difference"] for f in row["features"]]
        assert shown == pytest.approx([difference[f["feature"]] for f in row["features"]], abs=1e-6)
        assert np.abs(shown) == pytest.approx(np.sort(np.abs(difference))[::-1][: len(shown)], abs=1e-6)
    assert cli.main([*words[:-2], "--pairs", str(tmp_path / "p.jsonl"), "--layers"]) == 0
    assert cli.main([*words, str(tmp_path / "p.jsonl"), "--layers"]) == 1


# ---- models -----------------------------------------------------------------------------------------


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
    from gemmascope_fast.compare import models

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
    words = [*base(folder, "compare-models"), "--model-b", str(folder / "b"), "--text", str(text)]
    assert cli.main([*words, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert sum(found["counts"].values()) == len(found["features"]) > 0
    words += ["--sae-b", str(folder / "other.safetensors"), "--plot", str(tmp_path / "q.svg")]
    assert cli.main([*words, "--json", str(tmp_path / "g.json")]) == 0
    listed = json.loads((tmp_path / "g.json").read_text())["features"]
    assert listed[0]["match_correlation"] >= listed[-1]["match_correlation"]
    assert min(r["fired_a"] for r in listed) >= 3


# ---- variants ---------------------------------------------------------------------------------------


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
    assert brier(got, made.gold) == pytest.approx(((5.5 / 7.5) ** 2 * 2 + (3 / 5) ** 2 * 2) / 2)


def test_fitted_weights_are_no_worse_and_leave_noise_out():
    made = votes()
    train = np.arange(20)
    weights = fit_weights(made, train)
    equal = brier(made.shares(np.ones(made.size))[train], made.gold[train])
    assert brier(made.shares(weights)[train], made.gold[train]) < equal
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
    with pytest.raises(ValueError, match="--prompt"):
        classify(model, tokenizer, texts, labels, "no place")


def test_variants_by_command(folder, tmp_path, capsys):
    records = [
        {"group": f"g{g}", "text": letters(12, seed=g)[: 12 - k], "kind": ["as it is", "cut"][k], "label": "ab"[g % 2]}
        for g in range(8)
        for k in range(2)
    ]
    data = lines(tmp_path / "v.jsonl", records)
    words = [*base(folder, "variants"), "--data", data, "--labels", "a", "b", "--also", str(folder / "b")]
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
        assert cli.main([*base(folder, "variants"), "--data", lines(tmp_path / "w.jsonl", [*records, bad])]) == 1
        assert message in capsys.readouterr().err


# ---- conversation -----------------------------------------------------------------------------------

TURNS = [
    talk.Turn("user", "what is it"),
    talk.Turn("assistant", "i ask the tool"),
    talk.Turn("tool", "rain\nwind"),
    talk.Turn("assistant", "rain"),
]


def test_cached_turns_are_those_of_one_forward(loaded):
    model, tokenizer = loaded
    sae = make_sae()
    traces = talk.read_conversation(model, tokenizer, {KEY: sae}, TURNS)
    ids = torch.cat([t.ids for t in traces])[None]
    assert tokenizer.decode(ids[0, 1:]) == "user: what is it\nmodel: i ask the tool\ntool: rain\nwind\nmodel: rain\n"
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
    z = (hidden.double() @ sae.W_enc.double()).detach()
    got = torch.cat([t.latents.to_dense() for t in traces]).double().detach()
    slack = 2**-23 * 100 * float(z.abs().max())
    sure = (z - 1).abs() > slack
    assert float((got - z * (z > 1))[sure].abs().max()) < slack
    for trace in traces:
        assert tokenizer.decode(trace.ids[trace.content]) == trace.turn.content
    roles = talk.by_role(traces)
    assert list(roles) == ["user", "assistant", "tool"]
    own = torch.cat([t.latents[t.content].to_dense() for t in traces if t.turn.role == "assistant"])
    assert roles["assistant"]["tokens"] == len(own) == 18
    assert roles["assistant"]["l0"] == pytest.approx((own != 0).sum(1).double().mean().item())
    (feature, mean, fired), *_ = traces[2].top()
    dense = traces[2].latents[traces[2].content].to_dense()
    assert mean == pytest.approx(dense[:, feature].mean().item())
    assert mean == pytest.approx(dense.mean(0).max().item())
    assert fired == int((dense[:, feature] != 0).sum())
    with pytest.raises(ValueError, match="at most 256 tokens"):
        talk.read_conversation(model, tokenizer, {KEY: sae}, [talk.Turn("user", letters(300))])


def test_conversation_by_command(folder, tmp_path, capsys):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([*map(vars, TURNS), {"role": "user", "content": "</script>"}]))
    words = [*base(folder, "conversation"), "--transcript", str(path), "--html", str(tmp_path / "t.html")]
    assert cli.main([*words, "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert [t["role"] for t in found["turns"]] == ["user", "assistant", "tool", "assistant", "user"]
    text = (tmp_path / "t.html").read_text()
    assert text.count("</script>") == 1
    data = json.loads(text.split("const turns = ")[1].split(", $ =")[0])
    assert ["".join(s["t"] for s in t["spans"] if s["read"]) for t in data][:4] == [t.content for t in TURNS]
    lines(path, [{"role": "user", "content": "a"}, {"role": "tool"}])
    assert cli.main(words) == 1
    assert "line 2: expected strings under 'role' and 'content'" in capsys.readouterr().err
    path.write_text("[1]")
    assert cli.main(words) == 1
    assert "turn 1: expected strings" in capsys.readouterr().err


def test_a_side_without_tokens_is_empty():
    assert Side(5).matrix(0).shape == (0, 5)
    side = Side(5)
    side.parts.append((np.array([1]), np.array([4]), np.array([2.0])))
    assert side.matrix(3).toarray().tolist() == [[0] * 5, [0, 0, 0, 0, 2.0], [0] * 5]
