"""Reads a conversation turn by turn with one KV cache: shows which features fire in which turn, for which role."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemmascope_fast.attach import attach
from gemmascope_fast.attach.calls import CACHES
from gemmascope_fast.attach.tokens import device_of, opening
from gemmascope_fast.ops.latents import SparseLatents

ROLES = {"assistant": "model"}  # Gemma's name for this role


@dataclass(frozen=True)
class Turn:
    """One entry of a transcript; the role is "tool" (or any other name) for the output of a tool."""

    role: str
    content: str


@dataclass
class Trace:
    """A turn as the model read it: ids int64 [S] of header, content, footer; content bool [S]; latents [S, d_sae]."""

    turn: Turn
    ids: Tensor
    content: Tensor
    latents: SparseLatents

    def top(self, k: int = 5) -> list[tuple[int, float, int]]:
        """(feature, mean activation over the content's tokens, number of tokens it fires on), strongest first."""
        own = self.latents[self.content]
        features = own.col_indices.long()
        total = torch.zeros(own.d_sae, dtype=torch.float64).index_add_(0, features, own.values.double())
        fired = torch.bincount(features, minlength=own.d_sae)
        order = total.argsort(descending=True, stable=True)[:k].tolist()
        rows = max(own.n_rows, 1)
        return [(f, float(total[f]) / rows, int(fired[f])) for f in order if fired[f]]


def load_transcript(path: str | Path) -> list[Turn]:
    """Read a JSON array, or JSON lines, of {role, content}.  ValueError naming the turn (or line) that is invalid."""
    from gemmascope_fast.analysis.extraction.sources import json_lines, string

    data = Path(path).read_bytes()
    if data.lstrip().startswith(b"["):
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a JSON array of turns: {error}") from error
        numbered = [(f"turn {i}", v) for i, v in enumerate(values, 1)]
    else:
        numbered = [(f"line {n}", v) for n, v in json_lines(Path(path))]
    turns = []
    for where, value in numbered:
        if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{path}, {where}: expected strings under 'role' and 'content', got {value!r:.80}")
        turns.append(Turn(*(string(value, k, f"{path}, {where}") for k in ("role", "content"))))
    if not turns:
        raise ValueError(f"{path}: expected at least one turn")
    return turns


def turn_ids(tokenizer: Any, turn: Turn, first: bool) -> tuple[list[int], int, int]:
    """(token ids of a turn, where its content begins, where it ends), in Gemma's format if the tokenizer has its
    special tokens, else `role: content`.  Each part is tokenised separately, so no token spans two turns."""
    role = ROLES.get(turn.role, turn.role)
    marks = {"<start_of_turn>", "<end_of_turn>"} <= set(tokenizer.get_added_vocab())
    head, tail = (f"<start_of_turn>{role}\n", "<end_of_turn>\n") if marks else (f"{role}: ", "\n")
    parts = [tokenizer(p, add_special_tokens=False, verbose=False)["input_ids"] for p in (head, turn.content, tail)]
    if first:
        parts[0] = [*opening(tokenizer), *parts[0]]
    begin = len(parts[0])
    return [i for part in parts for i in part], begin, begin + len(parts[1])


def read_conversation(
    model: Any, tokenizer: Any, sites: Any, turns: Sequence[Turn], progress: Callable[[], None] = lambda: None
) -> list[Trace]:
    """Run one forward per turn, with only the turn's own tokens: the cache has the earlier turns.

    sites: `saes` of attach as a dict with one SAE.  ValueError, before anything is read, if the conversation is longer
    than the model's window.
    """
    from transformers import DynamicCache

    each = [turn_ids(tokenizer, turn, i == 0) for i, turn in enumerate(turns)]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    total = sum(len(ids) for ids, _, _ in each)
    if limit is not None and total > limit:
        raise ValueError(f"conversation: expected at most {limit} tokens, the model's window, got {total}")
    cache = DynamicCache(config=model.config)
    accepted = inspect.signature(model.forward).parameters
    name = next(n for n in (*CACHES, "past_key_values") if n in accepted)
    with torch.inference_mode(), attach(model, sites, tokens="all") as run:
        for ids, _, _ in each:
            model(torch.tensor([ids], device=device_of(model)), use_cache=True, **{name: cache})
            progress()
    ((key, _),) = sites.items()
    latents = run.latents[key]
    traces, at = [], 0
    for turn, (ids, begin, end) in zip(turns, each, strict=True):
        content = torch.zeros(len(ids), dtype=torch.bool)
        content[begin:end] = True
        # as in AxBench and Gemma Scope, BOS and the chat's special tokens are shown but not counted
        traces.append(Trace(turn, torch.tensor(ids), content, latents[at : at + len(ids)].detach().cpu()))
        at += len(ids)
    return traces


def by_role(traces: Sequence[Trace], k: int = 8) -> dict[str, dict[str, Any]]:
    """For each role: tokens, L0, and the features whose firing rate most exceeds that in the other roles."""
    d_sae = traces[0].latents.d_sae
    fired: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    for trace in traces:
        own = trace.latents[trace.content]
        count = torch.bincount(own.col_indices.long(), minlength=d_sae)
        fired[trace.turn.role] = fired.get(trace.turn.role, torch.zeros(d_sae, dtype=torch.int64)) + count
        tokens[trace.turn.role] = tokens.get(trace.turn.role, 0) + own.n_rows
    everything, all_tokens = torch.stack(list(fired.values())).sum(0), sum(tokens.values())
    found = {}
    for role, count in fired.items():
        rate = count.double() / max(tokens[role], 1)
        others = (everything - count).double() / max(all_tokens - tokens[role], 1)
        order = (rate - others).argsort(descending=True, stable=True)[:k].tolist()
        features = [{"feature": f, "rate": float(rate[f]), "elsewhere": float(others[f])} for f in order if count[f]]
        found[role] = {"tokens": tokens[role], "l0": float(count.sum()) / max(tokens[role], 1), "features": features}
    return found
