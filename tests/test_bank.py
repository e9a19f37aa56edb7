"""A bank never gives a wrong answer, never exceeds its budgets, never hangs; what is there is what was used last."""

import json
import random
import threading
from collections import OrderedDict

import attach_models as tiny
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import gemmascope_fast as gsf
from gemmascope_fast.bank import Bank
from gemmascope_fast.bank.tiers import tensors_of
from gemmascope_fast.loading import from_pretrained
from gemmascope_fast.screen import most_bytes

D, F = tiny.D, tiny.F
ONE = 4 * (2 * D * F + 2 * F + D) + most_bytes(D, F)  # bytes of one SAE in fp32, with what it may pack
WEIGHTS = ONE - most_bytes(D, F)
JOIN = 60  # seconds after which a thread counts as hung


@pytest.fixture(autouse=True)
def _one_thread():
    """Shapes this small gain nothing from several, and wait for each other where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arrays(seed, d=D, f=F, d_out=None):
    g = np.random.default_rng(seed)
    d_out = d_out or d
    return {
        "W_enc": (g.standard_normal((d, f)) / d**0.5).astype("f4"),
        "W_dec": (g.standard_normal((f, d_out)) / d_out**0.5).astype("f4"),
        "b_enc": (0.1 * g.standard_normal(f)).astype("f4"),
        "b_dec": (0.1 * g.standard_normal(d_out)).astype("f4"),
        "threshold": np.full(f, 0.8, "f4"),
    }


def release(root, layers, repo="gemma-scope-2b-pt-res", seed=0, d=D, f=F):
    """A Gemma Scope release of one residual SAE a layer; gives its folder."""
    for layer in range(layers):
        folder = root / repo / f"layer_{layer}" / "width_16k" / f"average_l0_{layer + 50}"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **arrays(100 * seed + layer, d, f))
    return root / repo


def each_loaded(folder):
    return {name: from_pretrained(folder, name) for name in Bank(folder)}


def device(bank):
    return bank.held()["device"]


def run_threads(*functions):
    """All at once; the first exception of any is raised here, and a thread that hangs is an error."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:  # noqa: BLE001  (raised below, in the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


# ---- budget and order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 3, 5, None])
def test_the_least_recently_used_leaves_and_every_answer_is_right(tmp_path, budget):
    folder = release(tmp_path, 6)
    bank = Bank(folder, device_bytes=None if budget is None else budget * ONE + 17)
    want, names = each_loaded(folder), list(bank)
    x = torch.randn(5, D)
    model: OrderedDict = OrderedDict()
    loads = 0
    draw = random.Random(0)
    for _ in range(60):
        name = draw.choice(names)
        loads += name not in model
        model[name] = True
        model.move_to_end(name)
        while budget is not None and len(model) > budget:
            model.popitem(last=False)
        assert bank[name].encode_sparse(x) == want[name].encode_sparse(x)
        assert device(bank)["names"] == list(model)
        assert device(bank)["bytes"] == len(model) * ONE
    assert bank.stats.loads == loads
    assert bank.stats.hits == 60 - loads
    assert device(bank)["peak"] == min(budget or 6, 6) * ONE


def test_what_is_counted_is_what_is_held(tmp_path):
    folder = release(tmp_path, 1)
    for dtype in (torch.float32, torch.bfloat16):
        bank = Bank(folder, dtype=dtype)
        (name,) = bank
        with bank.use(name) as sae:
            sae.encode_sparse(torch.randn(3, D), screen=True)
            sae.prepare()
            assert sae.packed_bytes() > 0
            held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(sae)}
            assert sum(p.nbytes for p in sae.parameters()) == bank[name].nbytes - most_bytes(D, F)
            assert sum(held.values()) == sum(p.nbytes for p in sae.parameters()) + sae.packed_bytes()
            # a screen that packs more than `most_bytes` says would break every budget
            assert sae.packed_bytes() <= most_bytes(D, F)
            assert not any(p.requires_grad for p in sae.parameters())


