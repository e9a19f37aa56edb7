"""Time of every kind of page of a served dashboard, for 16k features of a million tokens.

    python benchmarks/dashboard_pages.py --folder FOLDER [--tokens 1000000] [--features 16384] [--l0 50]
        [--json dashboard-pages.json]

The latents are synthetic (features fire by Zipf's law, on repeated tokens of `pydoc`), written once, as `extract`
writes them; neighbours and logit lens are random.  Pages are requested over HTTP, each only once.  The browser's part
is measured with Chromium's own clock: from opening the page to the end of its script, and the time of a search or a
sort including layout.
"""

from __future__ import annotations

import argparse
import http.client
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gemmascope_fast.analysis.dashboard import Dashboard, collect
from gemmascope_fast.analysis.dashboard.serve import server
from gemmascope_fast.analysis.dashboard.weights import Lens
from gemmascope_fast.analysis.extraction.store import Store, Writer
from gemmascope_fast.analysis.extraction.windows import Cursor
from gemmascope_fast.analysis.pieces import Pieces
from gemmascope_fast.checkpoints.bundled import load_demo_model
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.files.results import write_json
from gemmascope_fast.training.text import pydoc_topics

DOCUMENT, SHARD = 1000, 32768  # tokens
LIMIT = 0.3  # seconds, the target
ACTIONS = {  # of the index's own script
    "search for a token": "$('search').value = 'the'; select()",
    "search for a number": "$('search').value = '77'; select()",
    "search for one letter": "$('search').value = 'e'; select()",
    "search emptied": "$('search').value = ''; select()",
    "sort by maximum": "document.querySelector('[data-by=\"2\"]').click()",
    "sort by feature": "document.querySelector('[data-by=\"0\"]').click()",
    "sort by density": "document.querySelector('[data-by=\"1\"]').click()",
    "next hundred": "$('on').click()",
}


