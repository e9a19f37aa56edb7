"""The three tiers of a bank behind one lock: decides who may load, who must leave and who has to wait."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gemmascope_fast.bank.background import Background, Wanted
from gemmascope_fast.bank.members import Member
from gemmascope_fast.bank.screens import drop_screens
from gemmascope_fast.bank.tiers import Slot, Tier
from gemmascope_fast.errors import BankError

POLL = 0.05  # seconds: there is no event when other code frees memory


@dataclass
class Stats:
    """Counts since the bank was made.

    hits: uses of an SAE that was already on the device.  waits: uses that had to wait for it; `waited` is in seconds.
    loads: reads from disk, `bytes_read` in total; prefetched: those by the background thread.  failed: background
    loads with an error, and `error` is the last one (a use gets the same error, and raises it).
    """

    hits: int = 0
    waits: int = 0
    waited: float = 0.0
    loads: int = 0
    bytes_read: int = 0
    prefetched: int = 0
    failed: int = 0
    error: Exception | None = None


class Lease:
    """One use of an SAE: `module` stays on the device until `release`."""

    def __init__(self, store: Store, slot: Slot) -> None:
        self._store, self._slot, self._thread = store, slot, threading.get_ident()
        self.module: Any = slot.module

    def release(self) -> None:
        """End the use. Calling it more than once is harmless."""
        if self.module is not None:
            self.module = None
            self._store.release(self._slot, self._thread)

    def __enter__(self) -> nn.Module:
        assert self.module is not None
        return self.module

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Store:
    """SAEs by name in two memories with budgets, and on disk.

    If the device is the CPU, there is one memory. An SAE is in the device tier with its screen, or in the host tier as
    bare weights, and moving between the two copies nothing.  On an accelerator, the host tier keeps its copy of what is
    on the device until it needs the room.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        device_bytes: int | None,
        host_bytes: int | None,
        ahead: int,
        screen: bool,
    ) -> None:
        self.device, self.dtype, self.ahead, self.screen = device, dtype, ahead, screen
        self.on_device, self.on_host = Tier("device", device_bytes), Tier("host", host_bytes)
        self.members: dict[str, Member] = {}
        self.stats = Stats()
        self.separate = device.type != "cpu"
        self._changed = threading.Condition(threading.Lock())
        self._waiting: set[int] = set()
        self._background = Background(self._changed)
        self._closed = False

    def __repr__(self) -> str:
        tiers = (f"{tier.name} {tier.used()} of {tier.budget} bytes" for tier in (self.on_device, self.on_host))
        return ", ".join(tiers)

    # ---- sizes --------------------------------------------------------------------------------------

    def device_bytes_of(self, name: str) -> int:
        """What an SAE counts on the device: its weights and the most that its screen may need."""
        member = self.members[name]
        return member.weight_bytes(self.dtype) + (member.packed_bytes() if self.screen else 0)

    def host_bytes_of(self, name: str) -> int:
        return self.members[name].weight_bytes(self.dtype)

    def check_fits(self, name: str) -> None:
        """Raise BankError for an SAE that would not fit even if all others left."""
        need, budget = self.device_bytes_of(name), self.on_device.budget
        if budget is not None and need > budget:
            raise BankError(f"device_bytes: {name} takes {need} bytes, the budget is {budget}")

    # ---- use ----------------------------------------------------------------------------------------

    def acquire(self, name: str) -> Lease:
        """Pin the SAE on the device: load it, evict others, or wait for those that other threads use.

        Raises BankError if it cannot get room, CheckpointError if it cannot be read.
        """
        self.check_fits(name)
        me = threading.get_ident()
        begin: float | None = None
        with self._changed:
            while True:
                self._check_open()
                slot = self.on_device.slots.get(name)
                if slot is not None:
                    break
                begin = time.perf_counter() if begin is None else begin
                if name in self.on_device.coming or name in self.on_host.coming:
                    self._wait(me)  # it is being loaded
                elif (slot := self._bring(name)) is not None:
                    break
                else:
                    self._wait_for_room(me, name)
            slot.pin(me)
            self.on_device.touch(name)
            if begin is None:
                self.stats.hits += 1
            else:
                self.stats.waits += 1
                self.stats.waited += time.perf_counter() - begin
        return Lease(self, slot)

    def release(self, slot: Slot, thread: int) -> None:
        with self._changed:
            slot.unpin(thread)
            if self.separate and self.device.type == "cuda":
                slot.last_use = torch.cuda.current_stream(self.device).record_event()
            self._changed.notify_all()

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Release the lock within the block, for slow work."""
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    def _check_open(self) -> None:
        if self._closed:
            raise BankError("this bank is closed")

    def _wait(self, me: int, timeout: float | None = None) -> None:
        self._waiting.add(me)
        try:
            self._changed.wait(timeout)
        finally:
            self._waiting.discard(me)

    def _wait_for_room(self, me: int, name: str) -> None:
        """Wait until room may have become free; BankError if that cannot happen."""
        tier = self.on_device
        holders = {thread for slot in tier.slots.values() for thread in slot.pins}
        alive = {thread.ident for thread in threading.enumerate()}
        if tier.coming or (holders & alive) - self._waiting - {me}:
            self._wait(me, POLL)
            return
        before = tier.ghost_bytes()
        ghosts = tier.ghosts_after_collection()
        if ghosts < before:
            return  # room became free: try again
        in_use = [slot.name for slot in tier.slots.values() if slot.pins]
        told = f"; in use: {', '.join(in_use)}" if in_use else ""
        if ghosts:
            told += (
                f"; {ghosts} bytes of SAEs that left the bank are still in memory, held by variables or by an autograd"
                " graph (torch.no_grad() avoids the graph)"
            )
        raise BankError(f"device_bytes: no room for {name}, {self.device_bytes_of(name)} of {tier.budget} bytes{told}")

    # ---- moving; the lock is held --------------------------------------------------------------------

    def _bring(self, name: str, spare: Collection[str] = ()) -> Slot | None:
        """The SAE's slot on the device, filled; None if there is no room.  What is evicted goes to the host tier or is
        dropped.  Room is reserved and the lock is released while bytes move; after an error nothing remains."""
        need = self.device_bytes_of(name)
        here = self.on_host.slots.get(name)
        if here is not None and not self.separate:
            del self.on_host.slots[name]  # it swaps places with what is evicted
        if not self._make_room(self.on_device, need, spare):
            if here is not None and not self.separate:
                self.on_host.slots[name] = here
            return None
        self.on_device.reserve(name, need)
        try:
            module = self._read(name) if here is None else self._of_host(here)
            if self.screen:
                with self._unlocked():
                    self.members[name].build_screen(module)
        except BaseException:
            self.on_device.coming.pop(name, None)
            self._changed.notify_all()
            raise
        return self._arrived(self.on_device, Slot(name, module, need))

    def _make_room(self, tier: Tier, need: int, spare: Collection[str]) -> bool:
        """Evict SAEs until `need` bytes fit. Those still referenced elsewhere do not count as freed."""
        while True:
            out = tier.make_room(need, spare)
            if out is None:
                return False
            if not out:
                return True
            while out:
                slot = out.pop(0)  # no other reference, so that memory is freed immediately
                if tier is self.on_host or self.separate or not self._to_host(slot):
                    tier.left(slot)
                del slot

    def _arrived(self, tier: Tier, slot: Slot) -> Slot:
        tier.arrive(slot)
        self._changed.notify_all()
        return slot

    def _to_host(self, slot: Slot) -> bool:
        """One memory, two tiers: the slot moves to the other tier without its screen."""
        if not self._reserve_on_host(slot.name):
            return False
        if self.screen:
            drop_screens(slot.module)
        self.on_host.arrive(Slot(slot.name, slot.module, self.host_bytes_of(slot.name)))
        return True

    def _read(self, name: str) -> nn.Module:
        """Load from disk; through the host tier, if that is a separate memory and has room."""
        if self.separate and self._reserve_on_host(name):
            return self._of_host(self._bring_to_host(name))
        return self._load(name, self.device)

    def _reserve_on_host(self, name: str, spare: Collection[str] = ()) -> bool:
        need = self.host_bytes_of(name)
        if not self._make_room(self.on_host, need, spare):
            return False
        self.on_host.reserve(name, need)
        return True

    def _bring_to_host(self, name: str) -> Slot:
        try:
            module = self._load(name, torch.device("cpu"))
        except BaseException:
            self.on_host.coming.pop(name, None)
            self._changed.notify_all()
            raise
        return self._arrived(self.on_host, Slot(name, module, self.host_bytes_of(name)))

    def _load(self, name: str, device: torch.device) -> nn.Module:
        with self._unlocked():
            module = self.members[name].load(device, self.dtype)
            if not self.screen:
                drop_screens(module, bare=True)
        self.stats.loads += 1
        self.stats.bytes_read += self.members[name].checkpoint.nbytes
        if self._background.runs_here():
            self.stats.prefetched += 1
        return module

    def _of_host(self, here: Slot) -> nn.Module:
        """The host's module: the same one if there is one memory, else a copy; the original is pinned meanwhile."""
        if not self.separate:
            return here.module
        me = threading.get_ident()
        here.pin(me)
        self.on_host.touch(here.name)
        try:
            with self._unlocked():
                return copied_to(here.module, self.device)
        finally:
            here.unpin(me)

    # ---- in the background ---------------------------------------------------------------------------

    def prefetch(self, names: Iterable[str]) -> None:
        """Load these next, before announced ones. One that has no room unless SAEs in use are evicted is left
        out."""
        self._enqueue(list(names), announced=False)

    def announce(self, names: Iterable[str]) -> None:
        """Announce that these are used soon, in this order: loads to the device while there is room, then to the host.
        A later announcement replaces an earlier one."""
        self._enqueue(list(names), announced=True)

    def _enqueue(self, names: list[str], announced: bool) -> None:
        own = frozenset(names)
        with self._changed:
            self._check_open()
            if announced:
                self._background.forget_announced()
                # so that an announced SAE that is already here is not evicted next
                for name in reversed(names):
                    for tier in (self.on_device, self.on_host):
                        if name in tier.slots:
                            tier.touch(name)
            missing = [Wanted(name, own, announced) for name in names if self._absent(name)]
            self._background.put(missing, self._fetch)

    def _absent(self, name: str) -> bool:
        return name not in self.on_device.slots and name not in self.on_device.coming

    def _fetch(self, wanted: Wanted) -> None:
        try:
            self._open(wanted.name)
            self._bring_ahead(wanted)
        except Exception as error:  # noqa: BLE001  (the thread that uses the SAE gets the error again)
            self.stats.failed += 1
            self.stats.error = error.with_traceback(None)  # the traceback's frames would keep half an SAE in memory

    def _open(self, name: str) -> None:
        """Read its header without the lock, because that may download the file."""
        with self._unlocked():
            _ = self.members[name].checkpoint

    def _bring_ahead(self, wanted: Wanted) -> None:
        name = wanted.name
        if not self._absent(name) or name in self.on_host.coming:
            return
        budget = self.on_device.budget
        possible = budget is None or self.device_bytes_of(name) <= budget
        if possible and self._bring(name, wanted.spare) is not None:
            return
        if wanted.announced and name not in self.on_host.slots and self._reserve_on_host(name, wanted.spare):
            self._bring_to_host(name)

    def held(self) -> dict[str, dict[str, object]]:
        with self._changed:
            return {
                tier.name: {
                    "budget": tier.budget,
                    "bytes": tier.used(),
                    "peak": tier.peak,
                    "evictions": tier.evictions,
                    "names": list(tier.slots),
                }
                for tier in (self.on_device, self.on_host)
            }

    def settle(self) -> None:
        """Wait until background loading has finished."""
        with self._changed:
            self._background.settle()

    def close(self) -> None:
        """Drop all SAEs; BankError if one is in use."""
        with self._changed:
            in_use = [slot.name for slot in self.on_device.slots.values() if slot.pins]
            if in_use:
                raise BankError(f"close: {', '.join(in_use)} in use")
            self._closed = True
            self._background.stop()
        self.settle()
        with self._changed:
            for tier in (self.on_device, self.on_host):
                while tier.slots:
                    tier.left(tier.slots.popitem()[1])
            self._changed.notify_all()


def copied_to(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy with its parameters on another device; nothing is stored twice on this one."""
    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cuda":
            return copy.deepcopy(
                module, {id(p): _parameter(p.detach().to(device, copy=True)) for p in module.parameters()}
            )
        # a separate stream, so that the copy need not wait for kernels that the model has queued
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            memo = {id(p): _parameter(p.detach().to(device, copy=True)) for p in module.parameters()}
        stream.synchronize()
        return copy.deepcopy(module, memo)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
