"""The plugin in a real engine: latents, steering, alarms, and everything that vLLM does with requests."""

import pytest
import torch
from engine import LAYER, STEP, prompt

from gemmascope_fast import Ablate, Add, Clamp, Direction, Mask, MinClamp, Scale
from gemmascope_fast.attach import attach
from gemmascope_fast.attach.vllm import request
from gemmascope_fast.attach.vllm.requests import RequestError

ALL = request(observe="res12", tokens="all")
FIRE = 853


def bound(x, sae):
    """[n, d_sae]: how far two fp32 computations of a pre-activation may be apart: 2^-24 a rounding, over all
    roundings of the layers before, relative to the norms.  Measured apart: below a third of it."""
    return 64 * 2.0**-24 * x.norm(dim=1)[:, None] * sae.W_enc.norm(dim=0)[None]


def assert_near(got, want, x, sae):
    """Two sets of latents agree within the bound: where only one fired, it is within the bound of its threshold."""
    a, b, most = got.to_dense(), want.to_dense(), bound(x, sae)
    both = (a != 0) & (b != 0)
    assert bool(((a - b).abs()[both] <= most[both]).all())
    alone = (a != 0) ^ (b != 0)
    assert bool(((a + b - sae.threshold)[alone] <= most[alone]).all())
    assert int(both.sum()) > 10 * int(alone.sum())


def test_latents_are_those_of_the_rows(engine):
    ids = prompt(30)
    done, x = engine.activations(lambda: engine.one(ids, ALL, max_tokens=6))
    features = done.gemmascope
    assert features.positions().tolist() == list(range(35))
    assert features.latents() == engine.sae.encode_sparse(x)


def test_content_leaves_out_special_tokens(engine):
    done = engine.one(prompt(10), request(observe="res12"), max_tokens=1)
    assert done.gemmascope.positions().tolist() == list(range(1, 10))


def test_latents_equal_transformers(engine, reference):
    ids = prompt(40, seed=1)
    done, x = engine.activations(lambda: engine.one(ids, ALL, max_tokens=8))
    whole = torch.tensor([[*ids, *done.token_ids[:-1]]])
    with attach(reference, {LAYER: engine.sae}, tokens="all") as run:
        logits = reference(whole).logits
    assert logits[0, len(ids) - 1 :].argmax(-1).tolist() == list(done.token_ids)
    assert_near(done.gemmascope.latents(), run.latents[LAYER], x, engine.sae)


@pytest.mark.parametrize(
    ("positions", "rows"),
    [
        ("prompt", range(20)),
        ("generated", range(20, 24)),
        ("last", [19]),
        ([5, 22], range(5, 22)),
        ("all", range(24)),
    ],
)
def test_positions(engine, positions, rows):
    asked = request(observe={"sae": "res12", "positions": positions}, tokens="all")
    done = engine.one(prompt(20), asked, max_tokens=5)
    whole = engine.one(prompt(20), ALL, max_tokens=5)
    assert done.gemmascope.positions().tolist() == list(rows)
    assert done.gemmascope.latents() == whole.gemmascope.latents()[torch.tensor(list(rows))]


def test_features(engine):
    whole = engine.one(prompt(20), ALL).gemmascope.latents()
    some = [int(f) for f in whole[7].col_indices[:3]]
    chosen = engine.one(prompt(20), request(observe={"features": some}, tokens="all")).gemmascope.latents()
    assert torch.equal(chosen.features(some), whole.features(some))
    assert int(chosen.l0().max()) <= 3
    top = engine.one(prompt(20), request(observe={"features": {"top": 4}}, tokens="all")).gemmascope.latents()
    assert torch.equal(top.topk(4).values, whole.topk(4).values)
    assert top.l0().tolist() == whole.l0().clamp(max=4).tolist()


def steered(edit):
    return request(observe="res12", steer=edit)


