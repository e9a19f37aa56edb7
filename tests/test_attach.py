"""attach: sites, modes, rows, token selection, errors, against hooks written by hand."""

import threading

import attach_models as tiny
import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.attach import Activations

FAMILIES = {"gemma2": tiny.gemma2, "gemma3": tiny.gemma3, "gemma3_sdpa": lambda: tiny.gemma3("sdpa")}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma3()


def layer(model, index=1):
    return model.model.layers[index]


# ---- sites --------------------------------------------------------------------------------------------


def test_each_site_is_where_gemma_scope_reads(model):
    block = layer(model)
    saes = {
        (1, "resid"): tiny.sae(),
        (1, "mlp"): tiny.sae(seed=2),
        (1, "attn"): tiny.sae(48, seed=3),
        (1, "mlp_in"): tiny.sae(seed=4),
        (1, "attn_out"): tiny.sae(seed=6),
        "model.layers.2.mlp.output": tiny.sae(seed=7),
        "model.layers.2.mlp.gate_proj.input": tiny.sae(seed=8),
        "model.layers.2.mlp.up_proj": tiny.sae(48, seed=9),
    }
    hands = {
        (1, "resid"): (block, "output"),
        (1, "mlp"): (block.post_feedforward_layernorm, "output"),
        (1, "attn"): (block.self_attn.o_proj, "input"),
        (1, "mlp_in"): (block.pre_feedforward_layernorm, "output"),
        (1, "attn_out"): (block.post_attention_layernorm, "output"),
        "model.layers.2.mlp.output": (layer(model, 2).mlp, "output"),
        "model.layers.2.mlp.gate_proj.input": (layer(model, 2).mlp.gate_proj, "input"),
        "model.layers.2.mlp.up_proj": (layer(model, 2).mlp.up_proj, "output"),
    }
    by_hand = {key: tiny.Hand(*at) for key, at in hands.items()}
    with torch.no_grad(), gsf.attach(model, saes) as run:
        model(tiny.ids())
    for hand in by_hand.values():
        hand.handle.remove()
    assert list(run.latents) == list(saes)
    for key, sae in saes.items():
        expected = sae.encode_sparse(by_hand[key].rows())
        assert run.latents[key] == expected, key
        assert expected.nnz > 50


def test_embedding_is_read_unscaled_and_spliced_scaled(model):
    sae = tiny.sae(site=gsf.Site("embed"))
    table = model.get_input_embeddings().weight
    with torch.no_grad(), tiny.Hand(model.get_input_embeddings()) as plain:
        model(tiny.ids())
    with torch.no_grad(), gsf.attach(model, sae, mode="splice") as run, tiny.Hand(layer(model, 0)) as _:
        logits = model(tiny.ids()).logits
    assert run.latents["model.embed_tokens.output"] == sae.encode_sparse(table[tiny.ids()].detach()).reshape(18)
    scale = plain.rows()[0, 0] / table[tiny.ids()[0, 0], 0]
    x_hat = sae(table[tiny.ids()].detach()) * scale
    with torch.no_grad(), tiny.Hand(model.get_input_embeddings(), change=lambda _x: x_hat):
        torch.testing.assert_close(logits, model(tiny.ids()).logits)


def test_transcoder_reads_one_site_and_replaces_another(model):
    sites = {"site": gsf.Site("mlp_in", 1), "site_out": gsf.Site("mlp", 1)}
    block = layer(model)
    for coder in (
        tiny.sae(kind=gsf.JumpReLUTranscoder, **sites),
        tiny.sae(kind=gsf.JumpReLUSkipTranscoder, W_skip=0.1 * torch.randn(32, 32), **sites),
    ):
        with torch.no_grad():
            base = model(tiny.ids()).logits
            with tiny.Hand(block.pre_feedforward_layernorm) as x:
                model(tiny.ids())
            with gsf.attach(model, coder, mode="splice") as run:
                spliced = model(tiny.ids()).logits
            recon = coder(x.seen[0])
            with tiny.Hand(block.post_feedforward_layernorm, change=lambda _y, r=recon: r):
                expected = model(tiny.ids()).logits
            with gsf.attach(model, {1: coder}, mode="splice+error"):
                kept = model(tiny.ids()).logits
        assert torch.equal(spliced, expected)
        assert not torch.equal(spliced, base)
        assert torch.equal(kept, base)
        assert run.latents[coder.cfg.site] == coder.encode_sparse(x.rows())


def test_gemma_scope_1_transcoders_read_the_norm_without_its_gain(model):
    site = gsf.Site("mlp_in_no_gain", 2)
    sae = tiny.sae(site=site)
    norm = layer(model, 2).pre_feedforward_layernorm
    with torch.no_grad(), tiny.Hand(norm, "input") as hand, gsf.attach(model, sae) as run:
        model(tiny.ids())
    x = hand.rows().float()
    assert run.latents[site] == sae.encode_sparse(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps))
    with pytest.raises(gsf.AttachError, match="not replaced"):
        gsf.attach(model, sae, mode="splice")


