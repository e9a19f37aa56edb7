"""`gemmascope-fast compare conversation`: features per turn and role of a transcript, as a table and a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads a conversation turn by turn, tool results included, with one KV cache, and shows which features fire in"
        " which turn."
    )
    common.add_pair(parser)
    note = "JSON: role and content of each turn; 'demo' is bundled"
    parser.add_argument("--transcript", default="demo", metavar="FILE", help=note)
    common.add_output(parser, "--html", "write a self-contained page: the transcript, shaded by feature")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.compare.conversation import by_role, load_transcript, read_conversation
    from gemmascope_fast.checkpoints.bundled import example

    path = example(args.transcript, "talk.json")
    turns = load_transcript(path)
    model, tokenizer, sae, layer = common.load_pair(args)
    with bar(total=len(turns), desc="reading", unit="turn") as shown:
        traces = read_conversation(model, tokenizer, {(layer, "resid"): sae}, turns, shown.update)
    roles = by_role(traces)
    _show(traces, roles)
    common.write_figures(args, {"turns": [_record(trace) for trace in traces], "roles": roles})
    if args.html is not None:
        write_text(args.html, page(traces, tokenizer, f"{path.name}: layer {layer}"))
        print(f"Page: {args.html}")
    return 0


def _record(trace: Any) -> dict[str, Any]:
    top = [{"feature": f, "mean": mean, "fired": fired} for f, mean, fired in trace.top(8)]
    own = trace.latents[trace.content]
    return {"role": trace.turn.role, "tokens": own.n_rows, "l0": own.nnz / max(own.n_rows, 1), "features": top}


def _show(traces: Sequence[Any], roles: dict[str, dict[str, Any]]) -> None:
    rows: list[tuple[Any, ...]] = []
    for number, trace in enumerate(traces, 1):
        record = _record(trace)
        # no space within: a narrow terminal breaks lines between features
        top = "  ".join(f"{f['feature']}:{f['mean']:.4g}" for f in record["features"][:4])
        rows.append((str(number), record["role"], str(record["tokens"]), f"{record['l0']:.1f}", top))
    common.print_table(("turn", "role", "tokens", "L0", "strongest features:mean activation"), rows, "Turns")
    rows = []
    for role, found in roles.items():
        top = "  ".join(f"{f['feature']}:{f['rate']:.2f}/{f['elsewhere']:.2f}" for f in found["features"][:4])
        rows.append((role, str(found["tokens"]), f"{found['l0']:.1f}", top))
    more = "fires more often than in other roles, feature:rate/elsewhere"
    common.print_table(("role", "tokens", "L0", more), rows, "Roles")


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