def test_without_a_screen_nothing_is_packed_and_nothing_counted(tmp_path):
    folder = release(tmp_path, 2)
    bank = Bank(folder, device_bytes=2 * WEIGHTS, screen=False)
    want, x = each_loaded(folder), torch.randn(20, D)
    for name in bank:
        with bank.use(name) as sae:
            for screen in (None, True, False):
                assert sae.encode_sparse(x, screen=screen) == want[name].encode_sparse(x)
            assert sae.packed_bytes() == 0
            assert bank[name].nbytes == WEIGHTS
            with pytest.raises(gsf.BankError, match="screen=False"):
                sae.prepare()
    assert device(bank)["bytes"] == 2 * WEIGHTS


def test_an_sae_in_use_stays_and_says_why_another_has_no_room(tmp_path):
    bank = Bank(release(tmp_path, 3), device_bytes=2 * ONE)
    a, b, c = bank
    with bank.use(a), bank.use(b):
        with pytest.raises(gsf.BankError, match=rf"no room for {c}.*in use: {a}, {b}"):
            bank[c].lease()
        assert device(bank)["names"] == [a, b]
        with pytest.raises(gsf.BankError, match=f"{a}, {b} in use"):
            bank.close()
    with bank.use(c):
        assert device(bank)["names"] == [b, c]
    with pytest.raises(gsf.BankError, match=f"{a} takes {ONE} bytes, the budget is {ONE - 1}"):
        Bank(tmp_path, device_bytes=ONE - 1)[f"gemma-scope-2b-pt-res/{a}"].lease()


def test_memory_that_somebody_still_holds_counts(tmp_path):
    bank = Bank(release(tmp_path, 3), device_bytes=2 * ONE)
    a, b, c = bank
    with bank.use(a) as kept:
        pass
    with bank.use(b):
        with pytest.raises(gsf.BankError, match=f"{ONE} bytes of SAEs that have left"):
            bank[c].lease()  # `a` has left, but its memory is not free
        del kept
        with bank.use(a):
            assert device(bank)["bytes"] == 2 * ONE
    # an autograd graph holds the decoder
    out = bank[c](torch.randn(4, D, requires_grad=True))
    with bank.use(a), pytest.raises(gsf.BankError, match="autograd"):
        bank[b].lease()
    out.sum().backward()
    del out
    with bank.use(a), bank.use(b):
        assert device(bank)["peak"] <= 2 * ONE


def test_two_tiers_of_one_memory(tmp_path):
    folder = release(tmp_path, 5)
    bank = Bank(folder, device_bytes=2 * ONE, host_bytes=2 * WEIGHTS)
    want, names = each_loaded(folder), list(bank)
    x = torch.randn(5, D)

    def tiers():
        held = bank.held()
        return [names.index(n) for n in held["device"]["names"]], [names.index(n) for n in held["host"]["names"]]

    for name in names[:3]:
        bank[name](x)
    assert tiers() == ([1, 2], [0])
    with bank.use(names[0]) as sae:  # comes back, nothing is read, and changes places
        first, packed = sae.W_enc.data_ptr(), sae._prepared
    del sae
    assert tiers() == ([2, 0], [1])
    assert bank.stats.loads == 3
    for name in names[3:]:
        bank[name](x)
    assert tiers() == ([3, 4], [2, 0])
    with bank.use(names[0]) as sae:
        assert sae.W_enc.data_ptr() == first
        assert sae._prepared is not packed  # what was packed did not go to the host tier
    del sae
    bank[names[1]](x)  # had left for good
    assert bank.stats.loads == 6
    draw = random.Random(1)
    for _ in range(40):
        name = draw.choice(names)
        assert torch.equal(bank[name](x), want[name](x))
    held = bank.held()
    assert held["device"]["peak"] == 2 * ONE
    assert held["host"]["peak"] == 2 * WEIGHTS


