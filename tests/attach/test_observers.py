"""Observers of a run: figures against dense arithmetic on what the run kept, alarms before the next token."""

import threading

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import Statistics, TopContexts, TopK

LAYER = 1


@pytest.fixture(scope="module")
def model():
    return tiny.gemma3()


@pytest.fixture(scope="module")
def sae():
    return tiny.sae()


def read(model, sae, *observers, calls=4, tokens="all"):
    """The observers fed by several calls with padding, and the dense latents of the valid rows."""
    with torch.no_grad(), gsf.attach(model, {LAYER: sae}, tokens=tokens) as run:
        for observer in observers:
            assert run.watch(observer) is observer
        for seed in range(calls):
            ids = tiny.ids(seed=seed)
            mask = torch.ones_like(ids)
            mask[1, 7:] = 0
            model(ids, attention_mask=mask)
    keep = run.tokens.valid
    return run, run.latents[LAYER].to_dense()[keep], keep


def test_topk_is_that_of_the_latents(model, sae):
    top = TopK(3)
    run, dense, keep = read(model, sae, top)
    values, indices = run.latents[LAYER][keep].topk(3)
    assert torch.equal(top.values, values)
    assert torch.equal(top.indices, indices)
    assert torch.equal(top.values[dense.count_nonzero(1) >= 3], dense.topk(3).values[dense.count_nonzero(1) >= 3])
    assert torch.equal(top.tokens.token_id, run.tokens.token_id[keep])


def test_statistics_are_those_of_dense_latents(model, sae):
    chosen, edges = [3, 90, 3, 7], [0.0, 1.0, 1.5, 2.0, 3.0]
    stats = Statistics(tiny.F, edges=edges, chosen=chosen)
    _, dense, _ = read(model, sae, stats)
    on = dense != 0
    assert stats.count == len(dense) == 64
    assert torch.equal(stats.fired, on.sum(0))
    torch.testing.assert_close(stats.rate, on.double().mean(0))
    torch.testing.assert_close(stats.mean, dense.double().sum(0) / on.sum(0).clamp(min=1))
    assert torch.equal(stats.max.float(), dense.max(0).values)
    by_hand = torch.stack([((dense >= low) & (dense < high) & on).sum(0) for low, high in zip(
        edges[:-1], [*edges[1:-1], float("inf")], strict=True)], 1)  # fmt: skip
    assert torch.equal(stats.histogram, by_hand)
    assert int(stats.histogram.sum()) == int(on.sum())
    pairs = on[:, chosen].double()
    assert torch.equal(stats.cofiring, (pairs.t() @ pairs).long())


def test_top_contexts_are_the_strongest_tokens_with_what_stood_around(model, sae):
    top = TopContexts(tiny.F, 5, left=3, right=2)
    run, dense, keep = read(model, sae, top)
    tokens = run.tokens
    ids = tokens.token_id[keep]
    sequence, position = tokens.sequence[keep], tokens.position[keep]
    where = {(int(s), int(p)): int(t) for s, p, t in zip(sequence, position, ids, strict=True)}
    for feature in range(tiny.F):
        values, rows = (found[:5] for found in dense[:, feature].sort(descending=True, stable=True))
        fired = values > 0
        assert torch.equal(top.values[feature][fired], values[fired])
        assert torch.isneginf(top.values[feature][~fired]).all()
        for slot in range(int(fired.sum())):
            at = (int(top.sequence[feature, slot]), int(top.position[feature, slot]))
            assert at == (int(sequence[rows[slot]]), int(position[rows[slot]]))
            around = [where.get((at[0], at[1] + d), -1) for d in range(-3, 3)]
            assert top.contexts[feature, slot].tolist() == around
    size = top.contexts.numel()
    read(model, sae, top)
    assert top.contexts.numel() == size


def test_contexts_reach_back_over_decoded_tokens(model, sae):
    top = TopContexts(tiny.F, 50, left=4, right=0)
    with gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        run.watch(top)
        out = model.generate(tiny.ids(1), max_new_tokens=6, do_sample=False, min_new_tokens=6)[0]
    at = (top.position == 12).nonzero()
    assert len(at)
    for feature, slot in at.tolist():
        assert top.contexts[feature, slot].tolist() == out[8:13].tolist()


def test_only_selected_tokens_are_watched(model, sae):
    stats = Statistics(tiny.F)
    _, dense, keep = read(model, sae, stats, tokens="content")
    run_content = keep.sum() - 8  # a BOS in each of 8 sequences
    assert stats.count == int(run_content)
    assert torch.equal(stats.fired, (dense != 0).sum(0))


def test_nothing_is_kept_when_asked(model, sae):
    stats, kept = Statistics(tiny.F), Statistics(tiny.F)
    read(model, sae, kept)
    with torch.no_grad(), gsf.attach(model, {LAYER: sae}, keep=False, tokens="all") as run:
        run.watch(stats)
        for seed in range(4):
            ids = tiny.ids(seed=seed)
            mask = torch.ones_like(ids)
            mask[1, 7:] = 0
            model(ids, attention_mask=mask)
    assert torch.equal(stats.fired, kept.fired)
    assert len(run.tokens) == 0
    assert not run._ledger.groups
    with pytest.raises(gsf.AttachError, match="keep=False"):
        run.latents[LAYER]


