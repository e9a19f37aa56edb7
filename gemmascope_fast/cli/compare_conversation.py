"""`gemmascope-fast compare conversation`: features per turn and role of a transcript, as a table and a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemmascope_fast.checkpoints.bundled import example
from gemmascope_fast.cli.arguments import add_output_arguments, add_pair_arguments, check_outputs
from gemmascope_fast.files.results import write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads a conversation turn by turn, tool results included, with one KV cache, and shows what fires where."
    )
    add_pair_arguments(parser)
    parser.add_argument(
        "--transcript", default="demo", metavar="FILE", help="JSON: role and content a turn (default: bundled)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the transcript there, shaded by feature")
    add_output_arguments(parser, plot=False)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from gemmascope_fast.analysis.compare.conversation import by_role, load_transcript, read_conversation
    from gemmascope_fast.analysis.pair import load_pair

    check_outputs(args)
    path = example(args.transcript, "talk.json")
    turns = load_transcript(path)
    model, tokenizer, sae, layer = load_pair(args.model, args.sae, args.sae_id, args.layer, args.anywhere)
    with tqdm(total=len(turns), desc="reading", unit="turn") as bar:
        traces = read_conversation(model, tokenizer, {(layer, "resid"): sae}, turns, bar.update)
    roles = by_role(traces)
    _show(traces, roles)
    if args.json is not None:
        write_json(args.json, {"turns": [_record(trace) for trace in traces], "roles": roles})
    if args.html is not None:
        write_text(args.html, page(traces, tokenizer, f"{path.name}: layer {layer}"))
        print(f"Page: {args.html}")
    return 0


def _record(trace: Any) -> dict[str, Any]:
    top = [{"feature": f, "mean": mean, "fired": fired} for f, mean, fired in trace.top(8)]
    own = trace.latents[trace.content]
    return {"role": trace.turn.role, "tokens": own.n_rows, "l0": own.nnz / max(own.n_rows, 1), "features": top}


def _show(traces: Sequence[Any], roles: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("turn", "role", "tokens", "L0", "strongest features:mean activation", title="Turns")
    for number, trace in enumerate(traces, 1):
        record = _record(trace)
        # no space within: a narrow terminal breaks lines between features
        top = "  ".join(f"{f['feature']}:{f['mean']:.4g}" for f in record["features"][:4])
        table.add_row(str(number), record["role"], str(record["tokens"]), f"{record['l0']:.1f}", top)
    console.print(table)
    by = Table("role", "tokens", "L0", "fires more often than elsewhere, feature:rate/elsewhere", title="Roles")
    for role, found in roles.items():
        top = "  ".join(f"{f['feature']}:{f['rate']:.2f}/{f['elsewhere']:.2f}" for f in found["features"][:4])
        by.add_row(role, str(found["tokens"]), f"{found['l0']:.1f}", top)
    console.print(by)


def page(traces: Sequence[Any], tokenizer: Any, title: str) -> str:
    """The transcript as a self-contained page: every token of every turn, shaded by a chosen feature."""
    from gemmascope_fast.analysis.pieces import Pieces
    from gemmascope_fast.analysis.templating import render, script_data

    pieces = Pieces(tokenizer)
    turns = []
    for trace in traces:
        crow = trace.latents.crow_indices.tolist()
        col, values = trace.latents.col_indices.tolist(), trace.latents.values.tolist()
        spans = []
        for text, own in pieces.spans(trace.ids.tolist()):
            fired: dict[int, float] = {}
            read = all(bool(trace.content[i]) for i in own)
            for i in own if read else ():
                for f, v in zip(col[crow[i] : crow[i + 1]], values[crow[i] : crow[i + 1]], strict=True):
                    fired[f] = max(v, fired.get(f, v))
            spans.append({"t": text, "read": read, "f": {str(f): round(v, 3) for f, v in fired.items()}})
        turns.append({"role": trace.turn.role, "spans": spans, "top": [f for f, _, _ in trace.top(6)]})
    return render("conversation.html", title=title, data=script_data(turns))
