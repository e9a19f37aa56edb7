"""`gemmascope-fast dashboard`: pages about every feature, from extracted latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli.arguments import check_outputs
from gemmascope_fast.errors import require
from gemmascope_fast.files import identity
from gemmascope_fast.files.results import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Static pages of the features in a folder that `extract` wrote, or a server of the same pages."
    parser.add_argument("--latents", type=Path, required=True, metavar="FOLDER", help="what `extract` wrote")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the pages there")
    parser.add_argument("--serve", action="store_true", help="serve them, made when they are asked for")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--model", help="for the logit lens (default: the one that was read)")
    parser.add_argument("--sae", help="for neighbours and logit lens (default: the one that was used)")
    parser.add_argument("--sae-id", help="the SAE within its repository")
    parser.add_argument("--no-weights", action="store_true", help="no neighbours, no logit lens; no model is loaded")
    parser.add_argument("--neuronpedia", metavar="ID", help="the SAE's name there (default: what its checkpoint says)")
    parser.add_argument("--top", type=int, default=20, help="contexts a feature (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the features' figures there")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.dashboard.pages import write

    require("pyarrow", "analysis", "dashboard")
    if args.out is None and not args.serve and args.json is None:
        raise ValueError("expected --out FOLDER, --serve or --json FILE")
    check_outputs(args, ("json",), ("out",))
    if args.serve:
        check_port(args.port)
    made = build(args)
    show(made)
    if args.json is not None:
        c = made.collected
        write_json(
            args.json,
            {
                "tokens": made.tokens,
                "features": [
                    {"feature": f, "fired": int(c.fired[f]), "mean": float(c.total[f] / max(int(c.fired[f]), 1)),
                     "max": float(c.max[f])}
                    for f in range(len(made))
                ],
            },
        )  # fmt: skip
    if args.out is not None:
        from tqdm import tqdm

        with tqdm(total=len(made), desc="pages", unit="page") as bar:
            write(made, args.out, bar.update)
        print(f"Pages: {args.out / 'index.html'}")
    if args.serve:
        from gemmascope_fast.analysis.dashboard.serve import server

        with server(made, port=args.port) as running:
            print(f"http://127.0.0.1:{running.server_address[1]}/  (Ctrl-C ends)", flush=True)
            try:
                running.serve_forever()
            except KeyboardInterrupt:
                print()
    return 0


def check_port(port: int) -> None:
    """ValueError where nothing can be served on it: asked before the minutes are spent."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    try:
        ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler).server_close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port: expected one that is free (0: any), got {port}: {error}") from error


def show(made: Any) -> None:
    """The densest features in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    c = made.collected
    table = Table("feature", "density", "maximum", "strongest on", title=made.title)
    for f in (-c.fired).argsort(kind="stable")[:10].tolist():
        row = made._row(f)
        table.add_row(str(f), row[5], row[6], Text(" ".join(row[3])))
    Console().print(table)


def build(args: argparse.Namespace) -> Any:
    """The dashboard of --latents, with what the weights say unless --no-weights."""
    from tqdm import tqdm

    from gemmascope_fast.analysis.dashboard.collect import collect
    from gemmascope_fast.analysis.dashboard.pages import Dashboard
    from gemmascope_fast.analysis.extraction.store import Store
    from gemmascope_fast.analysis.pieces import Pieces

    store = Store(args.latents)
    if not store.manifest["complete"]:
        print("The extraction is not complete: these are pages of its finished shards.")
    with tqdm(total=2 * len(store.shards), desc="reading latents", unit="shard") as bar:
        found = collect(store, k=args.top, progress=bar.update, cache=args.latents / "dashboard.npz")
    near = lens = None
    if not args.no_weights:
        near, lens = _weights(args, store)
    return Dashboard(store, found, Pieces(store.tokenizer()), near, lens, args.neuronpedia)


def _weights(args: argparse.Namespace, store: Any) -> tuple[Any, Any]:
    from tqdm import tqdm

    from gemmascope_fast.analysis.dashboard.weights import logit_lens, neighbours, writes_to_stream
    from gemmascope_fast.analysis.extraction.store import VERSION
    from gemmascope_fast.analysis.pair import load_model, load_sae
    from gemmascope_fast.sae.sites import Site

    name = args.sae or store.settings["sae"]
    if store.settings.get("version") != VERSION:
        raise ValueError(
            f"--latents {store.folder}: an older version wrote it, which does not say of which weights; extract anew,"
            " or take --no-weights"
        )
    sae = load_sae(name, args.sae_id or store.settings.get("sae_id"))
    if identity.of_module(sae) != store.settings["sae_fingerprint"]:
        raise ValueError(f"--sae: {name} is not the SAE that these latents come from")
    model, _ = load_model(args.model or store.settings["model"])
    site = sae.cfg.site_out if "transcoder" in sae.kind else None
    site = Site.from_hook_name(store.settings["hook_name"]) if site is None else site
    if not writes_to_stream(model, site):
        print(f"No logit lens: what is written at {site.hook_name} is not added to the residual stream.")
        return neighbours(sae.W_dec), None
    if args.model is None and identity.of_module(model) != store.settings["model_fingerprint"]:
        raise ValueError(
            f"--model: {store.settings['model']} is not the model that these latents come from; name it, or one for the"
            " logit lens"
        )
    with tqdm(total=len(sae.W_dec), desc="logit lens", unit="feature") as bar:
        lens = logit_lens(model, sae.W_dec, progress=bar.update, site=site)
    return neighbours(sae.W_dec), lens
