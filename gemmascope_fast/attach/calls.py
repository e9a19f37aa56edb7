"""What one forward call is about: its rows, and which sequences they continue."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemmascope_fast.errors import AttachError

CACHES = ("cache", "past_key_values", "cache_params")  # transformers 5.24; earlier; Mamba's earlier


@dataclass
class Tokens:
    """One row per token that the sites saw, in call order, batch-major within a call; tensors [N] on the CPU.

    call: number of the forward call.  sequence: number of the sequence in the run (with beam search the running
    beam).  position: column in the sequence, padding included.  token_id: -1 where no ids were given.
    valid: False for padding.  Within a callable selection the same five are [B, S].
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
        """Rows of several, flattened, in order."""
        none = torch.empty(0, dtype=torch.int64)
        each = {name: [getattr(part, name).reshape(-1) for part in parts] for name in cls.__dataclass_fields__}
        return cls(**{name: torch.cat([none.bool() if name == "valid" else none, *each[name]]) for name in each})


@dataclass
class Generation:
    """What is known of one `generate`: from its arguments when it begins, from its output when it ends."""

    prompt: int | None = None  # columns
    mask: Tensor | None = None  # [B, prompt], False for padding
    beams: int = 1
    eos: tuple[int, ...] = ()
    final: Tensor | None = None  # the returned sequences, once it ended
    returned: Any = None  # weak reference to that tensor itself
    beam_indices: Tensor | None = None
    embeds: bool = False  # the prompt came as inputs_embeds: the returned sequences lack it
    group: tuple[Ledger, Group] | None = None  # its sequences, in the ledger that they are counted in


@dataclass
class Group:
    """Sequences that go on together: one batch of one generation or of one KV cache."""

    base: int  # number of the first sequence
    rows: int
    generation: Generation | None = None
    first: int = 0  # column at which the first call began
    end: int = 0
    prompt: int = 0  # columns of the prompt: of generate, else of the first call
    calls: list[Call] = field(default_factory=list)
    heads: list[list[int]] | None = None  # the first valid ids of each row, for the chat prefix


@dataclass
class Call:
    """One forward call: B sequences of S tokens from column `start` on."""

    index: int
    group: Group
    batch: int
    length: int
    start: int
    ids: Tensor | None  # [B, S] on the CPU
    valid: Tensor | None  # bool [B, S] on the CPU; None where nothing is padding
    device: torch.device
    opener: nn.Module
    chosen: Tensor | None = None  # bool [B * S] on the CPU: the rows that are read; None for all
    offset: int = -1  # row in the run, once committed
    reached: set[Any] = field(default_factory=set)
    scratch: dict[Any, Any] = field(default_factory=dict)
    leases: dict[Any, Any] = field(default_factory=dict)  # of a bank's SAEs in use, by tap

    def release(self) -> None:
        """Give back what is still in use: the call is over, or was cut short."""
        while self.leases:
            self.leases.popitem()[1].release()

    @property
    def n_rows(self) -> int:
        return self.batch * self.length

    def tokens(self) -> Tokens:
        """Its rows as [B, S]."""
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
    """The arguments of a module's forward by name, however they were passed."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def cache_of(values: Any) -> Any:
    """The KV cache or recurrent state among a call's arguments or in its output, or None."""
    if hasattr(values, "cache"):  # an output of transformers 5.24, which warns where it is asked for the older names
        return values.cache
    for name in CACHES:
        found = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        if found is not None:
            return found
    return None


def cache_length(cache: Any) -> int | None:
    """Columns that a cache holds already; None where it does not say (recurrent states)."""
    if cache is None:
        return 0
    if isinstance(cache, tuple):
        return int(cache[0][0].shape[-2]) if cache else 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, NotImplementedError):
        return None


