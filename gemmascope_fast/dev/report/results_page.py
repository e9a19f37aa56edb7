"""`gemmascope-fast dev report`: one self-contained page, PNG plots and the README's table from a benchmark's JSON."""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import check_outputs
from gemmascope_fast.dev.bench.compare import is_ours
from gemmascope_fast.dev.bench.machine import kind
from gemmascope_fast.dev.bench.rows import BASELINE, Results, Row
from gemmascope_fast.dev.report import plots
from gemmascope_fast.errors import GemmaScopeFastError
from gemmascope_fast.files.atomic import make_folder, replacing
from gemmascope_fast.files.results import write_text

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
NOT_MEASURED = "Not measured for this version yet: `make figures` measures this machine and writes the table here.\n"
# what the README shows: (op, heading)
README_OPS = (("encode", "encode"), ("decode", "decode"), ("SAE", "whole SAE"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "json",
        type=Path,
        nargs="*",
        help="what bench --json wrote (default: bench.json); the table is of the first, several must be of one machine",
    )
    parser.add_argument("--html", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write the plots there too")
    parser.add_argument("--quality", type=Path, metavar="FILE", help="what `gemmascope-fast quantize --table` wrote")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="replace the table between the marks in this file")


def run(args: argparse.Namespace) -> int:
    check_outputs(args, ("html", "readme"), ("png",))
    runs = [Results.load(path) for path in args.json or [Path("bench.json")]]
    results = together(runs)
    quality = None if args.quality is None else plots.load_quality(args.quality)
    pictures = plots.draw(results, quality)
    write_text(args.html, page(results, pictures))
    print(f"page: {args.html}")
    if args.png:
        make_folder(args.png)
        for picture in pictures:
            with replacing(args.png / f"{picture.name}.png") as temporary:
                temporary.write_bytes(picture.png)
            print(f"plot: {args.png / picture.name}.png")
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        write_text(args.readme, with_table(text, readme_table(runs[0])))
        print(f"table: {args.readme}")
    return 0


def together(runs: Sequence[Results]) -> Results:
    """One run's rows beside another's, under the first one's machine and roof; a row of both is the first's.

    Raises GemmaScopeFastError where they are of different kinds of machine or numbers of threads.
    """
    first, whole = runs[0], Results(runs[0].machine)
    for run in runs:
        here, there = ((kind(r.machine), r.machine["threads"]) for r in (first, run))
        if here != there:
            raise GemmaScopeFastError(f"runs of different machines: {here} and {there} make no one report")
        known = {row.key for row in whole.rows}
        whole.rows += [row for row in run.rows if row.key not in known]
        whole.ratios = {**run.ratios, **whole.ratios}
        whole.missing = {**run.missing, **whole.missing}
        whole.warnings += run.warnings
        whole.exponents += run.exponents
        whole.memory += run.memory
    return whole


# ---- the page ---------------------------------------------------------------------------------------


def page(results: Results, pictures: Sequence[plots.Picture]) -> str:
    """The page as text: no network, no other file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gemmascope_fast.dev.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        key = (row.suite, row.op, f"{row.d_in} × {row.d_sae}", row.T, row.threads)
        groups.setdefault(key, []).append(row)
    shown = [
        {"title": key, "rows": [_cells(r, results) for r in sorted(rows, key=lambda r: r.median_ms)]}
        for key, rows in groups.items()
    ]
    images = [
        {"title": p.title, "text": p.text, "data": base64.b64encode(p.png).decode("ascii"), "name": p.name}
        for p in pictures
    ]
    return environment.get_template("results.html").render(
        machine=results.machine,
        images=images,
        groups=shown,
        exponents=results.exponents,
        missing=results.missing,
        warnings=results.warnings,
        baseline=BASELINE,
    )


def _cells(row: Row, results: Results) -> dict[str, Any]:
    ratio = results.ratios.get(row.key)
    return {
        "impl": row.impl,
        "ours": is_ours(row.key),
        "ms": f"{row.median_ms:.3f}",
        "range": f"{row.p20_ms:.3f} – {row.p80_ms:.3f}",
        "ratio": "" if ratio is None else f"{ratio.median:.2f}",
        "ratio_range": "" if ratio is None else f"{ratio.p20:.2f} – {ratio.p80:.2f}",
        "roof": "" if row.roof_share is None else f"{row.roof_share:.0%}",
        "error": "" if row.max_error is None else f"{row.max_error:.1e}",
        "support": {None: "", True: "equal", False: "differs"}[row.support_equal],
        "flips": "" if row.support_flips_vs_eager is None else row.support_flips_vs_eager,
    }


# ---- the README's table -----------------------------------------------------------------------------


def readme_table(results: Results) -> str:
    """Markdown: this package's median times on the widest case, and the paired speed-up over each peer that was there.

    A peer's figure is its paired ratio to the baseline divided into ours: both from the rounds of one run.
    """
    shapes = {(r.d_in, r.d_sae) for r in results.rows if r.op == "SAE"}
    if not shapes:
        raise GemmaScopeFastError("the JSON holds no rows of the suite modules: expected op SAE")
    shape = max(shapes, key=lambda s: s[0] * s[1])
    machine, roof = results.machine, results.machine["roof"]
    bandwidth = f"; read bandwidth measured in the same run: {roof['read_gb_s']:.1f} GB/s" if roof else ""
    lines = [
        f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, torch"
        f" {machine['versions']['torch']}; {shape[0]} × {shape[1]}, fp32{bandwidth}.",
        "",
        "| | T | ms | × eager fp32 | × eager bf16 (inexact) | × torch.compile | share of the roof |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, title in README_OPS:
        for T in sorted({r.T for r in results.rows if r.op == op and (r.d_in, r.d_sae) == shape}):
            at = {r.impl: r for r in results.rows if (r.op, r.T, r.d_in, r.d_sae) == (op, T, *shape)}
            lines.append(_readme_row(title, T, at, results))
    return "\n".join(lines) + "\n"


def _readme_row(title: str, T: int, at: dict[str, Row], results: Results) -> str:
    ours = at["ours"]
    own = results.ratios[ours.key].median

    def against(impl: str) -> str:
        if impl not in at:
            return ""
        return f"{own / results.ratios[at[impl].key].median:.1f}"

    share = "" if ours.roof_share is None else f"{ours.roof_share:.0%}"
    cells = (f"{own:.1f}", against("eager bf16"), against("torch.compile fp32"), share)
    return f"| {title} | {T} | {ours.median_ms:.2f} | " + " | ".join(cells) + " |"


def with_table(text: str, table: str) -> str:
    """The text with the part between the two marks replaced.  Raises GemmaScopeFastError where they are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise GemmaScopeFastError(f"expected one {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"
