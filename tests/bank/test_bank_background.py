"""Loading in the background, and threads that share a bank: nothing hangs, nothing is lost."""

import gc
import random
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from bank_releases import JOIN, ONE, WEIGHTS, D, arrays, device, each_loaded, release, run_threads

import gemmascope_fast as gsf
from gemmascope_fast.bank import Bank

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_announcement_fills_the_device_then_the_host(tmp_path):
    bank = Bank({"m": release(tmp_path, 12)}, device_bytes=3 * ONE, host_bytes=2 * WEIGHTS)
    bank.prefetch("m")
    bank.settle()
    held = bank.held()
    assert [bank[n].cfg.site.layer for n in held["device"]["names"]] == [0, 1, 2]  # not 0, 1, 10
    assert [bank[n].cfg.site.layer for n in held["host"]["names"]] == [3, 4]
    assert bank.stats.prefetched == bank.stats.loads == 5
    for loader in [t for t in threading.enumerate() if t.name.startswith("gemmascope-fast")]:
        loader.join(JOIN)  # it says that it is done before it has ended
        assert not loader.is_alive()
    bank[held["device"]["names"][0]].lease().release()
    assert bank.stats.hits == 1
    with pytest.raises(KeyError, match="expected one of"):
        bank.prefetch("other")


def test_a_bank_that_is_dropped_leaves_memory_without_the_garbage_collector(tmp_path):
    bank = Bank(release(tmp_path, 2))
    bank.prefetch()
    bank.settle()
    for loader in [t for t in threading.enumerate() if t.name.startswith("gemmascope-fast")]:
        loader.join(JOIN)
    store = weakref.ref(bank._store)
    gc.disable()
    try:
        del bank
        assert store() is None
    finally:
        gc.enable()


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
        end = time.monotonic() + JOIN
        while not bank._store._waiting:  # until the other one waits for room
            assert time.monotonic() < end
            time.sleep(0.001)
        done.append("a")
        lease.release()

    def second():
        assert held.wait(JOIN)
        with bank.use(b):
            done.append("b")

    run_threads(first, second)
    assert done == ["a", "b"]
    assert bank.stats.waits == 2