class Ledger:
    """Which group a call continues.  Caches are held weakly: a group does not keep one alive."""

    def __init__(self, keep: bool = True) -> None:
        self.groups: list[Group] = []
        self.keep = keep  # False: groups are forgotten with their cache or generation
        self._by_cache: dict[int, tuple[Any, Group]] = {}
        self.sequences = 0

    def _new(self, batch: int, start: int, generation: Generation | None, length: int) -> Group:
        prompt = generation.prompt if generation is not None and generation.prompt is not None else start + length
        group = Group(self.sequences, batch, generation, start, start, prompt)
        self.sequences += batch
        if self.keep:
            self.groups.append(group)
        return group

    def group(self, cache: Any, generation: Generation | None, start: int | None, batch: int, length: int) -> Group:
        """The group of a call of `batch` rows that begins at column `start` (None: unknown, goes on)."""
        if generation is None:
            known = self._known(cache)
        else:
            known = generation.group[1] if generation.group is not None and generation.group[0] is self else None
        if known is not None and generation is None and start == 0:
            known = None  # the cache was emptied: other sequences
        if known is None:
            known = self._new(batch, start or 0, generation, length)
            if generation is not None:
                generation.group = (self, known)
        elif known.rows != batch:
            raise AttachError(f"a call of {batch} sequences continues one of {known.rows}")
        self.remember(cache, known)
        return known

    def _known(self, cache: Any) -> Group | None:
        entry = self._by_cache.get(id(cache))
        return entry[1] if cache is not None and entry is not None and entry[0]() is cache else None

    def remember(self, cache: Any, group: Group) -> None:
        if cache is None or isinstance(cache, tuple) or self._known(cache) is group:
            return
        if len(self._by_cache) > 64:
            self._by_cache = {at: entry for at, entry in self._by_cache.items() if entry[0]() is not None}
        self._by_cache[id(cache)] = (weakref.ref(cache), group)


def open_call(
    ledger: Ledger, index: int, opener: nn.Module, given: Mapping[str, Any], generation: Generation | None
) -> Call:
    """A call from the arguments of the model's forward.  AttachError where they hold neither ids nor embeddings."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    leading = ids if ids is not None else embeds
    if not isinstance(leading, Tensor) or leading.dim() < 2:
        raise AttachError(f"{type(opener).__name__}: expected a call with input_ids or inputs_embeds")
    batch, length = leading.shape[:2]
    cache = cache_of(given)
    start = _start(given, cache, length)
    group = ledger.group(cache, generation, start, batch, length)
    if start is None:
        start = group.end
    call = Call(index, group, batch, length, start, None, None, leading.device, opener)
    if ids is not None:
        there = ids.dtype == torch.int64 and ids.device.type == "cpu"
        call.ids = ids if there else ids.to("cpu", torch.int64)
    call.valid = _valid(given.get("attention_mask"), call)
    return call


def _start(given: Mapping[str, Any], cache: Any, length: int) -> int | None:
    """The first column of a call; None where only its history tells."""
    position = given.get("cache_position")
    if isinstance(position, Tensor) and position.numel() == length:
        return int(position[0])
    return cache_length(cache)


def _valid(mask: Any, call: Call) -> Tensor | None:
    """bool [B, S] from a mask of the whole sequence or of the call's own columns; None where nothing is padding."""
    begin, end = call.start, call.start + call.length
    generation = call.group.generation
    if generation is not None and generation.prompt is not None and begin >= generation.prompt:
        return None  # generate's own tokens: it masks none of them, and looking each time would cost 10 µs a token
    own: Tensor | None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= end:
        own = mask[:, begin:end]
    elif isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == call.length:
        own = mask
    elif generation is not None and generation.mask is not None:
        # a static cache turns the mask into four dimensions; generate's own argument is still the plain one
        full = torch.ones(generation.mask.shape[0], end, dtype=torch.bool)
        prompt = generation.mask[:, :end]
        full[:, : prompt.shape[1]] = prompt
        own = full[:, begin:end]
    else:
        own = _from_square(mask, call)
    if own is None:
        return None
    own = own.detach().to("cpu") != 0
    if own.shape[0] != call.batch:
        own = own.repeat_interleave(call.batch // own.shape[0], dim=0)
    return None if bool(own.all()) else own


def _from_square(mask: Any, call: Call) -> Tensor | None:
    """From a mask [B, 1, queries, keys], or a dict of them by attention type: what the last query may see."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[3] < call.start + call.length:
        return None
    last = mask[:, 0, -1, call.start : call.start + call.length]
    return last if last.dtype == torch.bool else last == 0
