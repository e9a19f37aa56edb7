"""`gemmascope-fast dev report`: one self-contained page, PNG plots, and the tables of README and docs."""

from __future__ import annotations

import argparse
from pathlib import Path

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.atomic import make_folder, replacing
from gemmascope_fast.files.results import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    note = (
        "what `dev bench --json` wrote (default: bench.json); several must be of one machine, tables are of the first"
    )
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help=note)
    common.add_output(parser, "--html", "write a self-contained page", default=Path("report.html"))
    common.add_output(parser, "--png", "also write the plots here", "folder")
    note = "what `gemmascope-fast quantize --table` wrote"
    parser.add_argument("--quality", type=Path, metavar="FILE", help=note)
    note = "update the tables between the marks in these files"
    parser.add_argument("--readme", type=Path, metavar="FILE", nargs="+", default=[], help=note)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.dev.bench.rows import Results
    from gemmascope_fast.dev.report import plots
    from gemmascope_fast.dev.report.results_page import page, together, with_tables

    for file in args.readme:
        if not file.is_file():
            raise ValueError(f"--readme: expected a file with the marks, got {file}")
    runs = [Results.load(path) for path in args.runs or [Path("bench.json")]]
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
    for file in args.readme:
        write_text(file, with_tables(file.read_text(encoding="utf-8"), runs[0]))
        print(f"table: {file}")
    return 0
