"""One self-contained page, and the tables of README and docs, from a benchmark's JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from gemmascope_fast.dev.bench.compare import is_ours
from gemmascope_fast.dev.bench.machine import kind
from gemmascope_fast.dev.bench.rows import BASELINE, Results, Row, shown
from gemmascope_fast.dev.report import plots
from gemmascope_fast.errors import GemmaScopeFastError

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"  # the table of the whole SAE, for the README
ALL_BEGIN, ALL_END = "<!-- all figures -->", "<!-- end of all figures -->"  # the table of every op, for docs/
NOT_MEASURED = "Not measured for this version yet: `make figures` measures this machine and writes the table here.\n"
OPS_SHOWN = (("encode", "encode"), ("decode", "decode"), ("SAE", "whole SAE"))  # (op, heading)
README_PEERS = (
    ("SAELens fp32", "× SAELens"),
    ("eager fp32", "× eager PyTorch"),
    ("torch.compile fp32", "× torch.compile"),
    ("F.linear + embedding_bag, bf16", "× fastest bf16 (inexact)"),
)


def together(runs: Sequence[Results]) -> Results:
    """The rows of all runs, with the machine and roof of the first.  Of a row in several runs the first is taken.

    Raises GemmaScopeFastError where they are of different kinds of machine or numbers of threads.
    """
    first, whole = runs[0], Results(runs[0].machine)
    for run in runs:
        here, there = ((kind(r.machine), r.machine["threads"]) for r in (first, run))
        if here != there:
            raise GemmaScopeFastError(f"runs of different machines: {here} and {there} cannot be in one report")
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
    """The page as self-contained HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gemmascope_fast.dev.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.rows:
        key = (row.suite, row.op, f"{row.d_in} × {row.d_sae}", row.T, row.threads)
        groups.setdefault(key, []).append(row)
    by_time = attrgetter("median_ms")
    tables = [
        {"title": key, "rows": [shown(r, results) | {"ours": is_ours(r.key)} for r in sorted(rows, key=by_time)]}
        for key, rows in groups.items()
    ]
    images = [
        {"title": p.title, "text": p.text, "data": base64.b64encode(p.png).decode("ascii"), "name": p.name}
        for p in pictures
    ]
    return environment.get_template("results.html").render(
        machine=results.machine,
        images=images,
        groups=tables,
        exponents=results.exponents,
        missing=results.missing,
        warnings=results.warnings,
        baseline=BASELINE,
    )


# ---- the tables of README and docs ------------------------------------------------------------------


def readme_table(results: Results) -> str:
    """Markdown: this package's median times of the whole SAE on the widest case, and its speed-up over each peer."""
    shape = _widest(results)
    lines = [
        _machine(results, shape),
        "",
        "| tokens | ms | " + " | ".join(title for _, title in README_PEERS) + " |",
        "|---" * (2 + len(README_PEERS)) + "|",
    ]
    for T, at in _by_tokens(results, "SAE", shape):
        cells = " | ".join(_against(at, impl, results) for impl, _ in README_PEERS)
        lines.append(f"| {T} | {at['ours'].median_ms:.2f} | {cells} |")
    return "\n".join(lines) + "\n"


def full_table(results: Results) -> str:
    """Markdown: the same of every op, with the share of the roof."""
    shape = _widest(results)
    lines = [
        _machine(results, shape),
        "",
        "| | T | ms | × eager fp32 | × eager bf16 (inexact) | × torch.compile | share of the roof |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, title in OPS_SHOWN:
        for T, at in _by_tokens(results, op, shape):
            ours = at["ours"]
            peers = [_against(at, impl, results) for impl in ("eager fp32", "eager bf16", "torch.compile fp32")]
            share = "" if ours.roof_share is None else f"{ours.roof_share:.0%}"
            lines.append(f"| {title} | {T} | {ours.median_ms:.2f} | " + " | ".join([*peers, share]) + " |")
    return "\n".join(lines) + "\n"


def _widest(results: Results) -> tuple[int, int]:
    shapes = {(r.d_in, r.d_sae) for r in results.rows if r.op == "SAE"}
    if not shapes:
        raise GemmaScopeFastError("the JSON holds no rows of the suite modules: expected op SAE")
    return max(shapes, key=lambda s: s[0] * s[1])


def _machine(results: Results, shape: tuple[int, int]) -> str:
    machine, roof = results.machine, results.machine["roof"]
    bandwidth = f"; read bandwidth measured in the same run: {roof['read_gb_s']:.1f} GB/s" if roof else ""
    return (
        f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, torch {machine['versions']['torch']};"
        f" {shape[0]} × {shape[1]}, fp32{bandwidth}."
    )


def _by_tokens(results: Results, op: str, shape: tuple[int, int]) -> list[tuple[int, dict[str, Row]]]:
    """(T, implementation -> row) in ascending order of T."""
    rows = [r for r in results.rows if r.op == op and (r.d_in, r.d_sae) == shape]
    return [(T, {r.impl: r for r in rows if r.T == T}) for T in sorted({r.T for r in rows})]


def _against(at: dict[str, Row], impl: str, results: Results) -> str:
    """The paired speed-up over a peer: our ratio to the baseline over its ratio, both from the rounds of one run."""
    if impl not in at:
        return ""
    own = results.ratios[at["ours"].key].median
    return f"{own:.1f}" if impl == BASELINE else f"{own / results.ratios[at[impl].key].median:.1f}"


def with_tables(text: str, results: Results | None) -> str:
    """The text with new tables between the marks; without results they say that nothing was measured.

    Raises GemmaScopeFastError where the text has neither pair of marks, or one of them twice.
    """
    found = False
    for begin, end, table in ((BEGIN, END, readme_table), (ALL_BEGIN, ALL_END, full_table)):
        if (text.count(begin), text.count(end)) == (0, 0):
            continue
        if (text.count(begin), text.count(end)) != (1, 1):
            raise GemmaScopeFastError(f"expected one {begin!r} and one {end!r}")
        before, rest = text.split(begin)
        shown = NOT_MEASURED if results is None else table(results)
        text, found = f"{before}{begin}\n{shown}{end}{rest.split(end)[1]}", True
    if not found:
        raise GemmaScopeFastError(f"expected one {BEGIN!r} and one {END!r}, or one {ALL_BEGIN!r} and one {ALL_END!r}")
    return text