def test_two_memories(tmp_path):
    """An accelerator's way, with a second copy on the CPU in its memory's place."""
    folder = release(tmp_path, 4)
    bank = Bank(folder, device_bytes=ONE, host_bytes=2 * WEIGHTS)
    bank._store.separate = True
    want, names = each_loaded(folder), list(bank)
    x = torch.randn(5, D)
    draw, host = random.Random(2), OrderedDict()
    for _ in range(50):
        name = draw.choice(names)
        known = name in device(bank)["names"]
        before = bank.stats.loads
        assert torch.equal(bank[name](x), want[name](x))
        assert bank.stats.loads - before == (0 if known or name in host else 1)
        if not known:
            host[name] = True
            host.move_to_end(name)
            if len(host) > 2:
                host.popitem(last=False)
        assert bank.held()["host"]["names"] == list(host)
    with bank.use(name) as sae:
        assert sae.W_enc.t().is_contiguous()
        there = bank._store.on_host.slots[name].module
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(sae.parameters(), there.parameters(), strict=True))
        assert sae.cfg.site == want[name].cfg.site
    assert bank.held()["device"]["peak"] == ONE
    assert bank.held()["host"]["peak"] == 2 * WEIGHTS


# ---- in the background -------------------------------------------------------------------------------------------


def test_an_announcement_fills_the_device_then_the_host(tmp_path):
    bank = Bank({"m": release(tmp_path, 12)}, device_bytes=3 * ONE, host_bytes=2 * WEIGHTS)
    bank.prefetch("m")
    bank.settle()
    held = bank.held()
    assert [bank[n].cfg.site.layer for n in held["device"]["names"]] == [0, 1, 2]  # not 0, 1, 10
    assert [bank[n].cfg.site.layer for n in held["host"]["names"]] == [3, 4]
    assert bank.stats.prefetched == bank.stats.loads == 5
    assert not [t for t in threading.enumerate() if t.name.startswith("gemmascope-fast")]
    bank[held["device"]["names"][0]].lease().release()
    assert bank.stats.hits == 1
    with pytest.raises(KeyError, match="expected one of"):
        bank.prefetch("other")


def test_an_announcement_leaves_alone_what_is_in_use(tmp_path):
    bank = Bank({m: release(tmp_path / m, 3, seed=i) for i, m in enumerate("ab")}, device_bytes=2 * ONE)
    first = next(iter(bank))
    with bank.use(first):
        bank.prefetch("b")
        bank.settle()
        names = device(bank)["names"]
        assert first in names
        assert [n[0] for n in names] == ["a", "b"]


def test_a_damaged_file_is_told_to_whoever_uses_it_and_costs_nothing(tmp_path):
    folder = release(tmp_path, 2)
    path = next((folder / "layer_1").rglob("params.npz"))
    data = bytearray(path.read_bytes())
    data[data.find(arrays(1)["W_dec"].tobytes()) + 5] ^= 1
    path.write_bytes(data)
    bank = Bank(folder, device_bytes=2 * ONE, host_bytes=2 * ONE)
    bank.prefetch()
    bank.settle()
    assert bank.stats.failed == 1
    assert isinstance(bank.stats.error, gsf.CheckpointError)
    name = next(n for n in bank if "layer_1" in n)
    with pytest.raises(gsf.CheckpointError, match="W_dec"):
        bank[name].lease()
    assert device(bank)["bytes"] == ONE
    assert bank.held()["host"]["bytes"] == 0


def test_a_file_that_changed_is_not_another_reading_of_the_same_sae(tmp_path):
    folder = release(tmp_path, 2)
    bank = Bank(folder, device_bytes=ONE)
    a, b = bank
    bank[a].lease().release()
    np.savez(folder / a / "params.npz", **arrays(7))
    bank[b].lease().release()
    with pytest.raises(gsf.CheckpointError, match="changed on disk"):
        bank[a].lease()
    assert device(bank)["bytes"] == 0  # `b` left for it


