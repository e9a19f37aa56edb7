"""`gemmascope-fast convert`: write a checkpoint in another format."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.atomic import replacing_folder

FORMATS = (
    "native",
    "saelens",
    "gemma-scope-1",
    "gemma-scope-2",
    "qwen-scope",
    "llama-scope",
    "openai",
    "goodfire",
    "dictionary-learning",
    "sparsify",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=common.PLACE)
    common.add_output(parser, "target", "the folder to write", "folder")
    parser.add_argument("--sae-id", metavar="ID", help="the SAE within its repository")
    parser.add_argument("--revision", metavar="NAME", help="of the repository: a branch, tag or commit")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    choices = ("float32", "bfloat16", "float16")
    parser.add_argument("--save-dtype", choices=choices, help="type of the written arrays (default: as stored)")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.pair import sae_place

    written = convert(sae_place(args.source), args.target, args.to, args.sae_id, args.save_dtype, args.revision)
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
    """Write a checkpoint as a folder in another format; returns the names of the files written.

    Arrays are copied from file to file in blocks, unless a bias has to be folded in first.  In a folder that exists,
    files of the same names are replaced and others stay.  A kill leaves it without weights at worst, never with the
    weights of one checkpoint and the configuration of another.  Raises CheckpointError if the other format cannot
    store this checkpoint.
    """
    import torch

    from gemmascope_fast.checkpoints.loading import build, find_checkpoint
    from gemmascope_fast.errors import CheckpointError
    from gemmascope_fast.files.write import Source

    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    writer = import_module(f"gemmascope_fast.checkpoints.{to.replace('-', '_')}")
    found = find_checkpoint(source, sae_id, revision)
    if found.layers:
        raise CheckpointError(f"{found.path}: converting a {found.kind} is not supported")
    arrays: dict[str, Source] = dict(found.arrays)
    if found.subtracts_b_dec or found.normalisation != "none" or "threshold" not in arrays:
        sae = build(found, torch.device("cpu"), torch.float32)
        arrays = {name: value.detach() for name, value in sae.named_parameters()}
    wanted = getattr(torch, dtype) if dtype else None
    with replacing_folder(Path(target).resolve()) as folder:
        writer.write(found, arrays, folder, wanted)
        written = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return written
