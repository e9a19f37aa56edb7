"""The tables of widths in the guide and the README are those of the stored run."""

import json
from pathlib import Path

from gemmascope_fast.analysis.widths.grid import markdown

ROOT = Path(__file__).parents[2]


def test_the_guides_tables_are_the_stored_runs():
    guide = (ROOT / "docs/guides/quantising.md").read_text("utf-8")
    rows = []
    for name in ("matryoshka-compare.json", "matryoshka-compare-qat.json", "matryoshka-qat-8432.json"):
        figures = json.loads((ROOT / "benchmarks/measured" / name).read_text())
        rows += [line for line in markdown(figures).splitlines() if line.startswith("|")]
    assert len(rows) > 60
    for row in rows:
        assert row in guide
    shown = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| ffn ")]
    assert len(shown) >= 4
    assert set(shown) <= set(rows)
