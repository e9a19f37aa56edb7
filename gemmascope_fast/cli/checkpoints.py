"""`gemmascope-fast ls` and `gemmascope-fast convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PLACE = "a file, a folder, a Hugging Face repository, or a SAELens release; 'demo' is the bundled SAE"


def add_ls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", help=PLACE)
    parser.add_argument("--revision", help="of the repository")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_ls(args: argparse.Namespace) -> int:
    """One line a checkpoint: its path (what sae_id takes), and, of local ones, what they hold."""
    from gemmascope_fast.analysis.pair import sae_place

    rows = listing(sae_place(args.place), args.revision)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
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
    """What is in a place, one dict a checkpoint.  Remote ones are listed by name and not downloaded.

    Raises CheckpointError where the place is not there or holds none.
    """
    from gemmascope_fast.checkpoints import names
    from gemmascope_fast.checkpoints.repository import checkpoints_among, id_of, repository_files
    from gemmascope_fast.errors import CheckpointError

    root = Path(place)
    if root.is_file():
        return [_local(root, root.name)]
    if root.is_dir():
        files = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
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


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=PLACE)
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--sae-id", help="the checkpoint in it")
    parser.add_argument("--revision", help="of the repository")
    parser.add_argument("--to", required=True, choices=("native", "saelens", "gemma-scope-1", "gemma-scope-2"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")


def run_convert(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.pair import sae_place

    written = convert(sae_place(args.source), args.target, args.to, args.sae_id, args.dtype, args.revision)
    print(f"{args.target}: {', '.join(written)}")
    return 0


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    sae_id: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
) -> list[str]:
    """Write the checkpoint of one place as a folder in another format; gives the names of the files written.

    Arrays go from file to file in blocks, unless a bias has to be folded in first.  Raises CheckpointError where
    the other format has no place for what is there.
    """
    import torch

    from gemmascope_fast.checkpoints import gemma_scope_1, gemma_scope_2, native, saelens
    from gemmascope_fast.checkpoints.loading import build, open_checkpoint
    from gemmascope_fast.checkpoints.repository import locate
    from gemmascope_fast.errors import CheckpointError
    from gemmascope_fast.files.write import Source, atomic_folder

    writers = {"native": native, "saelens": saelens, "gemma-scope-1": gemma_scope_1, "gemma-scope-2": gemma_scope_2}
    if to not in writers:
        raise ValueError(f"to: expected one of {', '.join(writers)}, got {to!r}")
    found = open_checkpoint(locate(source, sae_id, revision).path)
    if found.layers:
        raise CheckpointError(f"{found.path}: converting a {found.kind} is not supported")
    arrays: dict[str, Source] = dict(found.arrays)
    if found.subtracts_b_dec or found.normalisation != "none" or "threshold" not in arrays:
        sae = build(found, torch.device("cpu"), torch.float32)
        arrays = {name: value.detach() for name, value in sae.named_parameters()}
    wanted = getattr(torch, dtype) if dtype else None
    with atomic_folder(Path(target)) as folder:
        writers[to].write(found, arrays, folder, wanted)  # type: ignore[attr-defined]
        written = sorted(p.name for p in folder.iterdir())
    return written