def test_a_site_has_several_names(gemma):
    with torch.no_grad(), gsf.attach(gemma, tiny.sae(site=tiny.resid(1))) as run:
        gemma(tiny.ids())
    first = run.latents[1]
    for name in ((1, "resid"), "model.layers.1.output", tiny.resid(1)):
        assert run.latents[name] is first
    assert len(run.latents) == 1
    assert 2 not in run.latents


# ---- modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["observe", "splice+error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watching_changes_no_bit(model, mode, dtype):
    model = model.to(dtype)
    try:
        with torch.no_grad():
            base = model(tiny.ids()).logits
            with gsf.attach(model, {1: tiny.sae(), 3: tiny.sae(seed=2)}, mode=mode):
                assert torch.equal(model(tiny.ids()).logits, base)
            assert torch.equal(model(tiny.ids()).logits, base)
    finally:
        model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splice_is_the_reconstruction_in_the_activations_dtype(model, dtype):
    model, sae = model.to(dtype), tiny.sae()
    try:
        with torch.no_grad():
            with gsf.attach(model, {1: sae}, mode="splice"):
                spliced = model(tiny.ids()).logits
            with tiny.Hand(layer(model), change=lambda x: sae(x).to(x.dtype)):
                assert torch.equal(spliced, model(tiny.ids()).logits)
    finally:
        model.float()


def test_observers_see_before_edits_here_and_after_edits_earlier(gemma):
    seen, spliced = tiny.sae(), tiny.sae(seed=2)
    with torch.no_grad():
        with gsf.attach(gemma, {1: spliced}, mode="splice"), gsf.attach(gemma, {1: seen, 2: seen}) as run:
            gemma(tiny.ids())
        with tiny.Hand(layer(gemma), change=spliced) as here, tiny.Hand(layer(gemma, 2)) as later:
            gemma(tiny.ids())
    assert run.latents[1] == seen.encode_sparse(here.rows())
    assert run.latents[2] == seen.encode_sparse(later.rows())


# ---- gradients ----------------------------------------------------------------------------------------


def dense(sae, x, error_grad=False):
    """Eager reference of splice+error: x̂ plus an error that is a constant, or not."""
    z = x @ sae.W_enc + sae.b_enc
    f = torch.relu(z) * (z > sae.threshold)
    x_hat = f @ sae.W_dec + sae.b_dec
    error = x - x_hat
    return x_hat + (error if error_grad else error.detach())


@pytest.mark.parametrize("error_grad", [False, True])
def test_gradient_holds_the_error_constant(gemma, error_grad):
    sae = tiny.sae()
    weights = (layer(gemma, 0).mlp.up_proj.weight, sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)

    def gradients():
        loss = gemma(tiny.ids()).logits.logsumexp(-1).square().sum()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    with gsf.attach(gemma, {1: sae}, mode="splice+error", error_grad=error_grad):
        ours = gradients()
    with tiny.Hand(layer(gemma), change=lambda x: dense(sae, x, error_grad)):
        theirs = gradients()
    for got, want in zip(ours, theirs, strict=True):
        if got is None:  # the reference's terms cancel up to rounding
            assert want.abs().max() < 1e-3
        else:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_gradient_of_rows_left_out_is_the_identity(gemma):
    sae, chosen = tiny.sae(), torch.arange(9) % 2 == 0
    weight = layer(gemma, 0).mlp.up_proj.weight

    def gradient():
        return torch.autograd.grad(gemma(tiny.ids()).logits.logsumexp(-1).sum(), weight)[0]

    with gsf.attach(gemma, {1: sae}, mode="splice+error", tokens=chosen):
        ours = gradient()
    with tiny.Hand(layer(gemma), change=lambda x: torch.where(chosen[:, None], dense(sae, x), x)):
        want = gradient()
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


# ---- rows and token selection -------------------------------------------------------------------------


def test_rows_carry_call_sequence_position_and_padding(gemma):
    ids = tiny.ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad(), gsf.attach(gemma, {1: tiny.sae()}) as run:
        gemma(ids, attention_mask=mask)
        gemma(ids[:, :4])
    tokens = run.tokens
    assert len(tokens) == run.latents[1].n_rows == 18 + 8
    assert tokens.call.tolist() == [0] * 18 + [1] * 8
    assert tokens.sequence.tolist() == [0] * 9 + [1] * 9 + [2] * 4 + [3] * 4
    assert tokens.position.tolist() == [*range(9), *range(9), *range(4), *range(4)]
    assert tokens.token_id.tolist() == [*ids.flatten().tolist(), *ids[:, :4].flatten().tolist()]
    assert tokens.valid.tolist() == [*mask.flatten().bool().tolist(), *[True] * 8]
    assert [len(s) for s in run.sequences(1)] == [6, 9, 4, 4]
    assert run.sequences(1)[0] == run.latents[1][3:9]