# ---- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [0, 2])
@pytest.mark.parametrize("separate", [False, True])
def test_threads_that_need_more_than_the_budget(tmp_path, host, separate):
    folder = release(tmp_path, 6)
    bank = Bank(folder, device_bytes=3 * ONE, host_bytes=host * WEIGHTS)
    bank._store.separate = separate
    want, names = each_loaded(folder), list(bank)
    x = torch.randn(3, D)
    expected = {name: sae(x) for name, sae in want.items()}

    def work(seed):
        draw = random.Random(seed)
        for _ in range(40):
            name = draw.choice(names)
            if draw.random() < 0.3:
                bank._store.prefetch(draw.sample(names, 2))
            if draw.random() < 0.1:
                bank.prefetch()
            lease = bank[name].lease()
            out = lease.module(x)
            lease.release()
            assert torch.equal(out, expected[name])

    run_threads(*(lambda seed=seed: work(seed) for seed in range(4)))
    bank.settle()
    held = bank.held()
    assert held["device"]["peak"] <= 3 * ONE
    assert held["host"]["peak"] <= host * WEIGHTS
    assert held["device"]["bytes"] == len(held["device"]["names"]) * ONE  # nothing leaked: no pins, no reservations
    assert not any(slot.pins for slot in bank._store.on_device.slots.values())


def test_two_threads_that_want_each_others_place_do_not_wait_forever(tmp_path):
    bank = Bank(release(tmp_path, 4), device_bytes=2 * ONE)
    names = list(bank)
    barrier = threading.Barrier(2)
    refused = []

    def work(i):
        with bank.use(names[i]):
            barrier.wait(JOIN)
            try:
                with bank.use(names[2 + i]):
                    pass
            except gsf.BankError:
                refused.append(i)

    run_threads(lambda: work(0), lambda: work(1))
    assert len(refused) == 1


def test_a_thread_waits_for_what_another_has_in_use(tmp_path):
    bank = Bank(release(tmp_path, 2), device_bytes=ONE)
    a, b = bank
    held, done = threading.Event(), []

    def first():
        lease = bank[a].lease()
        held.set()
        while not bank._store._waiting:  # until the other one waits for room
            pass
        done.append("a")
        lease.release()

    def second():
        assert held.wait(JOIN)
        with bank.use(b):
            done.append("b")

    run_threads(first, second)
    assert done == ["a", "b"]
    assert bank.stats.waits == 2


# ---- attached ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma2()


@pytest.mark.parametrize("mode", ["observe", "splice", "splice+error"])
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_attached_it_equals_the_saes_themselves(gemma, tmp_path, mode, budget):
    folder = release(tmp_path, 4)
    saes = list(each_loaded(folder).values())
    bank = Bank(folder, device_bytes=budget * ONE)
    edits = {} if mode == "observe" else {2: gsf.Clamp(3, 5.0), 0: gsf.Add(1, 2.0)}
    ids = tiny.ids()
    with torch.no_grad():
        with gsf.attach(gemma, saes, mode=mode, edits=edits) as want:
            logits = gemma(ids).logits
            text = gemma.generate(ids, max_new_tokens=4, do_sample=False)
        with gsf.attach(gemma, bank, mode=mode, edits=edits) as got:
            assert torch.equal(gemma(ids).logits, logits)
            assert torch.equal(gemma.generate(ids, max_new_tokens=4, do_sample=False), text)
    bank.settle()
    for layer in range(4):
        assert got.latents[layer] == want.latents[layer]
        assert got.latents[tiny.resid(layer)].nnz > 0
    assert device(bank)["peak"] <= budget * ONE
    assert not any(slot.pins for slot in bank._store.on_device.slots.values())
    if budget == 4:
        assert bank.stats.loads == 4


