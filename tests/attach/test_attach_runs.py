"""attach: leaving, threads, and what cannot be attached."""

import threading

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma3()


def test_everything_goes_on_leaving(gemma):
    before = tiny.hook_count(gemma)
    with gsf.attach(gemma, [tiny.sae(site=tiny.resid(1)), tiny.sae(site=gsf.Site("mlp", 1))], mode="splice"):
        assert tiny.hook_count(gemma) != before
    assert tiny.hook_count(gemma) == before
    with pytest.raises(RuntimeError, match="mine"), gsf.attach(gemma, {1: tiny.sae()}, mode="splice"):
        raise RuntimeError("mine")
    assert tiny.hook_count(gemma) == before


def test_an_exception_inside_the_model_leaves_no_half_row(gemma):
    before = tiny.hook_count(gemma)

    def fail(*_):
        raise RuntimeError("inside")

    with torch.no_grad(), gsf.attach(gemma, {1: tiny.sae()}) as run:
        handle = tiny.layer(gemma, 2).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            gemma(tiny.ids())
        handle.remove()
        gemma(tiny.ids())
    assert run.latents[1].n_rows == len(run.tokens) == 18
    assert tiny.hook_count(gemma) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_nested_runs_leave_in_any_order(gemma, order):
    before = tiny.hook_count(gemma)
    sae = tiny.sae()
    runs = [gsf.attach(gemma, {1: sae}), gsf.attach(gemma, {1: sae}, mode="splice"), gsf.attach(gemma, {2: sae})]
    with torch.no_grad():
        base = gemma(tiny.ids()).logits
        for run in runs:
            run.__enter__()
        gemma(tiny.ids())
        for number, leaving in enumerate(order):
            runs[leaving].__exit__(None, None, None)
            logits = gemma(tiny.ids()).logits
            assert torch.equal(logits, base) == (1 in order[: number + 1])
            assert len(runs[leaving].tokens) == 18 * (number + 1)
    assert tiny.hook_count(gemma) == before


# ---- threads ------------------------------------------------------------------------------------------