def write_latents(folder: Path, tokenizer: Any, tokens: int, features: int, l0: int) -> None:
    """Write shards as `extract` does; does nothing if they exist already."""
    settings = {"sae": "synthetic", "model": "synthetic", "hook_name": "model.layers.12.output", "d_sae": features}
    text = np.array(tokenizer(pydoc_topics(), add_special_tokens=False)["input_ids"], np.int32)
    generator = np.random.default_rng(0)
    rate = 1 / np.arange(1, features + 1)
    cumulative = np.cumsum(rate / rate.sum())
    order = generator.permutation(features)
    with Writer(folder, settings | {"tokens": tokens, "l0": l0}, tokenizer) as store:
        if store.complete:
            return
        for index, start in enumerate(tqdm(range(0, tokens, SHARD), desc="writing latents", unit="shard")):
            at = np.arange(start, min(tokens, start + SHARD))
            tables = _tables(at, text[at % len(text)], order, cumulative, l0, generator)
            if index >= len(store.shards):
                store.write(index, tables, Cursor(int(at[-1]) // DOCUMENT + 1), int(at[-1]) + 1)
        store.finish()


def _tables(
    at: np.ndarray, ids: np.ndarray, order: np.ndarray, cumulative: np.ndarray, l0: int, generator: np.random.Generator
) -> dict[str, Any]:
    features = len(order)
    drawn = order[np.searchsorted(cumulative, generator.random(len(at) * l0)).clip(max=features - 1)]
    row, feature = np.divmod(np.unique(np.repeat(np.arange(len(at)), l0) * features + drawn), features)
    places = {"document": at // DOCUMENT, "position": at % DOCUMENT, "token_id": ids}
    begun = at[at % DOCUMENT == 0] // DOCUMENT
    value = generator.exponential(20, len(row)).astype(np.float32) + 1
    return {
        "latents": {name: column[row] for name, column in places.items()} | {"feature": feature, "value": value},
        "tokens": places | {"read": np.ones(len(at), bool)},
        "documents": {"document": begun, "source": ["synthetic"] * len(begun), "record": begun + 1},
    }


def made(folder: Path, tokenizer: Any, seconds: dict[str, float]) -> Dashboard:
    store = Store(folder)
    begin = time.perf_counter()
    with tqdm(total=2 * len(store.shards), desc="reading latents", unit="shard") as bar:
        found = collect(store, progress=bar.update)
    seconds["two passes over the shards"] = time.perf_counter() - begin
    torch.manual_seed(0)
    near = torch.randint(store.d_sae, (store.d_sae, 8)), torch.rand(store.d_sae, 8)
    ids, by = torch.randint(len(tokenizer), (2, store.d_sae, 10)), torch.rand(2, store.d_sae, 10)
    return Dashboard(store, found, Pieces(tokenizer), near, Lens(ids[0], by[0], ids[1], -by[1]))


def served(dashboard: Dashboard, seconds: dict[str, float]) -> dict[str, str]:
    """Request every kind of page; returns the index and the page of the densest feature."""
    begin = time.perf_counter()
    kept = {}
    with server(dashboard) as running:
        seconds["index made, before the server answers"] = time.perf_counter() - begin
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            connection = http.client.HTTPConnection(*running.server_address)
            kept["index"] = asked(connection, "/", "index", seconds)
            densest = np.argsort(-dashboard.collected.fired, kind="stable")
            step = max(1, len(densest) // 200)
            for name, chosen in {"the 50 densest": densest[:50], "200 of all": densest[50::step]}.items():
                for feature in chosen.tolist():
                    text = asked(connection, f"/feature/{feature}.html", f"feature page, slowest of {name}", seconds)
                    kept.setdefault("feature page", text)
            asked(connection, "/feature/99999999.html", "no such page", seconds)
        finally:
            running.shutdown()
            thread.join()
    return kept


def asked(connection: http.client.HTTPConnection, path: str, name: str, seconds: dict[str, float]) -> str:
    begin = time.perf_counter()
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    seconds[name] = max(seconds.get(name, 0.0), time.perf_counter() - begin)
    return text


def opened(pages: dict[str, str], folder: Path, seconds: dict[str, float]) -> None:
    """The browser's part of each page, and of the actions of the index's script."""
    for name, text in pages.items():
        steps = list(ACTIONS.items()) if name == "index" else []
        script = "const took = [performance.now()]; let begun; document.body.offsetHeight;"
        for _, code in steps:
            script += f"begun = performance.now(); {code}; document.body.offsetHeight;"
            script += "took.push(performance.now() - begun);"
        script += "document.title = 'took ' + took.join(' ')"
        page = folder / f"{name}.html"
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command = [*browser, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
        drawn = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()
        found = re.search(r"<title>took ([0-9. ]+)</title>", drawn)
        assert found, f"Chromium ran no script in {page}"
        for step, took in zip([f"{name} in Chromium", *dict(steps)], found[1].split(), strict=True):
            seconds[step] = float(took) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder to write the latents to")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--l0", type=int, default=50, help="features drawn a token; those drawn twice count once")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    _, tokenizer = load_demo_model()
    write_latents(args.folder, tokenizer, args.tokens, args.features, args.l0)
    before: dict[str, float] = {}
    seconds: dict[str, float] = {}
    dashboard = made(args.folder, tokenizer, before)
    pages = served(dashboard, seconds)
    before["index made"] = seconds.pop("index made, before the server answers")
    if shutil.which("chromium"):
        with tempfile.TemporaryDirectory() as folder:
            opened(pages, Path(folder), seconds)
    for name, value in seconds.items():
        print(f"{1000 * value:8.1f} ms  {name}" + (f"   over {1000 * LIMIT:.0f} ms" if value > LIMIT else ""))
    print(", ".join(f"{name}: {value:.1f} s" for name, value in before.items()))
    if args.json is not None:
        latents = sum(line["rows"]["latents"] for line in dashboard.store.shards)
        result = {"tokens": args.tokens, "features": args.features, "latents": latents, "seconds": seconds}
        result |= {"index_bytes": len(pages["index"].encode()), "before": before}
        write_json(args.json, result | {"machine": describe(torch.get_num_threads())})


if __name__ == "__main__":
    main()
