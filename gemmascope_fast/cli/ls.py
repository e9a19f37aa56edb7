"""`gemmascope-fast ls`: the checkpoints in a place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.atomic import is_temporary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", help=common.PLACE)
    parser.add_argument("--revision", metavar="NAME", help="of the repository: a branch, tag or commit")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A row for each checkpoint: its sae_id, and for local ones format, kind, site and sizes."""
    from gemmascope_fast.analysis.pair import sae_place

    rows = listing(sae_place(args.place), args.revision)
    common.write_figures(args, rows)
    from rich.console import Console
    from rich.table import Table

    columns = [name for name in ("sae_id", "format", "kind", "site", "d_in", "d_sae", "dtype", "MB", "error") if rows]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str("" if row.get(name) is None else row[name]) for name in columns))
    # a listing that is piped is not wrapped at a terminal's width
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    print(f"{len(rows)} checkpoints")
    return 0


def listing(place: str, revision: str | None = None) -> list[dict[str, Any]]:
    """The checkpoints in a place, a dict for each.  Remote ones are listed by name and not downloaded.

    Raises CheckpointError if the place does not exist or has no checkpoint.
    """
    from gemmascope_fast.checkpoints import names
    from gemmascope_fast.checkpoints.repository import checkpoints_among, id_of, repository_files
    from gemmascope_fast.errors import CheckpointError

    root = Path(place)
    if root.is_file():
        return [_local(root, root.name)]
    if root.is_dir():
        paths = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
        # of a conversion that was killed
        files = (p.as_posix() for p in paths if not any(is_temporary(part) for part in p.parts))
        found = checkpoints_among(files)
        rows = [_local(root / path, id_of(path)) for path in found]
    elif place in names.releases():
        release = names.releases()[place]
        rows = [{"sae_id": sae_id, "format": release["format"]} for sae_id in names.ids(place)]
    else:
        found = checkpoints_among(repository_files(place, revision))
        rows = [{"sae_id": id_of(path), "format": kind} for path, kind in found.items()]
    if not rows:
        raise CheckpointError(f"{place}: no checkpoint in a known format")
    return rows


def _local(path: Path, sae_id: str) -> dict[str, Any]:
    from gemmascope_fast.checkpoints.loading import open_checkpoint
    from gemmascope_fast.errors import CheckpointError

    try:
        found = open_checkpoint(path)
    except CheckpointError as error:  # one damaged checkpoint does not hide the others
        return {"sae_id": sae_id, "error": str(error)}
    site = found.site or (found.layers[0].site if found.layers else None)
    arrays = (found.layers[0] if found.layers else found).arrays
    return {
        "sae_id": sae_id,
        "format": found.format,
        "kind": found.kind + ("" if found.kind_known else "?"),
        "site": None if site is None else site.hook_name + ("…" if found.layers else ""),
        "d_in": found.d_in,
        "d_sae": found.d_sae,
        "dtype": str(arrays["W_enc"].dtype).removeprefix("torch."),
        "MB": round(found.nbytes / 1e6, 1),
    }