@pytest.mark.parametrize(
    "edit",
    [
        Clamp(FIRE, 9000.0),
        Ablate(FIRE),
        Add(7, 900.0, positions="generated"),
        Scale(FIRE, 3.0, positions="prompt"),
        MinClamp(11, 500.0),
        Mask(range(0, 4096, 2)),
        Direction(torch.ones(640), 40.0),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_steering_equals_attach(engine, reference, edit):
    """The residual stream after the edit, in the engine and in transformers, over prompt and generated tokens."""
    ids = prompt(24, seed=2)
    done, x = engine.activations(lambda: engine.one(ids, request(steer=edit), max_tokens=2))
    _, before = engine.activations(lambda: engine.one(ids, None, max_tokens=2))
    seen = []
    with attach(reference, {LAYER: engine.sae}, edits=edit):
        layer = reference.model.layers[LAYER]
        handle = layer.register_forward_hook(lambda _m, _a, o: seen.append((o if torch.is_tensor(o) else o[0])[0]))
        try:
            want = reference.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False, eos_token_id=None)
        finally:
            handle.remove()
    assert list(done.token_ids) == want[0, len(ids) :].tolist()
    want = torch.cat(seen)
    assert float((x - want).norm() / want.norm()) < 1e-5
    changed = (x[:24] != before[:24]).any(1)
    expected = torch.ones(24, dtype=torch.bool)
    expected[0] = False  # BOS is not content
    if edit.positions == "generated":
        expected[:] = False
    assert torch.equal(changed, expected) or isinstance(edit, (Ablate, Scale))  # these change only where it fires
    assert bool((x[24:] != before[24:]).any())


def test_a_batch_equals_each_alone(engine):
    prompts = [prompt(12 + 5 * i, seed=10 + i) for i in range(6)]
    kinds = [ALL, steered(Clamp(FIRE, 3000.0)), None]
    asked = [kinds[i % 3] for i in range(6)]
    together = [o.outputs[0] for o in engine.generate(prompts, asked, max_tokens=8)]
    for ids, args, done in zip(prompts, asked, together, strict=True):
        engine.forget_prefixes()
        alone, x = engine.activations(lambda ids=ids, args=args: engine.one(ids, args, max_tokens=8))
        assert alone.text == done.text
        if args is None:
            assert done.gemmascope is None
        elif args is ALL:
            assert done.gemmascope.positions().tolist() == list(range(len(ids) + 7))
            assert_near(done.gemmascope.latents(), alone.gemmascope.latents(), x, engine.sae)


def test_steering_changes_no_bit_of_others(engine):
    """The same schedule with and without an effect: what else is in the batch stays the same, bit for bit."""
    prompts = [prompt(20, seed=20), prompt(25, seed=21)]
    runs = []
    for strength in (0.0, 5000.0):
        engine.forget_prefixes()
        asked = [steered(Add(FIRE, strength)), ALL]
        runs.append([o.outputs[0] for o in engine.generate(prompts, asked, max_tokens=10)])
    (first, other), (changed, same) = runs
    assert list(first.token_ids) != list(changed.token_ids)
    assert list(other.token_ids) == list(same.token_ids)
    assert other.gemmascope.latents() == same.gemmascope.latents()


def test_chunked_prefill(engine):
    ids = prompt(3 * STEP + 7, seed=30)
    done, x = engine.activations(lambda: engine.one(ids, ALL, max_tokens=2))
    assert done.gemmascope.positions().tolist() == list(range(len(ids) + 2))
    assert done.gemmascope.latents() == engine.sae.encode_sparse(x)


def test_preemption(engine, monkeypatch):
    prompts = [prompt(60, seed=40 + i) for i in range(6)]
    kinds = [ALL, steered(Clamp(FIRE, 3000.0)), None]
    asked = [kinds[i % 3] for i in range(6)]
    preempted = []
    original = type(engine.scheduler)._preempt_request

    def counted(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(type(engine.scheduler), "_preempt_request", counted)
    together = [o.outputs[0] for o in engine.generate(prompts, asked, max_tokens=24)]
    assert preempted
    # the last to arrive are the first to be preempted: one of each kind
    for ids, args, done in list(zip(prompts, asked, together, strict=True))[3:]:
        engine.forget_prefixes()
        alone, x = engine.activations(lambda ids=ids, args=args: engine.one(ids, args, max_tokens=24))
        assert alone.text == done.text
        if args is ALL:
            assert done.gemmascope.positions().tolist() == list(range(len(ids) + 23))
            assert_near(done.gemmascope.latents(), alone.gemmascope.latents(), x, engine.sae)


def test_prefix_cache(engine):
    engine.forget_prefixes()
    ids = prompt(50, seed=50)
    first = engine.one(ids, None)
    output = engine.generate([ids], request(observe="res12", tokens="all", cached="report"))[0]
    reported, cached = output.outputs[0], output.num_cached_tokens
    assert cached in (16, 32, 48)
    assert reported.gemmascope.cached == cached
    assert reported.gemmascope.positions().tolist() == list(range(cached, 57))
    computed = engine.one(ids, ALL)
    assert computed.gemmascope.cached == 0
    assert computed.gemmascope.positions().tolist() == list(range(57))
    assert first.text == reported.text == computed.text


def test_a_steered_request_shares_no_blocks(engine):
    engine.forget_prefixes()
    ids = prompt(50, seed=51)
    edit = request(observe="res12", steer=Add(FIRE, 5000.0), cached="report")
    alone = engine.one(ids, edit)
    plain = engine.generate([ids], None)[0]
    assert plain.num_cached_tokens == 0
    again = engine.one(ids, edit)
    assert again.gemmascope.cached == 0
    assert again.text == alone.text != plain.outputs[0].text
    assert engine.generate([ids], None)[0].num_cached_tokens > 0


def test_alarm_ends_before_the_next_token(engine):
    ids = prompt(20, seed=60)
    whole = engine.one(ids, ALL, ignore_eos=False)
    latents = whole.gemmascope.latents()
    feature = int(latents[22].topk(1).indices[0])
    values = latents.features([feature])[:, 0]
    threshold = float(values[22]) * 0.999
    first = int((values[20:] > threshold).nonzero()[0]) + 20
    asked = request(alarm={"feature": feature, "threshold": threshold, "positions": "generated"}, tokens="all")
    done = engine.one(ids, asked, ignore_eos=False)
    assert done.finish_reason == "stop"
    assert done.stop_reason == f"gemmascope alarm: feature {feature} of res12"
    assert [event["position"] for event in done.gemmascope.fired] == [first]
    assert list(done.token_ids[:-1]) == list(whole.token_ids[: first - 20 + 1])
    silent = engine.one(ids, request(alarm={"feature": feature, "threshold": 1e9}, tokens="all"), ignore_eos=False)
    assert silent.text == whole.text
    assert silent.gemmascope.fired == []


def test_several_samples_and_stop_strings(engine):
    outputs = engine.generate([prompt(20)], ALL, n=2, temperature=1.0, seed=7)[0].outputs
    assert len(outputs) == 2
    for done in outputs:
        assert done.gemmascope.positions().tolist() == list(range(27))
    text = engine.one(prompt(20), None).text
    stop = text[len(text) // 2]
    done = engine.one(prompt(20), ALL, stop=[stop])
    assert done.stop_reason == stop
    assert done.gemmascope.positions().tolist() == list(range(20 + len(done.token_ids) - 1))


def test_aborted_requests_leave_nothing(engine):
    from vllm import SamplingParams, TokensPrompt

    core = engine.llm.llm_engine
    for i in range(6):
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, extra_args=ALL)
        core.add_request(f"r{i}", TokensPrompt(prompt_token_ids=prompt(90, seed=i)), params)
    for steps in (1, 3, 5):
        for _ in range(steps):
            core.step()
        core.abort_request([f"r{steps}", f"r{steps - 1}"])
    assert not core.has_unfinished_requests()
    # the fixture looks for what is left


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"observe": "nope"}, "observe: sae: expected one of res12, got 'nope'"),
        ({"observe": {"features": [99999]}}, "feature: expected 0 to 4095, got 99999"),
        ({"observe": [], "spy": 1}, "gemmascope: expected .*, got 'spy'"),
        ({"steer": {"edit": "clamp", "feature": 1}}, "clamp: expected 'value'"),
        ({"steer": {"edit": "clamp", "feature": 1, "value": float("nan")}}, "value: expected a finite number, got nan"),
        ({"alarm": {"feature": 1, "threshold": 1}, "tokens": "some"}, "tokens: expected content or all"),
        ("{", "gemmascope: expected JSON"),
        (7, "gemmascope: expected an object, got 7"),
    ],
)
def test_malformed_requests_are_refused_and_the_engine_goes_on(engine, given, message):
    with pytest.raises(RequestError, match=message):
        engine.generate([prompt(8), prompt(9)], [ALL, {"gemmascope": given}])
    assert len(engine.one(prompt(8), ALL).gemmascope.positions()) == 15


