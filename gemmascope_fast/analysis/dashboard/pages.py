"""The pages of a dashboard, as text: one index, and one page for each feature."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemmascope_fast.analysis.dashboard.collect import BINS, Collected
from gemmascope_fast.analysis.dashboard.weights import Lens
from gemmascope_fast.analysis.extraction.store import Store
from gemmascope_fast.analysis.pair import full_names
from gemmascope_fast.analysis.pieces import Pieces
from gemmascope_fast.analysis.templating import render, script_data
from gemmascope_fast.files.atomic import make_folder, remove, replacing

NEURONPEDIA = "https://www.neuronpedia.org"
ROWS = 100  # rows of the index shown at a time


class Dashboard:
    """Everything that the pages need, in memory.  near: `weights.neighbours`; lens: `weights.logit_lens` or None.

    neuronpedia: the SAE's name there, such as gemma-2-2b/20-gemmascope-res-16k (default: from its checkpoint).
    """

    def __init__(
        self,
        store: Store,
        collected: Collected,
        pieces: Pieces,
        near: tuple[torch.Tensor, torch.Tensor] | None = None,
        lens: Lens | None = None,
        neuronpedia: str | None = None,
    ) -> None:
        self.neuronpedia = neuronpedia or store.settings.get("neuronpedia_id")
        self.store, self.collected, self.pieces, self.near, self.lens = store, collected, pieces, near, lens
        settings = store.settings
        model, sae = full_names(settings)
        self.title = f"{model}, {settings['hook_name']}, {sae}"
        self.tokens = max(store.tokens, 1)
        self._sources = _Sources(store)

    def __len__(self) -> int:
        return self.store.d_sae

    # ---- pages --------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> str:
        """The index: a table of the densest features, and data of all features that its script searches and sorts."""
        rows = [self._row(f) for f in range(len(self))]
        first = sorted(rows, key=lambda row: (-row[1], row[0]))[:ROWS]
        about = {
            "tokens": self.tokens,
            "features": len(self),
            "silent": int((self.collected.fired == 0).sum()),
            "l0": float(self.collected.fired.sum() / self.tokens),
        }
        return render(
            "dashboard_index.html", title=self.title, about=about, first=first, shown=ROWS, data=script_data(rows)
        )

    def page(self, feature: int) -> str:
        """One feature's page.  IndexError for a feature that the SAE lacks."""
        if not 0 <= feature < len(self):
            raise IndexError(f"feature: expected one in [0, {len(self)}), got {feature}")
        c = self.collected
        fired = int(c.fired[feature])
        return render(
            "dashboard_feature.html",
            title=self.title,
            feature=feature,
            features=len(self),
            fired=fired,
            tokens=self.tokens,
            density=fired / self.tokens,
            mean=float(c.total[feature] / fired) if fired else 0.0,
            max=float(c.max[feature]),
            contexts=[self._context(feature, int(rank)) for rank in np.nonzero(c.document[feature] >= 0)[0]],
            bars=self._bars(feature),
            raised=self._lens(feature, "raised"),
            lowered=self._lens(feature, "lowered"),
            near=self._near(feature),
            neuronpedia=self._neuronpedia(feature),
        )

    # ---- contents -----------------------------------------------------------------------------------

    def _row(self, feature: int) -> list[Any]:
        """[feature, tokens on which it fires, maximum, the tokens where it is strongest, tokens it promotes, density
        and maximum as displayed]."""
        c = self.collected
        at = [int(i) for i in c.ids[feature, :5, c.left] if i >= 0]
        strongest = list(dict.fromkeys(self.pieces(i).strip() or self.pieces(i) for i in at))
        raised = [] if self.lens is None else [self.pieces(int(i)) for i in self.lens.raised[feature, :4]]
        fired, high = int(c.fired[feature]), float(c.max[feature])
        texts = [f"{100 * fired / self.tokens:.3g} %", f"{high:.4g}"]
        return [feature, fired, round(high, 3), strongest, raised, *texts]

    def _context(self, feature: int, rank: int) -> dict[str, Any]:
        c = self.collected
        ids, acts = c.ids[feature, rank], c.acts[feature, rank]
        there = np.nonzero(ids >= 0)[0]
        value = float(c.value[feature, rank])
        spans = []
        for text, own in self.pieces.spans(ids[there].tolist()):
            values = [float(acts[there[i]]) for i in own]
            spans.append(
                {
                    "text": text.replace("\r", "").replace("\n", "↵"),
                    "share": round(min(1.0, max(0.0, *values) / value), 3) if value > 0 else 0.0,
                    "title": ", ".join(f"{v:.2f}" for v in values),
                    "peak": any(there[i] == c.left for i in own),
                }
            )
        document = int(c.document[feature, rank])
        source, record = self._sources(document)
        where = f"{Path(source).name}:{record}, token {int(c.position[feature, rank])}"
        return {"value": value, "spans": spans, "where": where}

    def _bars(self, feature: int) -> list[dict[str, Any]]:
        counts = self.collected.histogram[feature]
        # logarithmic, so that a few strong activations are visible next to thousands of weak ones
        top = np.log1p(counts.max()) if counts.max() else 1.0
        width = float(self.collected.max[feature]) / BINS
        return [
            {"height": float(np.log1p(n) / top), "count": int(n), "low": i * width, "high": (i + 1) * width}
            for i, n in enumerate(counts)
        ]

    def _lens(self, feature: int, name: str) -> list[tuple[str, float]]:
        if self.lens is None:
            return []
        ids, values = getattr(self.lens, name)[feature], getattr(self.lens, name + "_by")[feature]
        return [(self.pieces(int(i)), float(v)) for i, v in zip(ids, values, strict=True)]

    def _near(self, feature: int) -> list[tuple[int, float]]:
        if self.near is None:
            return []
        return list(zip(self.near[0][feature].tolist(), self.near[1][feature].tolist(), strict=True))

    def _neuronpedia(self, feature: int) -> str | None:
        return f"{NEURONPEDIA}/{self.neuronpedia}/{feature}" if self.neuronpedia else None


class _Sources:
    """Document number → (source, record), from the documents tables."""

    def __init__(self, store: Store) -> None:
        self.store = store
        counts = [shard["rows"]["documents"] for shard in store.shards]
        self.first = np.cumsum([0, *counts])
        self._known: dict[int, dict[str, np.ndarray]] = {}

    def __call__(self, document: int) -> tuple[str, int]:
        shard = int(np.searchsorted(self.first, document, side="right")) - 1
        if shard not in self._known:
            self._known[shard] = self.store.read("documents", shard)
        row = document - int(self.first[shard])
        return str(self._known[shard]["source"][row]), int(self._known[shard]["record"][row])


def write(dashboard: Dashboard, out: Path, progress: Callable[[], None] = lambda: None) -> None:
    """Write feature/N.html, and index.html last; progress is called for each feature's page.  OSError names the file.

    An existing index is removed first, because it would list old pages.  Pages are not synced one by one, so a power
    cut, unlike a kill, may lose some that the index lists.
    """
    make_folder(out / "feature")
    remove(out / "index.html")
    for feature in range(len(dashboard)):
        with replacing(out / "feature" / f"{feature}.html", wait=False) as temporary:
            temporary.write_text(dashboard.page(feature), encoding="utf-8")
        progress()
    with replacing(out / "index.html") as temporary:
        temporary.write_text(dashboard.index, encoding="utf-8")
