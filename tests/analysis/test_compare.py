"""Sets of texts compared: figures recomputed by scipy, numpy or by hand; the command."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import LAYER, letters, make_sae
from two_models import KEY, base, lines, save_two

from gemmascope_fast import SparseLatents
from gemmascope_fast.analysis.compare.pairs import answers, load_pairs, without_format
from gemmascope_fast.analysis.compare.pooled import pool, pooled
from gemmascope_fast.analysis.compare.reward import attributed, load_reward_model
from gemmascope_fast.analysis.compare.sets import compare_pairs, compare_sets, covariates, separability
from gemmascope_fast.analysis.extraction.texts import Answer, encoded, read_texts
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.cli import main as cli

stats = pytest.importorskip("scipy.stats")
sparse = pytest.importorskip("scipy.sparse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_two(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder / "a"))


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
    words = [*base(folder, "compare texts"), "--a", str(a), "--b", str(b), "--layers"]
    assert cli.main([*words, "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "p.svg")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["features"][0]["q"] < 0.05
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, "latents, model.layers.1.output"]
    assert min(row["auc"] for row in found["layers"]) > 0.9
    b.write_text("\n\n")
    capsys.readouterr()
    assert cli.main(words) == 1
    assert "--b: expected at least two texts, got 0" in capsys.readouterr().err
    pairs = [{"chosen": letters(30, seed=i), "rejected": letters(10, seed=90 + i)} for i in range(12)]
    data = lines(tmp_path / "pairs.jsonl", pairs)
    assert cli.main([*base(folder, "compare texts"), "--pairs", data, "--json", str(tmp_path / "g.json")]) == 0
    assert {"before", "after", "q_after"} <= set(json.loads((tmp_path / "g.json").read_text())["features"][0])
    data = lines(tmp_path / "pairs.jsonl", [*pairs, {"chosen": "a"}])
    assert cli.main([*base(folder, "compare texts"), "--pairs", data]) == 1
    assert "pairs.jsonl, line 13: expected a string under 'rejected'" in capsys.readouterr().err
    assert cli.main([*base(folder, "compare texts"), "--a", str(a)]) == 1


def test_reward_is_attributed_by_gradient_times_activation(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
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
    pairs = [{"chosen": letters(30, seed=i).strip(), "rejected": letters(10, seed=90 + i).strip()} for i in range(10)]
    words = ["compare", "texts", "--model", str(where), "--sae", str(folder / "sae.safetensors"), "--reward", "--pairs"]
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


# ---- answers and their prompts ----------------------------------------------------------------------

PAIRS = [
    {"prompt": f"{letters(9, seed=50 + i).strip()} a", "chosen": f"- {letters(20, seed=i).strip()}\n- b",
     "rejected": letters(10, seed=90 + i).strip()}
    for i in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    where = tmp_path_factory.mktemp("reward")
    config = transformers.AutoConfig.from_pretrained(folder / "a")
    config.num_labels = 1
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(where)
    transformers.AutoTokenizer.from_pretrained(folder / "a").save_pretrained(where)
    return where


def test_an_answer_is_read_under_its_prompt(folder):
    """Only rows of the answer, and those of the whole text; in batches of unlike lengths."""
    model, tokenizer = load_model(str(folder / "a"))
    sae = make_sae()
    texts = [Answer(p["prompt"], p["chosen"]) for p in PAIRS] + ["abc"]
    for text, (ids, rows) in zip(texts, read_texts(model, tokenizer, {KEY: sae}, texts), strict=True):
        before, own = encoded(tokenizer, text)
        assert ids == own
        with torch.no_grad():
            hidden = model(torch.tensor([[1, *before, *own]]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        want = sae.encode_sparse(hidden[1 + len(before) :])
        assert torch.allclose(rows[KEY].to_dense(), want.to_dense(), atol=1e-3)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }}:{% endfor %}a:"
    assert encoded(tokenizer, Answer("xy", "z"))[0] == tokenizer("u xy:a:", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="text 1: expected at most 5 tokens of prompt and answer"):
        list(read_texts(model, tokenizer, {KEY: sae}, texts[:1], window=5))


@pytest.mark.parametrize("reward", [False, True])
def test_another_prompt_is_another_result(folder, reward_folder, tmp_path, reward):
    words = ["compare", "texts", "--sae", str(folder / "sae.safetensors"), "--no-covariates"]
    words += ["--model", str(reward_folder if reward else folder / "a"), *["--reward"] * reward]
    found = []
    for n, change in enumerate((0, 1, None)):
        pairs = [dict(p) for p in PAIRS]
        for i, pair in enumerate(pairs):
            pair["prompt"] = None if change is None else PAIRS[(i + change) % len(PAIRS)]["prompt"]
        out = tmp_path / f"{n}.json"
        assert cli.main([*words, "--pairs", lines(tmp_path / f"{n}.jsonl", pairs), "--json", str(out)]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0] != found[1] != found[2] != found[0]


def test_rewards_in_every_context_by_hand(folder, reward_folder, tmp_path):
    model, tokenizer = load_reward_model(str(reward_folder))
    sae = make_sae()
    words = ["compare", "texts", "--sae", str(folder / "sae.safetensors"), "--model", str(reward_folder), "--reward"]
    out = tmp_path / "f.json"
    data = lines(tmp_path / "p.jsonl", PAIRS)
    assert cli.main([*words, "--contexts", "--no-covariates", "--pairs", data, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["contexts"]

    def reward(prompt, answer):
        ids = tokenizer((prompt + "\n\n" if prompt else "") + answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            return float(model(torch.tensor([[1, *ids]])).logits[0, 0])

    def margins(change):
        return [reward(*change(i, p)[0]) - reward(*change(i, p)[1]) for i, p in enumerate(PAIRS)]

    def under(prompt):
        return lambda i, p: ((prompt(i, p), p["chosen"]), (prompt(i, p), p["rejected"]))

    want = {
        "own": margins(under(lambda i, p: p["prompt"])),
        "other": margins(under(lambda i, p: PAIRS[(i + 1) % 6]["prompt"])),
        "none": margins(under(lambda i, p: "")),
        "plain": margins(lambda i, p: ((p["prompt"], " ".join(p["chosen"].replace("- ", "").split())),
                                       (p["prompt"], " ".join(p["rejected"].split())))),
    }  # fmt: skip
    for name, own in want.items():
        assert found["contexts"][name]["margin"] == pytest.approx(np.mean(own), abs=1e-5), name
        assert found["contexts"][name]["accuracy"] == pytest.approx(np.mean(np.array(own) > 0)), name
    # what the two groups of features carry is all that features carry
    carried = sum(group["carries"] for group in found["groups"].values())
    assert carried == pytest.approx(found["contexts"]["own"]["attributed"], abs=1e-6)
    a, b = (attributed(model, tokenizer, {KEY: sae}, texts)[0] for texts in answers(load_pairs(Path(data)), "other"))
    mean = (a - b).toarray().mean(0)
    for row in found["features"]:
        assert row["other"] == pytest.approx(mean[row["feature"]], abs=1e-6)
        assert row["stays"] == (row["other"] / row["own"] >= 0.5)
    assert any(row["stays"] for row in found["features"])
    assert not all(row["stays"] for row in found["features"])


def test_contexts_change_what_they_say(tmp_path):
    pairs = load_pairs(Path(lines(tmp_path / "p.jsonl", PAIRS)))
    for a, b in zip(*answers(pairs, "equal length"), strict=True):
        assert len(a.text.split()) == len(b.text.split())
    assert without_format("# Head\n\n1. **one**\n- `two` 3.5\n```py\nx = 1\n```\nend") == "Head one two 3.5 x = 1 end"
    assert [a.prompt for a in answers(pairs, "other")[0]] == [*(p["prompt"] for p in PAIRS[1:]), PAIRS[0]["prompt"]]
    bare = [{k: v for k, v in p.items() if k != "prompt"} for p in PAIRS]
    for records, message in (
        ([*PAIRS[:4], bare[0]], "--contexts: expected a prompt in every pair, got none in pair 5"),
        ([p | {"prompt": "same"} for p in PAIRS], "--contexts: expected pairs with different prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            answers(load_pairs(Path(lines(tmp_path / "q.jsonl", records))), "other")