def test_the_next_layers_sae_is_brought_while_this_one_is_in_use(gemma, tmp_path):
    bank = Bank(release(tmp_path, 4), device_bytes=2 * ONE)
    after = {}

    class Watch:
        """In the hooks' own time: what is brought after each layer's SAE was used."""

        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x, tokens):
            bank.settle()
            after[self.layer] = [bank[n].cfg.site.layer for n in device(bank)["names"]]

    saes = {i: sae for i, sae in enumerate(bank.values())}
    probes = {f"model.layers.{i}.mlp.output": gsf.attach.__globals__["Activations"](Watch(i)) for i in range(4)}
    with torch.no_grad(), gsf.attach(gemma, {**saes, **probes}):
        gemma(tiny.ids())
    # at the MLP of layer i its SAE is there before the model asks, and the one before has not left yet
    assert after == {0: [0], 1: [0, 1], 2: [1, 2], 3: [2, 3]}
    bank.settle()
    assert [bank[n].cfg.site.layer for n in device(bank)["names"]] == [3, 0]  # the next token begins at layer 0
    assert bank.stats.hits == 4


def test_gradients_and_attribution(gemma, tmp_path):
    folder = release(tmp_path, 4)
    saes = list(each_loaded(folder).values())
    bank = Bank(folder, device_bytes=4 * ONE)
    ids = tiny.ids()
    found = []
    with torch.inference_mode(), gsf.attach(gemma, bank):
        gemma(ids)  # loaded here, the weights must still be fit for a graph
    for source in (saes, bank):
        with gsf.attach(gemma, source, mode="splice+error") as run:
            found.append(run.attribution(gemma(ids).logits[0, -1, 5]))
    for key in found[0]:
        assert found[0][key] == found[1][key]
    small = Bank(folder, device_bytes=2 * ONE)
    with gsf.attach(gemma, small, mode="splice"), pytest.raises(gsf.BankError, match="autograd"):
        gemma(ids)  # the graph needs all four: an error, no excess
    assert device(small)["peak"] <= 2 * ONE
    with torch.no_grad(), gsf.attach(gemma, small, mode="splice"):
        gemma(ids)


def write_transcoder(folder, layer, seed):
    folder.mkdir(parents=True)
    w = arrays(seed)
    stored = {"w_enc": w["W_enc"], "w_dec": w["W_dec"]} | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}
    skip = np.random.default_rng(seed).standard_normal((D, D)).astype("f4") / 10
    save_file(stored | {"affine_skip_connection": skip}, folder / "params.safetensors")
    config = {"type": "transcoder", "affine_connection": True, "architecture": "jump_relu"}
    for end, norm in (("in", "pre"), ("out", "post")):
        config[f"hf_hook_point_{end}"] = f"model.layers.{layer}.{norm}_feedforward_layernorm.output"
    (folder / "config.json").write_text(json.dumps(config))


def test_a_forward_that_fails_leaves_nothing_in_use(gemma, tmp_path):
    for layer in range(3):
        write_transcoder(tmp_path / "transcoder" / f"layer_{layer}_width_16k_l0_small_affine", layer, layer)
    bank = Bank(tmp_path, device_bytes=2 * (ONE + 4 * D * D))

    def fail(*_):
        raise ZeroDivisionError

    with torch.no_grad(), gsf.attach(gemma, bank, mode="splice"):
        # between the site that the second transcoder reads and the one that it writes
        handle = gemma.model.layers[1].mlp.register_forward_hook(fail)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                gemma(tiny.ids())
            bank.settle()
            assert not any(slot.pins for slot in bank._store.on_device.slots.values())
        handle.remove()
        gemma(tiny.ids())