def in_threads(*targets):
    caught, threads = [], []

    def guarded(target):
        try:
            with torch.no_grad():
                target()
        except BaseException as error:  # noqa: BLE001 a test looks at it
            caught.append(error)

    for target in targets:
        threads.append(threading.Thread(target=guarded, args=(target,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return caught


def test_each_thread_that_attaches_has_its_own_run(gemma):
    sae, both, found = tiny.sae(), threading.Barrier(2, timeout=60), {}

    def work(seed):
        with gsf.attach(gemma, {1: sae}, mode="splice" if seed else "observe") as run:
            both.wait()
            for _ in range(5):
                logits = gemma(tiny.ids(seed=seed)).logits
            both.wait()
        found[seed] = (run, logits)

    assert not in_threads(lambda: work(0), lambda: work(1))
    for seed in (0, 1):
        with torch.no_grad(), gsf.attach(gemma, {1: sae}, mode="splice" if seed else "observe") as alone:
            for _ in range(5):
                logits = gemma(tiny.ids(seed=seed)).logits
        assert found[seed][0].latents[1] == alone.latents[1]
        assert torch.equal(found[seed][1], logits)


def test_two_threads_in_one_run_get_an_error(gemma):
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(60)

    with gsf.attach(gemma, {1: tiny.sae()}) as run:
        handle = tiny.layer(gemma, 2).register_forward_hook(wait)

        def second():
            inside.wait(60)
            try:
                gemma(tiny.ids())
            finally:
                go_on.set()

        caught = in_threads(lambda: gemma(tiny.ids()), second)
        handle.remove()
        assert [type(e) for e in caught] == [gsf.AttachError]
        assert "two threads" in str(caught[0])
        assert len(run.tokens) == 18
        assert not in_threads(lambda: gemma(tiny.ids()))  # one after the other is fine
    assert len(run.tokens) == 36


# ---- bad input ----------------------------------------------------------------------------------------

BAD = {
    "unknown layer": ({9: tiny.sae()}, {}, "4 layers"),
    "unknown module": ({"model.layers.1.nothing.output": tiny.sae()}, {}, "no module"),
    "unknown kind": ({(1, "residue"): tiny.sae()}, {}, "kind: expected"),
    "wrong width": ({1: tiny.sae(31)}, {}, "carries 32 dimensions, the SAE's d_in is 31"),
    "wrong width of heads": ({(1, "attn"): tiny.sae(32)}, {}, "carries 48"),
    "wrong width out": ({1: tiny.sae(32, 31)}, {"mode": "splice"}, "d_out is 31"),
    "two splices": ({1: tiny.sae(), "model.layers.1": tiny.sae()}, {"mode": "splice"}, "two splices"),
    "no site": (tiny.sae(), {}, "names no site"),
    "same site twice": ([tiny.sae(site=tiny.resid(1))] * 2, {}, "give a dict"),
    "none": ([], {}, "at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_attached_is_named_and_leaves_the_model_alone(gemma, name):
    saes, options, message = BAD[name]
    before = tiny.hook_count(gemma)
    with pytest.raises(gsf.AttachError, match=message):
        gsf.attach(gemma, saes, **options)
    assert tiny.hook_count(gemma) == before


def test_a_second_run_cannot_splice_the_same_site(gemma):
    before = tiny.hook_count(gemma)
    with gsf.attach(gemma, {1: tiny.sae()}, mode="splice"):
        with gsf.attach(gemma, {1: tiny.sae()}):
            pass
        with pytest.raises(gsf.AttachError, match="two splices"), gsf.attach(gemma, {1: tiny.sae()}, mode="splice"):
            pass
    assert tiny.hook_count(gemma) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "watch"}, ValueError),
        ({"tokens": "some"}, ValueError),
        ({"tokens": torch.ones(3)}, TypeError),
        ({"tokens": 3}, TypeError),
    ],
)
def test_arguments_that_mean_nothing(gemma, options, error):
    with pytest.raises(error, match=next(iter(options))):
        gsf.attach(gemma, {1: tiny.sae()}, **options)


def test_a_model_and_saes_of_another_type_are_named(gemma):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        gsf.attach("google/gemma-2-2b", {1: tiny.sae()})
    for saes, said in ((None, "got NoneType"), ("sae", "got str"), ({1: "sae"}, "got str under 1")):
        with pytest.raises(TypeError, match=f"saes: expected .*{said}"):
            gsf.attach(gemma, saes)


def test_content_without_ids_is_an_error(gemma):
    embeds = gemma.get_input_embeddings()(tiny.ids()).detach()
    with torch.no_grad():
        with (
            gsf.attach(gemma, {1: tiny.sae()}) as run,
            pytest.raises(gsf.AttachError, match="inputs_embeds only; pass tokens='all'"),
        ):
            gemma(inputs_embeds=embeds)
        assert len(run.tokens) == 0
        with gsf.attach(gemma, {1: tiny.sae()}, tokens="all") as run:
            gemma(inputs_embeds=embeds)
    assert run.latents[1].n_rows == 18
    assert set(run.tokens.token_id.tolist()) == {-1}


def test_a_selection_of_the_wrong_size_is_an_error(gemma):
    wrong = [torch.ones(8, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool), lambda ids: ids[:, 1:] > 0]
    for tokens in [*wrong, lambda ids: ids]:
        with (
            torch.no_grad(),
            gsf.attach(gemma, {1: tiny.sae()}, tokens=tokens),
            pytest.raises(gsf.AttachError, match="tokens: expected"),
        ):
            gemma(tiny.ids())


def test_a_site_that_is_not_reached_is_an_error(gemma):
    mlp, real = tiny.layer(gemma).mlp, tiny.layer(gemma).mlp.forward
    with torch.no_grad(), gsf.attach(gemma, {"model.layers.1.mlp.up_proj": tiny.sae(48)}) as run:
        mlp.forward = lambda x: x
        try:
            with pytest.raises(gsf.AttachError, match="not reached"):
                gemma(tiny.ids())
        finally:
            mlp.forward = real
    assert len(run.tokens) == 0
