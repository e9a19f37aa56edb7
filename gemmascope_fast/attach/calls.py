"""Data about one forward call: its rows, and which sequences they continue."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.ops.latents import SparseLatents

CACHES = ("cache", "past_key_values", "cache_params")  # transformers 5.24; earlier versions; earlier Mamba


@dataclass
class Tokens:
    """One row per token that reached the sites, in call order, batch-major within a call; tensors [N] on the CPU.

    call: number of the forward call.  sequence: number of the sequence in the run (in beam search, the running
    beam).  position: column in the sequence, padding included.  token_id: -1 if no ids were given.
    valid: False for padding.  In a `tokens` function these five have shape [B, S].
    """

    call: Tensor
    sequence: Tensor
    position: Tensor
    token_id: Tensor
    valid: Tensor

    def __len__(self) -> int:
        return self.call.numel()

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Concatenate the flattened rows of several, in order."""
        none = torch.empty(0, dtype=torch.int64)
        each = {name: [getattr(part, name).reshape(-1) for part in parts] for name in cls.__dataclass_fields__}
        return cls(**{name: torch.cat([none.bool() if name == "valid" else none, *each[name]]) for name in each})


@dataclass
class Generation:
    """What is known about one `generate`: from its arguments at the start, from its output at the end."""

    prompt: int | None = None  # number of columns
    mask: Tensor | None = None  # [B, prompt], False for padding
    beams: int = 1
    eos: tuple[int, ...] = ()
    final: Tensor | None = None  # the returned sequences, after it ended
    returned: Any = None  # weak reference to that tensor
    beam_indices: Tensor | None = None
    embeds: bool = False  # the prompt was given as inputs_embeds
    offset: int = (
        0  # column of the first returned token: not 0 if the prompt, or what a cache contains, is not returned
    )
    group: tuple[Any, Group] | None = None  # its sequences, and the Ledger that counts them


@dataclass(frozen=True)
class Parent:
    """The sequences that a group continues: those of another group after a number of its calls."""

    group: Group
    calls: int
    rows: tuple[int, ...]  # for each of the new group's sequences, the parent's sequence that it continues
    columns: int  # how many of their columns the cache had


@dataclass
class Group:
    """Sequences that continue together: one batch of one generation or of one KV cache."""

    base: int  # number of the first sequence
    rows: int
    generation: Generation | None = None
    first: int = 0  # column at which the first call of the sequences began
    end: int = 0
    prompt: int = 0  # columns of the prompt: from generate, or those of the first call
    calls: list[Call] = field(default_factory=list)
    parent: Parent | None = None
    given: Tensor | None = None  # bool [B, columns before the first call], False for padding, if a mask says so
    heads: list[list[int]] | None = None  # columns of each row's last chat prefix, as far as known
    continued: bool = False  # another group continues with this one's cache
    cache: Any = None  # weak reference to the cache with the sequences
    prints: tuple[int, Tensor] | None = None  # sampled cache contents after the last call: see ledger.py
    told: bool = False  # whether the cache's length was `end` after the last call


@dataclass
class Written:
    """In one call, for one coder: what the layers so far write to the current output and the later ones.

    total: their reconstruction, fp32 [n, (layers left) · d], current output first, if it is needed.
    changes: (layer, rows or None for all, fp32 [rows, outputs · d] from that layer on): what edits add.
    """

    total: Tensor | None = None
    changes: list[tuple[int, Tensor | None, Tensor]] = field(default_factory=list)


@dataclass
class Interim:
    """What the sites of one call leave for its later sites and for its end.  Keys are taps, unless stated."""

    latents: dict[str, SparseLatents] = field(default_factory=dict)  # of the selected rows, by the entry's key
    rows: dict[Any, Tensor] = field(default_factory=dict)  # [n, d_in]: what they were encoded from
    sources: dict[Any, dict[int, Tensor]] = field(default_factory=dict)  # rows of a crosscoder's sites so far
    regions: dict[Any, Any] = field(default_factory=dict)  # the checkpointed region in which the tap read
    fused: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # the activation, and its replacement
    written: dict[Any, Written] = field(default_factory=dict)  # by the cross-layer transcoder
    edits: list[tuple[Any, dict[str, Any]]] | None = None  # copies of their fields, for a replay in backward


@dataclass
class Call:
    """One forward call: B sequences of S tokens from column `start` on."""

    index: int
    group: Group
    batch: int
    length: int
    start: int
    ids: Tensor | None  # [B, S] on the CPU
    valid: Tensor | None  # bool [B, S] on the CPU; None if there is no padding
    device: torch.device
    opener: nn.Module
    chosen: Tensor | None = None  # bool [B * S] on the CPU: the selected rows; None for all
    replay: bool = False  # part of it runs again in backward (gradient checkpointing): nothing is recorded
    graded: bool = False  # gradients were enabled
    region: Any = None  # the checkpointed region that is running: see checkpointing.py
    offset: int = -1  # its first row in the run, once recorded
    reached: set[Any] = field(default_factory=set)
    interim: Interim = field(default_factory=Interim)
    leases: dict[Any, Any] = field(default_factory=dict)  # leases of a bank's SAEs in use, by tap

    def release(self) -> None:
        """Release the SAEs still in use, when the call ended or was interrupted."""
        while self.leases:
            self.leases.popitem()[1].release()

    @property
    def n_rows(self) -> int:
        return self.batch * self.length

    def tokens(self) -> Tokens:
        """Its rows with shape [B, S]."""
        shape = (self.batch, self.length)
        rows = torch.arange(self.batch)[:, None] + self.group.base
        columns = torch.arange(self.start, self.start + self.length)[None]
        return Tokens(
            call=torch.full(shape, self.index),
            sequence=rows.expand(shape),
            position=columns.expand(shape),
            token_id=torch.full(shape, -1) if self.ids is None else self.ids,
            valid=torch.ones(shape, dtype=torch.bool) if self.valid is None else self.valid,
        )


class Arguments:
    """The arguments of a module's forward by name, whether positional or not."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def cache_of(values: Any) -> Any:
    """The KV cache or recurrent state in a call's arguments or output, or None."""
    if hasattr(values, "cache"):  # an output of transformers 5.24, which warns if the older names are used
        return values.cache
    for name in CACHES:
        found = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        if found is not None:
            return found
    return None


def cache_length(cache: Any) -> int | None:
    """Number of columns in a cache; None if it does not say (non-empty recurrent states)."""
    if cache is None:
        return 0
    if isinstance(cache, tuple):
        return int(cache[0][0].shape[-2]) if cache else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError):
        pass
    try:
        return None if cache.has_previous_state() else 0
    except (AttributeError, ValueError, TypeError):
        return None