SELECTIONS = {
    "columns": torch.tensor([True, False] * 4 + [True]),
    "batch": torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.5,
    "ids": lambda ids: ids % 2 == 0,
    "rows": lambda ids, rows: (rows.position > 3) & (ids > 5),
    "none": lambda ids: torch.zeros_like(ids, dtype=torch.bool),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("mode", ["observe", "splice"])
def test_tokens_left_out_keep_an_empty_row_and_pass(gemma, name, mode):
    ids, sae = tiny.ids(), tiny.sae()
    position = torch.arange(9).expand(2, 9)
    chosen = {
        "columns": (position % 2 == 0),
        "batch": SELECTIONS["batch"],
        "ids": ids % 2 == 0,
        "rows": (position > 3) & (ids > 5),
        "none": torch.zeros(2, 9, dtype=torch.bool),
    }[name]
    with torch.no_grad():
        with gsf.attach(gemma, {1: sae}, tokens=SELECTIONS[name], mode=mode) as run:
            logits = gemma(ids).logits
        with tiny.Hand(layer(gemma), change=lambda x: torch.where(chosen[..., None], sae(x), x)) as hand:
            spliced = gemma(ids).logits
    dense = sae.encode(hand.rows())
    dense[~chosen.reshape(-1)] = 0
    assert torch.equal(run.latents[1].to_dense(), dense)
    assert torch.equal(run.latents[1].l0() > 0, chosen.reshape(-1))
    if mode == "splice":
        assert torch.equal(logits, spliced)


def test_content_leaves_out_special_tokens_padding_and_the_chat_prefix(gemma):
    ids = tiny.ids(3)
    ids[0, :3] = torch.tensor([0, 0, 2])
    ids[1, 5], ids[1, 7] = 2, 1
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    sae = tiny.sae()
    with torch.no_grad(), gsf.attach(gemma, {1: sae}, tokens="content") as run:
        gemma(ids, attention_mask=mask)
    expected = torch.ones(3, 9, dtype=torch.bool)
    expected[0, :3] = expected[1, 0] = expected[1, 5] = expected[1, 7] = expected[2, 0] = False
    assert torch.equal(run.latents[1].l0() > 0, expected.reshape(-1))


@pytest.mark.parametrize("chunk", [1, 3, 9])
def test_chat_prefix_is_found_however_the_prompt_is_cut(chunk):
    model = tiny.gemma3()
    model.config.model_type = "gemma2"  # <start_of_turn> is 106 there
    model = _wider(model)
    ids = torch.tensor([[0, 2, 106, 20, 21, 30, 31, 32, 33], [2, 106, 20, 21, 30, 31, 32, 33, 34]])
    mask = (ids != 0).long()
    with torch.no_grad(), gsf.attach(model, {1: tiny.sae()}, tokens="content") as run:
        cache = None
        for at in range(0, 9, chunk):
            more = {} if cache is None else {CACHE: cache}
            out = model(ids[:, at : at + chunk], attention_mask=mask[:, : at + chunk], use_cache=True, **more)
            cache = getattr(out, CACHE)
    fired = torch.zeros(2, 9, dtype=torch.bool)
    fired[run.tokens.sequence, run.tokens.position] = run.latents[1].l0() > 0
    expected = torch.ones(2, 9, dtype=torch.bool)
    expected[0, :5] = expected[1, :4] = False
    assert torch.equal(fired, expected)


def _wider(model):
    model.resize_token_embeddings(128)
    return tiny.lively(model)


def test_activations_in_place_of_an_sae(gemma):
    ids, got = tiny.ids(), []
    with torch.no_grad():
        with tiny.Hand(layer(gemma)) as hand:
            gemma(ids)
        saes = {1: Activations(), (2, "resid"): Activations(sink=lambda x, rows: got.append((x.clone(), rows)))}
        with gsf.attach(gemma, saes, tokens="content") as run:
            gemma(ids)
    assert torch.equal(run.activations[1], hand.rows()[(ids != 2).reshape(-1)])
    ((x, rows),) = got
    assert x.shape == (16, 32)
    assert torch.equal(rows.token_id, ids[ids != 2])
    assert len(run.latents) == 0


# ---- leaving ------------------------------------------------------------------------------------------


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
        handle = layer(gemma, 2).register_forward_hook(fail)
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
        handle = layer(gemma, 2).register_forward_hook(wait)

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
            gsf.attach(gemma, {1: tiny.sae()}, tokens="content") as run,
            pytest.raises(gsf.AttachError, match="input_ids"),
        ):
            gemma(inputs_embeds=embeds)
        assert len(run.tokens) == 0
        with gsf.attach(gemma, {1: tiny.sae()}) as run:
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
    mlp, real = layer(gemma).mlp, layer(gemma).mlp.forward
    with torch.no_grad(), gsf.attach(gemma, {"model.layers.1.mlp.up_proj": tiny.sae(48)}) as run:
        mlp.forward = lambda x: x
        try:
            with pytest.raises(gsf.AttachError, match="not reached"):
                gemma(tiny.ids())
        finally:
            mlp.forward = real
    assert len(run.tokens) == 0


def _cache_name():
    import transformers

    return (
        "cache"
        if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__annotations__
        else "past_key_values"
    )


CACHE = _cache_name()
