"""A bank: many SAEs in one object, which keeps only as many in memory as fit into a budget.

There are three tiers; device and host have a budget in bytes.  *Device*: SAEs ready to run, with their screens.
*Host*: only the weights, in RAM.  *Disk*: the checkpoints (of a repository: in the Hugging Face cache).  Using an SAE
moves it to the device. The least recently used SAE that is not in use moves to the host tier, or is dropped.

On a CPU, device and host are the same memory, so an SAE is in one of the two tiers, never in both, and moving it
copies nothing. There host_bytes is room for SAEs that keep their weights but lose their screens, and a bank uses at
most device_bytes + host_bytes.  On an accelerator, device_bytes is its memory and host_bytes is RAM. An SAE that left
the device is copied again from the host tier if it is still there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.bank.members import Member, find, matching
from gemmascope_fast.bank.store import Lease, Stats, Store
from gemmascope_fast.checkpoints.loading import held_dtype
from gemmascope_fast.errors import AttachError
from gemmascope_fast.ops.latents import SparseLatents
from gemmascope_fast.sae.config import SAEConfig

__all__ = ["Bank", "BankedSAE", "Lease"]

Source = str | Path


class BankedSAE:
    """An SAE of a bank. Its description is always available, its weights only while it is used."""

    def __init__(self, store: Store, member: Member) -> None:
        self._store, self._member = store, member

    @property
    def name(self) -> str:
        return self._member.name

    @property
    def kind(self) -> str:
        return self._member.kind

    @property
    def cfg(self) -> SAEConfig:
        return self._member.cfg

    @property
    def device(self) -> torch.device:
        return self._store.device

    @property
    def dtype(self) -> torch.dtype:
        return self._store.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it counts against device_bytes."""
        return self._store.device_bytes_of(self.name)

    def lease(self) -> Lease:
        """The SAE on the device until the lease is released: `with` gives the module; or see `Lease.release`.

        Raises BankError if the budget has no room (it first waits for SAEs that other threads use), CheckpointError if
        the checkpoint cannot be read.  The module is shared and read-only. Do not keep it after the release: its memory
        counts as long as you hold it.
        """
        return self._store.acquire(self.name)

    def check_fits(self) -> None:
        """Raise BankError if the budget is smaller than this SAE."""
        self._store.check_fits(self.name)

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        """Like `encode_sparse` of the SAE."""
        with self.lease() as sae:
            return sae.encode_sparse(x, screen, bandwidth, precision)  # type: ignore[operator]

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Like `decode` of the SAE."""
        with self.lease() as sae:
            return sae.decode(latents)  # type: ignore[operator]

    def __call__(self, x: Tensor) -> Tensor:
        """Like `forward` of the SAE."""
        with self.lease() as sae:
            return sae(x)

    def prefetch_next(self, names: list[str]) -> None:
        """Load other SAEs of its bank in the background."""
        self._store.prefetch(names)

    @property
    def ahead(self) -> int:
        return self._store.ahead

    def __repr__(self) -> str:
        return f"BankedSAE({self.name!r})"


class Bank(Mapping[str, BankedSAE]):
    """SAEs by name, from a file, a folder, a Hugging Face repository, a SAELens release, or for several models.

    source: one of these, or {model_name: source}. Names are then "model_name:sae_id", otherwise the sae_id.
    device_bytes, host_bytes: budgets (None: no limit), see the module docstring. They cover weights, screens, SAEs
    being loaded, and SAEs that left the bank but are still referenced elsewhere.  Using an SAE larger than device_bytes
    raises BankError.
    ahead: how many of the SAEs that an attached model needs next are loaded while it uses the current one.
    screen: build the screen of an SAE when it comes to the device; its bytes count there. Useful if an SAE is used
    often before it leaves.  False: never build one.  The results are the same, byte for byte.

    The list of SAEs is read now (of a repository: only its listing), headers and weights at first use.  Weights are
    read-only, because an SAE may be dropped and read again.  Safe to use from several threads.

    Raises CheckpointError if there is no checkpoint, ValueError for invalid budgets or dtypes.
    """

    def __init__(
        self,
        source: Source | Mapping[str, Source],
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        device_bytes: int | None = None,
        host_bytes: int | None = 0,
        ahead: int = 1,
        screen: bool = True,
        revision: str | None = None,
    ) -> None:
        if ahead < 0:
            raise ValueError(f"ahead: expected 0 or more, got {ahead}")
        self._store = Store(torch.device(device), held_dtype(dtype), device_bytes, host_bytes, ahead, screen)
        several = isinstance(source, Mapping)
        for model, place in source.items() if isinstance(source, Mapping) else [(None, source)]:
            for at, sae_id, short in find(place, revision):
                name = f"{model}:{short}" if several else short
                self._store.members[name] = Member(name, model, at, sae_id, revision)
        self._members = dict(self._store.members)
        self._any_model = not several

    # ---- contents -----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> BankedSAE:
        if name not in self._members:
            raise KeyError(f"{name!r}: expected one of the {len(self)} SAEs of this bank, such as {list(self)[:3]}")
        return BankedSAE(self._store, self._members[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def select(self, *patterns: str) -> Bank:
        """The SAEs whose sae_id matches a pattern such as "layer_*/width_16k/*", as a bank that shares this one's
        budget.  KeyError if there are none."""
        found = matching(self._members.values(), patterns)
        if not found:
            raise KeyError(
                f"{', '.join(patterns)}: none of the {len(self)} SAEs of this bank, such as {list(self)[:3]}"
            )
        return self._part(found, self._any_model)

    def of(self, model_name: str) -> Bank:
        """The SAEs of one model, as a bank that shares this one's budget. `attach` uses all of them, whatever the model
        is called.  KeyError for an unknown name."""
        found = [m for m in self._members.values() if m.model_name == model_name]
        if not found:
            raise KeyError(f"{model_name!r}: expected one of {self.models}")
        return self._part(found, True)

    def _part(self, members: list[Member], any_model: bool) -> Bank:
        part = Bank.__new__(Bank)
        part._store, part._any_model = self._store, any_model
        part._members = {m.name: m for m in members}
        return part

    @property
    def models(self) -> list[str | None]:
        """Names of the models, as given or as in the checkpoints (None if one does not say)."""
        return list(dict.fromkeys(m.model_name for m in self._members.values()))

    def for_model(self, model: nn.Module) -> Bank:
        """The SAEs of a model by its name (`name_or_path`; the last part of a path is enough).

        If a bank has one source whose checkpoints name at most one model, this returns all of them; `attach` checks
        sizes and sites.  AttachError if the bank has SAEs of several models and none is this one.
        """
        if self._any_model and len(self.models) <= 1:
            return self
        config = getattr(model, "config", None)
        own = {_short(n) for n in (getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None)) if n}
        found = [m for m in self._members.values() if m.model_name and _short(m.model_name) in own]
        if not found:
            raise AttachError(
                f"saes: this bank has SAEs of {self.models}, and the name of the model is {sorted(own) or 'unknown'};"
                " use bank.of(name)"
            )
        return self._part(found, True)

    # ---- moving -------------------------------------------------------------------------------------

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The SAE `name`, on the device within the block (see `BankedSAE.lease`)."""
        lease = self[name].lease()
        try:
            yield lease.module
        finally:
            lease.release()

    def prefetch(self, model_name: str | None = None) -> None:
        """Start loading a model's SAEs (None: all of this bank) because they are used soon, in the order of the layers
        in their names.

        Returns at once. They are loaded in the background: to the device as many as fit, the later ones to the host
        tier.  SAEs in use are not evicted for them.  A later call replaces this one.
        """
        part = self if model_name is None else self.of(model_name)
        self._store.announce(sorted(part, key=_in_order))

    def settle(self) -> None:
        """Wait until background loading has finished."""
        self._store.settle()

    def close(self) -> None:
        """Drop all SAEs; BankError if one is in use.  Closing a part of a bank closes the whole bank."""
        self._store.close()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- statistics ---------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counts of uses, waits and loads; always the same object."""
        return self._store.stats

    def held(self) -> dict[str, dict[str, Any]]:
        """For each tier: budget, bytes that count now, maximum so far, number of SAEs that left, and the SAEs in it,
        the next to leave first."""
        return self._store.held()

    def __repr__(self) -> str:
        return f"Bank({len(self)} SAEs of {self.models}, {self._store})"


def _short(name: str) -> str:
    return PurePath(name).name.lower()


def _in_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Sort key: by layer, then by name, with numbers in names compared as numbers."""
    layer = re.search(r"(?:layers?|blocks)[._](\d+)", name)
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
    return (int(layer[1]) if layer else -1), parts
