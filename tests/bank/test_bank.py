"""A bank always gives the right results and never exceeds its budgets; it keeps what was used most recently."""

import random
from collections import OrderedDict

import pytest
import torch
from bank_releases import ONE, WEIGHTS, D, F, device, each_loaded, release

import gemmascope_fast as gsf
from gemmascope_fast.bank import Bank
from gemmascope_fast.bank.tiers import tensors_of
from gemmascope_fast.sae.screen import most_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_an_encode_takes_the_options_of_the_saes_own(tmp_path):
    folder = release(tmp_path, 1)
    (banked,), (own,) = Bank(folder).values(), each_loaded(folder).values()
    x = torch.randn(20, D)
    near = banked.encode_sparse(x, bandwidth=0.5)
    assert near == own.encode_sparse(x, bandwidth=0.5)
    assert near.nnz > own.encode_sparse(x).nnz
    assert banked.encode_sparse(x, precision="tensor") == own.encode_sparse(x, precision="tensor")
    with pytest.raises(ValueError, match="precision"):
        banked.encode_sparse(x, precision="half")


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
        with pytest.raises(gsf.BankError, match=r"[1-9]\d* bytes of SAEs that left"):
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
        first, packed = sae.W_enc.data_ptr(), sae.screen_cache
    del sae
    assert tiers() == ([2, 0], [1])
    assert bank.stats.loads == 3
    for name in names[3:]:
        bank[name](x)
    assert tiers() == ([3, 4], [2, 0])
    with bank.use(names[0]) as sae:
        assert sae.W_enc.data_ptr() == first
        assert sae.screen_cache is not packed  # what was packed did not go to the host tier
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
