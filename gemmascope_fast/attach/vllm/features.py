"""The latents of one request: as bytes on their way out of the worker, and as the object that the user gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemmascope_fast.ops.latents import SparseLatents

# How rows travel between the engine's processes: (d_sae, positions int32 [n], crow int64 [n + 1], col int32 [nnz],
# values float32 [nnz]), the arrays as little-endian bytes.
Rows = tuple[int, bytes, bytes, bytes, bytes]


def packed(positions: Tensor, latents: SparseLatents) -> Rows:
    """Rows of one SAE as bytes.  positions: int64 [n], those of the latents' rows."""
    arrays = (
        positions.to(torch.int32),
        latents.crow_indices.cpu(),
        latents.col_indices.cpu(),
        latents.values.detach().to("cpu", torch.float32),
    )
    return (latents.d_sae, *(array.numpy().tobytes() for array in arrays))  # type: ignore[return-value]


def _unpacked(rows: Rows) -> tuple[Tensor, SparseLatents]:
    d_sae, *arrays = rows
    kinds = (np.int32, np.int64, np.int32, np.float32)
    found = [
        torch.from_numpy(np.frombuffer(bytearray(a), dtype=k)) if a else torch.empty(0, dtype=_DTYPES[k])
        for a, k in zip(arrays, kinds, strict=True)
    ]
    position, crow, col, values = found
    return position.long(), SparseLatents(crow, col, values, (position.numel(), d_sae))


_DTYPES: dict[Any, torch.dtype] = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}


@dataclass
class Features:
    """What a request observed: the attribute `gemmascope` of a `CompletionOutput`.

    In a stream of deltas, it holds what is new.
    cached: number of positions at the beginning that came from the prefix cache and were not computed.
    fired: the alarms that ended the request, as dicts with sae, feature, value and position.
    error: why the request was ended; None if nothing failed.
    text: the request came as JSON text, so that the answer goes out as JSON.
    """

    cached: int = 0
    fired: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    text: bool = False
    _parts: dict[str, list[Rows]] = field(default_factory=dict)
    _joined: dict[str, tuple[int, Tensor, SparseLatents]] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """The SAEs of which there are rows."""
        return list(self._parts)

    def positions(self, name: str | None = None) -> Tensor:
        """int64 [n], ascending: the positions in the sequence (prompt first) of the rows of `latents`."""
        return self._of(name)[0]

    def latents(self, name: str | None = None) -> SparseLatents:
        """SparseLatents [n, d_sae] of one SAE (None: the only one), fp32 on the CPU, one row per position.

        The last token of a sequence has no row, because the model never reads it.  A position that was computed twice,
        after preemption, has the row of the last computation.  KeyError for an SAE that was not observed.
        """
        return self._of(name)[1]

    def _of(self, name: str | None) -> tuple[Tensor, SparseLatents]:
        if name is None:
            if len(self._parts) != 1:
                raise KeyError(f"name: expected one of {self.names()}")
            name = next(iter(self._parts))
        if name not in self._parts:
            raise KeyError(f"{name!r}: expected one of {self.names()}")
        parts = self._parts[name]
        known = self._joined.get(name)
        if known is None or known[0] != len(parts):
            known = self._joined[name] = (len(parts), *_joined([_unpacked(part) for part in parts]))
        return known[1], known[2]

    def add(self, payload: Mapping[str, Any]) -> None:
        """Take what the worker sent after a step."""
        for name, rows in payload.get("rows", {}).items():
            self._parts.setdefault(name, []).append(tuple(rows))  # type: ignore[arg-type]
        self.fired += payload.get("fired", [])
        self.error = payload.get("error", self.error)
        self.cached = payload.get("cached", self.cached)
        self.text = payload.get("text", self.text)

    def copy(self) -> Features:
        """The same rows; what is added to one later is not in the other."""
        parts = {name: list(rows) for name, rows in self._parts.items()}
        return Features(self.cached, list(self.fired), self.error, self.text, parts)

    def take(self) -> Features:
        """A copy; afterwards this one has no rows, for a stream of deltas."""
        taken = self.copy()
        self._parts.clear()
        self._joined.clear()
        self.fired = []
        return taken

    def append(self, later: Features) -> None:
        """Add what came later in the same stream."""
        for name, rows in later._parts.items():
            self._parts.setdefault(name, []).extend(rows)
        self.fired += later.fired
        self.error = later.error or self.error

    def stop_reason(self) -> str | None:
        """Why this package ended the request, for `CompletionOutput.stop_reason`; None if it did not."""
        if self.error is not None:
            return f"gemmascope error: {self.error}"
        if self.fired:
            first = self.fired[0]
            return f"gemmascope alarm: feature {first['feature']} of {first['sae']}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for an HTTP answer: {"latents": {name: {"position", "feature", "value"}}, ...}.

        "feature" and "value" have one list per position.
        """
        found: dict[str, Any] = {}
        for name in self._parts:
            position, latents = self._of(name)
            ends = latents.crow_indices.tolist()
            col, values = latents.col_indices.tolist(), latents.values.tolist()
            spans = list(pairwise(ends))
            found[name] = {
                "position": position.tolist(),
                "feature": [col[a:b] for a, b in spans],
                "value": [values[a:b] for a, b in spans],
            }
        return {"latents": found, "cached": self.cached, "fired": self.fired, "error": self.error}


def _joined(parts: list[tuple[Tensor, SparseLatents]]) -> tuple[Tensor, SparseLatents]:
    """All rows in the order of their positions; of several rows of one position, the last."""
    position = torch.cat([p for p, _ in parts])
    latents = SparseLatents.cat([rows for _, rows in parts])
    last = {p: row for row, p in enumerate(position.tolist())}
    order = torch.tensor([last[p] for p in sorted(last)], dtype=torch.int64)
    if torch.equal(order, torch.arange(position.numel())):
        return position, latents
    return position[order], latents[order]
