"""What a benchmark run says: rows of the JSON, paired ratios, and the file they are kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gemmascope_fast.errors import GemmaScopeFastError
from gemmascope_fast.files.results import write_text

FORMAT = 1
BASELINE = "eager fp32"


@dataclass
class Row:
    """One implementation of one op on one shape.

    T: tokens; l0: features that fire per token; times in milliseconds; bytes and flops: what the call must move and
    compute (a multiply-add is two); roof_share: the least time for that at the roof of the same run over the median,
    None where no roof was measured for its arithmetic.  max_error: largest distance from fp64.  support_equal: the
    support is fp64's outside the bound of the fp32 dot; support_flips_vs_eager: pairs that differ from eager fp32's.
    """

    suite: str
    op: str
    impl: str
    T: int
    d_in: int
    d_sae: int
    l0: float | None
    dtype: str
    threads: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    bytes: int | None
    flops: int | None
    roof_share: float | None
    max_error: float | None
    support_equal: bool | None
    support_flips_vs_eager: int | None

    @property
    def key(self) -> str:
        """What names the same measurement in another run."""
        return f"{self.suite}/{self.op}/{self.impl}/T={self.T}/{self.d_in}x{self.d_sae}/{self.dtype}/{self.threads}"


@dataclass
class Ratio:
    """Baseline's time over this one's, round by round: the median of the paired ratios and their 20th and 80th
    percentiles.  Above 1 is faster than the baseline."""

    median: float
    p20: float
    p80: float


@dataclass
class Results:
    """One run: the machine, the roof before and after, the rows, paired ratios by row key, and what was missing."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    exponents: list[dict[str, Any]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.plain(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises GemmaScopeFastError where the file is no result of this version's format."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise GemmaScopeFastError(f"{path}: expected the JSON of gemmascope-fast dev bench, got {error}") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise GemmaScopeFastError(f"{path}: expected the JSON of gemmascope-fast dev bench, format {FORMAT}")
        unknown = set(found) - {f.name for f in fields(cls)}
        if unknown:
            raise GemmaScopeFastError(f"{path}: unknown entries {sorted(unknown)}")
        found["rows"] = [Row(**row) for row in found["rows"]]
        found["ratios"] = {key: Ratio(**ratio) for key, ratio in found["ratios"].items()}
        return cls(**found)


def shown(row: Row, results: Results) -> dict[str, str]:
    """A row as tables show it; empty where there is no such figure."""
    ratio = results.ratios.get(row.key)
    return {
        "impl": row.impl,
        "ms": f"{row.median_ms:.3f}",
        "range": f"{row.p20_ms:.3f} – {row.p80_ms:.3f}",
        "ratio": "" if ratio is None else f"{ratio.median:.2f}",
        "ratio_range": "" if ratio is None else f"{ratio.p20:.2f} – {ratio.p80:.2f}",
        "roof": "" if row.roof_share is None else f"{row.roof_share:.0%}",
        "error": "" if row.max_error is None else f"{row.max_error:.1e}",
        "support": {None: "", True: "equal", False: "differs"}[row.support_equal],
        "flips": "" if row.support_flips_vs_eager is None else str(row.support_flips_vs_eager),
    }
