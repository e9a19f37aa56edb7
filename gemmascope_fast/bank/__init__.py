"""A bank: many SAEs behind one object, of which a budget's worth is in memory.

Three tiers, each with a budget in bytes.  *Device*: ready to run, with what they pack.  *Host*: bare weights in RAM.
*Disk*: the checkpoints themselves (of a repository: in the Hugging Face cache).  A use brings an SAE to the device;
the least recently used one that is not in use leaves, to the host tier or, without room there, for good.

On a CPU, device and host are the same memory, so an SAE is in one of the two tiers, never in both, and moving it
copies nothing: host_bytes then is room for SAEs that keep their weights and lose what they packed, and the most
that a bank holds is device_bytes + host_bytes.  On an accelerator device_bytes is its memory, host_bytes RAM, and
an SAE that leaves the device is copied again from the host tier while it is there.
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
    """An SAE of a bank: what it is is here, its weights are there while it is used."""

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
        """What it counts against device_bytes."""
        return self._store.device_bytes_of(self.name)

    def lease(self) -> Lease:
        """The SAE on the device until the lease is released: `with` gives the module, or see `Lease.release`.

        BankError where the budget has no room (waits first for what other threads use), CheckpointError where the
        checkpoint cannot be read.  The module is shared and read-only; do not keep it after the release: its memory
        counts until you let go.
        """
        return self._store.acquire(self.name)

    def check_fits(self) -> None:
        """BankError where the budget is smaller than this SAE."""
        self._store.check_fits(self.name)

    def encode_sparse(
        self, x: Tensor, screen: bool | None = None, bandwidth: float | None = None, precision: str = "exact"
    ) -> SparseLatents:
        """As the SAE's own."""
        with self.lease() as sae:
            return sae.encode_sparse(x, screen, bandwidth, precision)  # type: ignore[operator]

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """As the SAE's own."""
        with self.lease() as sae:
            return sae.decode(latents)  # type: ignore[operator]

    def __call__(self, x: Tensor) -> Tensor:
        """As the SAE's own."""
        with self.lease() as sae:
            return sae(x)

    def prefetch_next(self, names: list[str]) -> None:
        """Bring others of its bank in the background."""
        self._store.prefetch(names)

    @property
    def ahead(self) -> int:
        return self._store.ahead

    def __repr__(self) -> str:
        return f"BankedSAE({self.name!r})"


class Bank(Mapping[str, BankedSAE]):
    """SAEs by name: those of a file, a folder, a Hugging Face repository, a SAELens release, or of several models.

    source: one of these, or {model_name: source}; a name is then "model_name:sae_id", otherwise the sae_id.
    device_bytes, host_bytes: budgets (None: no limit), see the module; on what is held: weights, what they pack,
    what is being loaded, and what has left but is still referenced from outside.  An SAE larger than device_bytes
    is a BankError where it is used.
    ahead: how many of the SAEs that an attached model reaches next are brought while it works on this one.
    screen: SAEs have their screen built when they come to the device, and its bytes count there; worth it where an SAE
    is used often before it leaves.  False: none is ever built.  The answers are the same bytes.

    The listing is read now (of a repository: its listing alone), headers and weights at first use.  Weights are
    read-only: an SAE may leave and be read again.  Safe to use from several threads.

    Raises CheckpointError if there is no checkpoint, ValueError for budgets or dtypes that mean nothing.
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

    # ---- what is in it ------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> BankedSAE:
        if name not in self._members:
            raise KeyError(f"{name!r}: expected one of the {len(self)} SAEs of this bank, such as {list(self)[:3]}")
        return BankedSAE(self._store, self._members[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def select(self, *patterns: str) -> Bank:
        """The SAEs whose sae_id fits a pattern such as "layer_*/width_16k/*", as a bank that shares this one's
        budget.  KeyError where none does."""
        found = matching(self._members.values(), patterns)
        if not found:
            raise KeyError(
                f"{', '.join(patterns)}: none of the {len(self)} SAEs of this bank, such as {list(self)[:3]}"
            )
        return self._part(found, self._any_model)

    def of(self, model_name: str) -> Bank:
        """The SAEs of one model, as a bank that shares this one's budget; `attach` takes all of them, whatever the
        model given there is called.  KeyError for a name that the bank does not know."""
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
        """The models' names: as told, or as the checkpoints say (None where one does not)."""
        return list(dict.fromkeys(m.model_name for m in self._members.values()))

    def for_model(self, model: nn.Module) -> Bank:
        """The SAEs of a model by its name (`name_or_path`; the last part of a path is enough).

        A bank of one source whose checkpoints name at most one model gives all of them: sizes and sites are checked
        by `attach`.  AttachError where the bank holds several models' and none is this one's.
        """
        if self._any_model and len(self.models) <= 1:
            return self
        config = getattr(model, "config", None)
        own = {_short(n) for n in (getattr(model, "name_or_path", None), getattr(config, "_name_or_path", None)) if n}
        found = [m for m in self._members.values() if m.model_name and _short(m.model_name) in own]
        if not found:
            raise AttachError(
                f"saes: this bank holds SAEs of {self.models}, and the model calls itself {sorted(own) or 'nothing'};"
                " give bank.of(name)"
            )
        return self._part(found, True)

    # ---- moving -------------------------------------------------------------------------------------

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The SAE `name` on the device while the block lasts (see `BankedSAE.lease`)."""
        lease = self[name].lease()
        try:
            yield lease.module
        finally:
            lease.release()

    def prefetch(self, model_name: str | None = None) -> None:
        """Announce that a model's SAEs (None: all of this bank) are to be used soon, in the order of the layers that
        their names tell.

        Returns at once; they are brought in the background, to the device as many as fit, to the host tier those
        that come after.  Nothing in use leaves for them.  A later announcement takes the place of this one.
        """
        part = self if model_name is None else self.of(model_name)
        self._store.announce(sorted(part, key=_in_order))

    def settle(self) -> None:
        """Wait until nothing is being brought in the background."""
        self._store.settle()

    def close(self) -> None:
        """Let go of all SAEs; BankError where one is in use.  Parts of a bank close together."""
        self._store.close()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what it does -------------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Counts of uses, waits and loads; the same object for as long as the bank lives."""
        return self._store.stats

    def held(self) -> dict[str, dict[str, Any]]:
        """By tier: its budget, the bytes that count now, the most that ever counted, how many have left, and the
        SAEs that are there, the next to leave first."""
        return self._store.held()

    def __repr__(self) -> str:
        return f"Bank({len(self)} SAEs of {self.models}, {self._store})"


def _short(name: str) -> str:
    return PurePath(name).name.lower()


def _in_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """By layer, then by name with its numbers counted as numbers."""
    layer = re.search(r"(?:layers?|blocks)[._](\d+)", name)
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
    return (int(layer[1]) if layer else -1), parts