# ---- alarms -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded(model, sae):
    """A greedy generation; the feature that fires on some decoded token of sequence 0 first, and where."""
    with gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        output = model.generate(tiny.ids(), max_new_tokens=8, do_sample=False, min_new_tokens=8)
    rows = run.sequences(LAYER, output)[0].to_dense()
    prompt = rows[:9].max(0).values
    for column in range(10, 15):
        before = rows[9:column].max(0).values if column > 9 else prompt
        value, feature = (rows[column] - torch.maximum(prompt, before)).max(0)
        if value > 0.2:
            return output, int(feature), column, float(rows[column, feature]) - 0.1
    raise AssertionError("no feature rises")


def test_an_alarm_runs_before_the_next_token_and_stops_its_sequence(model, sae, decoded):
    output, feature, column, threshold = decoded
    order, events = [], []

    def fn(event):
        order.append(("alarm", event.position))
        events.append(event)
        return event.sequence == 0

    def chosen(ids, _scores):
        order.append(("token", ids.shape[1] - 1))
        return torch.zeros(len(ids), dtype=torch.bool)

    with gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        alarm = run.on_fire(feature, threshold, fn)
        stopped = model.generate(tiny.ids(), max_new_tokens=8, do_sample=False, stopping_criteria=[chosen])
    first = next(e for e in events if e.sequence == 0)
    assert (first.position, first.feature, first.token_id) == (column, feature, int(output[0, column]))
    assert first.value > threshold
    assert order.index(("alarm", column)) < order.index(("token", column + 1))
    assert alarm.fired == len(events)
    assert stopped[0, : column + 1].tolist() == output[0, : column + 1].tolist()
    assert stopped[0, column + 1] == 1
    assert (stopped[0, column + 2 :] == 0).all()
    if not any(e.sequence == 1 for e in events):
        assert torch.equal(stopped[1][: stopped.shape[1]], output[1][: stopped.shape[1]])


def test_an_alarm_that_does_not_stop_changes_nothing(model, sae, decoded):
    output, feature, _, threshold = decoded
    with gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        alarm = run.on_fire(feature, threshold, lambda event: None)
        got = model.generate(tiny.ids(), max_new_tokens=8, do_sample=False, min_new_tokens=8)
    assert torch.equal(got, output)
    assert alarm.fired >= 1
    expected = (run.latents[LAYER].features([feature]) > threshold).sum()
    assert alarm.fired == int(expected)


def test_a_queued_alarm_is_bounded_and_counts_what_it_drops(model, sae):
    go_on, seen = threading.Event(), []

    def slow(event):
        go_on.wait(60)
        seen.append(event)
        if len(seen) == 2:
            raise RuntimeError("kept")

    with torch.no_grad(), gsf.attach(model, {LAYER: sae}, tokens="all") as run:
        alarm = run.on_fire(3, -1.0, slow, sync=False, capacity=4)
        model(tiny.ids())
        go_on.set()
    assert alarm.fired == 18
    assert len(seen) + alarm.dropped == 18
    assert 4 <= len(seen) <= 5  # four in the queue, and perhaps one taken before it filled
    assert [str(e) for e in alarm.errors] == ["kept"]


def test_what_cannot_be_watched_is_named(model, sae):
    with pytest.raises(ValueError, match="k: expected"):
        TopK(0)
    with pytest.raises(IndexError, match="chosen"):
        Statistics(tiny.F, chosen=[tiny.F])
    with pytest.raises(ValueError, match="edges"):
        Statistics(tiny.F, edges=[1.0, 1.0])
    run = gsf.attach(model, {1: sae, 2: sae}, tokens="all")
    with pytest.raises(gsf.AttachError, match="several SAEs"):
        run.watch(TopK(1))
    with pytest.raises(IndexError, match="feature"):
        run.on_fire(tiny.F, 0.0, print, key=1)
    with torch.no_grad(), gsf.attach(model, {1: sae}, tokens="all") as run:
        run.on_fire(3, -1.0, lambda event: True)
        with pytest.raises(gsf.AttachError, match="only a sequence of generate can be stopped"):
            model(tiny.ids())


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_figures_under_another_default_dtype(model, sae, default):
    """What an observer counts does not depend on torch.set_default_dtype, which users set to load a model."""
    results = []
    for dtype in (torch.float32, default):
        torch.set_default_dtype(dtype)
        try:
            top, statistics, contexts = TopK(3), Statistics(sae.d_sae), TopContexts(sae.d_sae, k=2)
            read(model, sae, top, statistics, contexts)
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((top, statistics, contexts))
    for ours, theirs in zip(*results, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                got = getattr(ours, name)
                assert got.dtype == value.dtype, name
                assert torch.equal(got, value), name