def test_an_alarm_that_could_not_end_is_refused(engine):
    asked = request(alarm={"feature": 1, "threshold": 1.0})
    with pytest.raises(RequestError, match="ignore_eos=False"):
        engine.one(prompt(8), asked)
    with pytest.raises(RequestError, match="min_tokens"):
        engine.one(prompt(8), asked, ignore_eos=False, min_tokens=3)


def test_a_fault_of_ours_ends_that_request_alone(engine, monkeypatch):
    plain = engine.one(prompt(12, seed=3), None)

    def broken(*_args, **_kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.sae), "encode_sparse", broken)
        failed, other = engine.generate([prompt(12), prompt(12, seed=3)], [ALL, None], ignore_eos=False)
    failed, other = failed.outputs[0], other.outputs[0]
    assert failed.stop_reason == "gemmascope error: res12: RuntimeError: out of luck"
    assert failed.finish_reason == "stop"
    assert other.text == plain.text
    assert len(engine.one(prompt(8), ALL).gemmascope.positions()) == 15


def test_an_answer_to_text_is_json(engine):
    import json

    given = {"gemmascope": json.dumps({"observe": {"features": {"top": 2}}, "tokens": "all"})}
    output = engine.generate([prompt(8)], given, max_tokens=2)[0]
    answer = json.loads(json.dumps(output.kv_transfer_params))["gemmascope"][0]
    latents = output.outputs[0].gemmascope.latents()
    assert answer["latents"]["res12"]["position"] == list(range(9))
    assert [f for row in answer["latents"]["res12"]["feature"] for f in row] == latents.col_indices.tolist()
    assert engine.generate([prompt(8)], ALL)[0].kv_transfer_params is None