def test_transcoders_and_several_widths_at_one_site(gemma, tmp_path):
    for layer in range(3):
        write_transcoder(tmp_path / "t" / "transcoder" / f"layer_{layer}_width_16k_l0_small_affine", layer, layer)
    bank = Bank(tmp_path / "t", device_bytes=2 * (ONE + 4 * D * D))
    saes = [from_pretrained(tmp_path / "t", name) for name in bank]
    ids = tiny.ids()
    with torch.no_grad():
        for mode in ("splice", "splice+error"):
            logits = []
            for source in (saes, bank):
                with gsf.attach(gemma, source, mode=mode, edits={0: gsf.Add(2, 1.0)}):
                    logits.append(gemma(ids).logits)
            assert torch.equal(*logits)
        # two residual SAEs of one layer: keyed by name
        folder = release(tmp_path / "a", 2)
        (folder / "layer_0" / "width_65k").mkdir()
        release(tmp_path / "b", 1, seed=3)
        other = tmp_path / "b" / folder.name / "layer_0" / "width_16k"
        other.rename(folder / "layer_0" / "width_65k" / "x")
        both = Bank(folder)
        with gsf.attach(gemma, both) as run:
            gemma(ids)
        assert sorted(map(str, run.latents)) == sorted(
            [str(tiny.resid(1)), *(n for n in both if n.startswith("layer_0"))]
        )
        with pytest.raises(gsf.AttachError, match="two splices"):
            gsf.attach(gemma, both, mode="splice")
        with gsf.attach(gemma, both.select("*/width_16k/*"), mode="splice") as run:
            gemma(ids)
        assert set(run.latents) == {tiny.resid(0), tiny.resid(1)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three small models, saved and loaded under their names, and a release for each."""
    transformers = pytest.importorskip("transformers")
    where = tmp_path_factory.mktemp("experts")
    models, sources = {}, {}
    for i, name in enumerate(("poet", "lawyer", "coder")):
        model = tiny.gemma2()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
        model.save_pretrained(where / name)
        models[name] = transformers.AutoModelForCausalLM.from_pretrained(where / name).eval()
        sources[name] = release(where / "saes" / name, 4, seed=10 + i)
    return models, sources


def test_three_experts_switched_at_random_under_one_budget(experts):
    models, sources = experts
    bank = Bank(sources, device_bytes=4 * ONE, host_bytes=3 * WEIGHTS)
    assert bank.models == list(models)
    draw = random.Random(3)
    for _ in range(12):
        name = draw.choice(list(models))
        bank.prefetch(name)  # what a router would do
        ids = tiny.ids(seed=draw.randrange(100))
        saes = [from_pretrained(sources[name], n.split(":")[1]) for n in bank.of(name)]
        with torch.no_grad():
            with gsf.attach(models[name], saes, mode="splice") as want:
                logits = models[name](ids).logits
            with gsf.attach(models[name], bank, mode="splice") as run:
                assert torch.equal(models[name](ids).logits, logits)
        for layer in range(4):
            assert run.latents[layer] == want.latents[layer]
    bank.settle()
    held = bank.held()
    assert held["device"]["peak"] == 4 * ONE
    assert held["host"]["peak"] <= 3 * WEIGHTS
    assert bank.stats.prefetched > 0


def test_experts_in_threads(experts):
    models, sources = experts
    bank = Bank(sources, device_bytes=4 * ONE)
    ids = tiny.ids()
    want = {}
    with torch.no_grad():
        for name, model in models.items():
            with gsf.attach(model, Bank(sources[name]), mode="splice"):
                want[name] = model(ids).logits

    def work(name):
        with torch.no_grad():
            for _ in range(4):
                bank.prefetch(name)
                with gsf.attach(models[name], bank, mode="splice"):
                    assert torch.equal(models[name](ids).logits, want[name])

    run_threads(*(lambda name=name: work(name) for name in models))
    assert device(bank)["peak"] <= 4 * ONE


def test_a_model_that_the_bank_does_not_know(experts, gemma):
    models, sources = experts
    bank = Bank({n: sources[n] for n in ("poet", "lawyer")})
    with pytest.raises(gsf.AttachError, match=r"'poet', 'lawyer'.*'coder'.*bank\.of"):
        gsf.attach(models["coder"], bank)
    with torch.no_grad(), gsf.attach(gemma, bank.of("poet")) as run:  # told, whatever it calls itself
        gemma(tiny.ids())
    assert len(run.latents) == 4


@pytest.mark.slow
def test_26_residual_saes_in_a_budget_of_four(tmp_path):
    model = tiny.gemma2(num_hidden_layers=26)
    folder = release(tmp_path, 26)
    bank = Bank(folder, device_bytes=4 * ONE)
    saes = list(each_loaded(folder).values())
    prompt = tiny.ids(1)
    with torch.no_grad():
        with gsf.attach(model, saes, mode="splice+error", edits={13: gsf.Add(5, 3.0)}) as want:
            expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
        with gsf.attach(model, bank, mode="splice+error", edits={13: gsf.Add(5, 3.0)}) as run:
            assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    bank.settle()
    for layer in range(26):
        assert run.latents[layer] == want.latents[layer]
    assert device(bank)["peak"] == 4 * ONE
    assert len(device(bank)["names"]) == 4


# ---- what is in it -----------------------------------------------------------------------------------------------


def test_names_patterns_and_errors(tmp_path, monkeypatch):
    folder = release(tmp_path, 3)
    bank = Bank(folder)
    assert len(bank) == 3
    assert bank.models == ["google/gemma-2-2b"]
    part = bank.select("layer_[12]/*")
    assert [n[:7] for n in part] == ["layer_1", "layer_2"]
    part[next(iter(part))].lease().release()
    assert device(bank) == device(part)
    for wrong in (lambda: bank.select("x*"), lambda: bank["x"], lambda: bank.of("x")):
        with pytest.raises(KeyError, match=r"layer_0|gemma-2-2b"):
            wrong()
    for options in (
        {"device_bytes": -1},
        {"host_bytes": 1.5},
        {"dtype": "int8"},
        {"ahead": -1},
        {"device_bytes": True},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            Bank(folder, **options)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place in (tmp_path / "empty", "nobody/nothing"):
        with pytest.raises(gsf.CheckpointError, match=r"no checkpoint|in reach"):
            Bank(place)
    with bank:
        pass
    with pytest.raises(gsf.BankError, match="closed"):
        bank[next(iter(bank))].lease()
    assert device(bank)["bytes"] == 0


def test_a_repository_is_fetched_one_sae_at_a_time(tmp_path, monkeypatch):
    folder = release(tmp_path, 3)
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*.npz")]
    fetched = []

    def snapshot_download(repo, **options):
        fetched.append([p for p in files if p in options["allow_patterns"]])
        return str(folder)

    monkeypatch.setattr("gemmascope_fast.bank.members.repository_files", lambda repo, revision=None: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    bank = Bank("google/gemma-scope-2b-pt-res")
    assert len(bank) == 3
    assert not fetched
    name = list(bank)[1]
    x = torch.randn(2, D)
    assert torch.equal(bank[name](x), from_pretrained(folder, name)(x))
    assert fetched == [[f"{name}/params.npz"]]
    named = Bank("gemma-scope-2b-pt-res-canonical")
    assert len(named) == 58
    assert len(fetched) == 1


def test_coders_of_several_sites_are_counted_too(tmp_path):
    folder = tmp_path / "gemma-scope-2-270m-pt" / "clt" / "width_262k_l0_medium"
    folder.mkdir(parents=True)
    for i in range(3):
        w = arrays(i)
        stored = {"w_enc": w["W_enc"], "w_dec": np.stack([w["W_dec"]] * 3, 1)}
        save_file(stored | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}, folder / f"params_layer_{i}.safetensors")
    bank = Bank(tmp_path)
    (name,) = bank
    with bank.use(name) as clt:
        assert sum(p.nbytes for p in clt.parameters()) + 3 * most_bytes(D, F) == bank[name].nbytes
        assert clt(torch.randn(3, 5, D)).shape == (3, 5, D)
    with pytest.raises(gsf.CheckpointError, match="one site"):
        _ = bank[name].cfg
