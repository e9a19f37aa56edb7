"""One memory with a budget: what is in it, what is being loaded, and what left but is still referenced elsewhere."""

from __future__ import annotations

import gc
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gemmascope_fast.bank.screens import screen_tensors


class Slot:
    """An SAE in a tier.  pins: number of uses by each thread; it may leave only when there are none."""

    def __init__(self, name: str, module: nn.Module, nbytes: int) -> None:
        self.name, self.module, self.nbytes = name, module, nbytes
        self.pins: Counter[int] = Counter()
        self.last_use: Any = None  # on an accelerator: the event after which its memory may be reused

    def pin(self, thread: int) -> None:
        self.pins[thread] += 1

    def unpin(self, thread: int) -> None:
        self.pins[thread] -= 1
        self.pins += Counter()  # removes zeros


class Tier:
    """SAEs in one memory, least recently used first.  It has no lock: the store holds its lock around every call.

    Three things count against the budget: the slots; what is being loaded (`coming`); and ghosts, which are weights
    that left but whose memory is still referenced (by a variable, an autograd graph), until it is freed.
    """

    def __init__(self, name: str, budget: int | None) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"{name}_bytes: expected a number of bytes or None for no limit, got {budget!r}")
        self.name, self.budget = name, budget
        self.slots: OrderedDict[str, Slot] = OrderedDict()
        self.coming: dict[str, int] = {}
        self._ghosts: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0
        self.evictions = 0

    def used(self) -> int:
        """Bytes that count against the budget now."""
        return sum(slot.nbytes for slot in self.slots.values()) + sum(self.coming.values()) + self.ghost_bytes()

    def ghost_bytes(self) -> int:
        self._ghosts = [(ref, size) for ref, size in self._ghosts if not ref.expired()]
        return sum(size for _, size in self._ghosts)

    def make_room(self, need: int, spare: Collection[str] = ()) -> list[Slot] | None:
        """Remove least recently used SAEs until `need` bytes fit; returns them, or None if that is impossible.

        Pinned SAEs and those in `spare` stay; if those take too much room, nothing is removed.  The caller moves the
        slots on or passes them to `left`.
        """
        if self.budget is None:
            return []
        over = self.used() + need - self.budget
        out: list[Slot] = []
        for slot in self.slots.values():
            if over <= 0:
                break
            if not slot.pins and slot.name not in spare:
                out.append(slot)
                over -= slot.nbytes
        if over > 0:
            return None
        for slot in out:
            del self.slots[slot.name]
        self.evictions += len(out)
        return out

    def left(self, slot: Slot) -> None:
        """The slot's module leaves; its bytes count until nothing refers to them."""
        if slot.last_use is not None:
            slot.last_use.synchronize()
        seen: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors_of(slot.module):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
            del storage, tensor
        self._ghosts += seen.values()
        del slot.module

    def reserve(self, name: str, need: int) -> None:
        self.coming[name] = need
        self.peak = max(self.peak, self.used())

    def arrive(self, slot: Slot) -> None:
        """Put in a slot, in place of the room reserved for it."""
        self.coming.pop(slot.name, None)
        self.slots[slot.name] = slot
        self.slots.move_to_end(slot.name)
        self.peak = max(self.peak, self.used())

    def touch(self, name: str) -> None:
        self.slots.move_to_end(name)

    def ghosts_after_collection(self) -> int:
        """Ghost bytes that are really referenced, not just waiting for the garbage collector."""
        if self.ghost_bytes():
            gc.collect()
        return self.ghost_bytes()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and screen tensors."""
    return [p.detach() for p in module.parameters()] + screen_tensors(module)
