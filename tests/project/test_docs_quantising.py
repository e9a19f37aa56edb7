"""The tables of widths are those of the stored runs."""

import json
from pathlib import Path

from gemmascope_fast.analysis.widths.grid import markdown

ROOT = Path(__file__).parents[2]


def test_the_tables_are_the_stored_runs():
    page = (ROOT / "docs/how/nested-codes.md").read_text("utf-8")
    rows = []
    for name in ("matryoshka-compare.json", "matryoshka-compare-qat.json", "matryoshka-qat-8432.json"):
        figures = json.loads((ROOT / "benchmarks/measured" / name).read_text())
        rows += [line for line in markdown(figures).splitlines() if line.startswith("|")]
    assert len(rows) > 60
    for row in rows:
        assert row in page
