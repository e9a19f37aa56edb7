"""`gemmascope-fast dashboard`: pages about every feature, from extracted latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.errors import require
from gemmascope_fast.files.progress import bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Static pages of the features in a folder that `extract` wrote, or a server of the same pages."
    parser.add_argument("--latents", type=Path, required=True, metavar="FOLDER", help="what `extract` wrote")
    common.add_out(parser, "a folder of pages", "folder")
    parser.add_argument("--serve", action="store_true", help="serve the pages, each made on request, until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="of --serve; 0: any free port")
    common.add_model(parser, None, ", for the logit lens (default: the model of the extraction)")
    common.add_sae(parser, None, ", for neighbours and logit lens (default: the SAE of the extraction)")
    common.add_device(parser)
    common.add_dtype(parser)
    parser.add_argument("--no-weights", action="store_true", help="no neighbours, no logit lens; no model is loaded")
    note = "the SAE's name on Neuronpedia (default: what its checkpoint says)"
    parser.add_argument("--neuronpedia", metavar="ID", help=note)
    parser.add_argument("--top", type=int, default=20, metavar="N", help="contexts of each feature")
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.dashboard.pages import write

    require("pyarrow", "analysis", "dashboard")
    if args.out is None and not args.serve and args.json is None:
        raise ValueError("expected --out FOLDER, --serve or --json FILE")
    if args.serve:
        check_port(args.port)
    made = build(args)
    show(made)
    c = made.collected
    features = [
        {"feature": f, "fired": n, "mean": float(c.total[f] / max(n, 1)), "max": float(c.max[f])}
        for f, n in enumerate(c.fired.tolist())
    ]
    common.write_figures(args, {"tokens": made.tokens, "features": features})
    if args.out is not None:
        with bar(total=len(made), desc="pages", unit="page") as shown:
            write(made, args.out, shown.update)
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
    """ValueError for a port that cannot be served on; checked before any work."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    try:
        ThreadingHTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler).server_close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port: expected a free port (0: any), got {port}: {error}") from error


def show(made: Any) -> None:
    """The densest features in the terminal."""
    from rich.text import Text

    densest = (-made.collected.fired).argsort(kind="stable")[:10].tolist()
    rows = [(str(f), row[5], row[6], Text(" ".join(row[3]))) for f in densest for row in [made._row(f)]]
    common.print_table(("feature", "density", "maximum", "strongest on"), rows, made.title)


def build(args: argparse.Namespace) -> Any:
    """The dashboard of --latents, with what the weights say unless --no-weights."""
    from gemmascope_fast.analysis.dashboard.collect import collect
    from gemmascope_fast.analysis.dashboard.pages import Dashboard
    from gemmascope_fast.analysis.extraction.store import Store
    from gemmascope_fast.analysis.pieces import Pieces

    store = Store(args.latents)
    if not store.manifest["complete"]:
        print("The extraction is not complete: the pages cover its finished shards.")
    with bar(total=2 * len(store.shards), desc="reading latents", unit="shard") as shown:
        found = collect(store, k=args.top, progress=shown.update, cache=args.latents / "dashboard.npz")
    near = lens = None
    if not args.no_weights:
        near, lens = _weights(args, store)
    return Dashboard(store, found, Pieces(store.tokenizer()), near, lens, args.neuronpedia)


def _weights(args: argparse.Namespace, store: Any) -> tuple[Any, Any]:
    from gemmascope_fast.analysis.dashboard.weights import logit_lens, neighbours, writes_to_stream
    from gemmascope_fast.analysis.extraction.store import VERSION
    from gemmascope_fast.analysis.pair import load_model, load_sae
    from gemmascope_fast.files import identity
    from gemmascope_fast.sae.sites import Site

    name = args.sae or store.settings["sae"]
    if store.settings.get("version") != VERSION:
        raise ValueError(
            f"--latents {store.folder}: written by an older version, which did not record the weights; extract again,"
            " or use --no-weights"
        )
    sae = load_sae(name, args.sae_id or store.settings.get("sae_id"), args.device)
    if identity.of_module(sae) != store.settings["sae_fingerprint"]:
        raise ValueError(f"--sae: {name} is not the SAE that these latents come from")
    model, _ = load_model(args.model or store.settings["model"], args.device, args.dtype)
    site = sae.cfg.site_out if "transcoder" in sae.kind else None
    site = Site.from_hook_name(store.settings["hook_name"]) if site is None else site
    if not writes_to_stream(model, site):
        print(f"No logit lens: values at {site.hook_name} are not added to the residual stream.")
        return neighbours(sae.W_dec), None
    if args.model is None and identity.of_module(model) != store.settings["model_fingerprint"]:
        raise ValueError(
            f"--model: {store.settings['model']} in {args.dtype} is not the model that these latents come from;"
            " name it, or one for the logit lens"
        )
    with bar(total=len(sae.W_dec), desc="logit lens", unit="feature") as shown:
        lens = logit_lens(model, sae.W_dec, progress=shown.update, site=site)
    return neighbours(sae.W_dec), lens
