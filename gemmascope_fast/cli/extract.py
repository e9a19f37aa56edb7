"""`gemmascope-fast extract`: latents of any amount of text as Parquet shards; a stopped run continues."""

from __future__ import annotations

import argparse
import time
from typing import Any

from gemmascope_fast.cli import arguments as common
from gemmascope_fast.errors import require
from gemmascope_fast.files.progress import bar
from gemmascope_fast.files.results import shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads texts through the model and writes every latent as Parquet: document, position, token_id, feature,"
        " value.  To continue an extraction that was stopped, run the same command again."
    )
    common.add_pair(parser)
    common.add_documents(parser, "file")
    common.add_out(parser, "a folder of shards; continues what is there", "kept folder", required=True)
    common.add_window(parser)
    parser.add_argument("--batch", type=int, default=2048, metavar="N", help="tokens of a forward, padding included")
    parser.add_argument("--shard", type=int, default=32768, metavar="N", help="tokens of a shard")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: workers on Ray Data")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of --engine ray")
    parser.add_argument("--repair", action="store_true", help="only write damaged shards again")
    parser.add_argument("--check", action="store_true", help="only compare the files in --out with their manifest")
    common.add_json(parser)
    common.add_plot(parser, "the firing frequencies")


def run(args: argparse.Namespace) -> int:
    from gemmascope_fast.analysis.extraction.store import Store
    from gemmascope_fast.analysis.pair import full_names

    require("pyarrow", "analysis", "extract")
    if args.check:
        store = Store(args.out)
        store.check()
        figures: dict[str, Any] = {}
    else:
        store, figures = _extract(args)
    figures = {"out": str(args.out), "complete": store.manifest["complete"], **_figures(store), **figures}
    title = f"{full_names(store.settings)[1]} at {store.settings['hook_name']}"
    common.print_table(("figure", "value"), [(key, shown(value)) for key, value in figures.items()], title)
    common.write_figures(args, figures | {"settings": store.settings})
    if args.plot is not None:
        from gemmascope_fast.cli.eval import plot_frequencies

        title = f"{figures['tokens']} tokens, L0 {figures['l0']:.1f}"
        plot_frequencies(firing(store).double() / max(store.tokens, 1), args.plot, title)
    return 0


def _figures(store: Any) -> dict[str, Any]:
    rows = sum(shard["rows"]["latents"] for shard in store.shards)
    sizes = sum(path.stat().st_size for table in ("latents", "tokens", "documents") for path in store.paths(table))
    return {
        "documents": sum(shard["rows"]["documents"] for shard in store.shards),
        "tokens": store.tokens,
        "latents": rows,
        "l0": rows / max(store.tokens, 1),
        "shards": len(store.shards),
        "megabytes": sizes / 1e6,
    }


def firing(store: Any) -> Any:
    """int64 [d_sae]: tokens on which each feature fired."""
    import torch

    total = torch.zeros(store.d_sae, dtype=torch.int64)
    for i in range(len(store.shards)):
        features = torch.from_numpy(store.read("latents", i, ["feature"])["feature"].astype("int64"))
        total += torch.bincount(features, minlength=store.d_sae)
    return total


def sites_of(sae: Any, layer: int | None, anywhere: bool = False) -> Any:
    """`saes` of attach: the SAE at its own site, or at the given layer, which `anywhere` makes its own.

    ValueError where neither names a site, AttachError where they name different ones.
    """
    from gemmascope_fast.attach.entries import entries
    from gemmascope_fast.attach.origin import move

    if anywhere:
        move(sae.cfg, layer)
    if layer is None and sae.cfg.site is None:
        raise ValueError("--layer: expected a layer number, for the checkpoint names no site")
    sites = sae if layer is None else {layer: sae}
    entries(sites)
    return sites


def make_extractor(
    model: str, sae: str, sae_id: str | None, layer: int | None, window: int, batch: int, device: str, dtype: str,
    anywhere: bool = False,
) -> Any:  # fmt: skip
    """The Extractor of a command line, here or on a worker."""
    from gemmascope_fast.analysis.extraction.run import Extractor
    from gemmascope_fast.analysis.pair import load_model, load_sae

    coder = load_sae(sae, sae_id, device)
    sites = sites_of(coder, layer, anywhere)
    loaded, tokenizer = load_model(model, device, dtype)
    return Extractor(loaded, tokenizer, sites, window, batch)


def _extract(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from functools import partial

    from gemmascope_fast.analysis.extraction.run import extract
    from gemmascope_fast.analysis.extraction.sources import documents, resolve
    from gemmascope_fast.analysis.pair import check_device
    from gemmascope_fast.attach.entries import entries

    sources = resolve(args.text)  # bad input is found before any work
    if args.engine == "ray":
        require("ray", "ray", "--engine ray")
    check_device(args.device)
    make = partial(
        make_extractor, args.model, args.sae, args.sae_id, args.layer, args.window, args.batch, args.device,
        args.dtype, args.anywhere,
    )  # fmt: skip
    extractor = make()
    engine = None
    if args.engine == "ray":
        import torch

        from gemmascope_fast.analysis.extraction.ray_engine import RayEngine

        engine = RayEngine(make, args.workers, torch.get_num_threads())
    (entry,) = entries(extractor.sites)
    sae: Any = entry.coder
    about = {
        "model": args.model, "sae": args.sae, "sae_id": args.sae_id, "text": args.text, "column": args.column,
        "split": args.split, "neuronpedia_id": sae.cfg.metadata.neuronpedia_id,
    }  # fmt: skip
    reading = Bar(sum(s.size or 0 for s in sources) if all(s.size is not None for s in sources) else None)
    begin = time.perf_counter()
    try:
        store = extract(
            extractor, lambda: documents(sources, args.column, args.split), args.out, about=about, shard=args.shard,
            progress=reading, repair=args.repair, engine=engine,
        )  # fmt: skip
    finally:
        reading.close()
    seconds = time.perf_counter() - begin
    share = {"model_share_of_time": extractor.model_seconds / seconds} if reading.tokens and engine is None else {}
    return store, {"seconds": seconds, "tokens_this_time": reading.tokens, **reading.rate(seconds), **share}


class Bar:
    """Progress in bytes of the sources, with tokens a second and, where the sources' size is known, the time left."""

    def __init__(self, total: int | None) -> None:
        self.total, self.tokens = total, 0
        self._bar: Any = None
        self._begin = time.perf_counter()

    def __call__(self, tokens: int, done: float) -> None:
        if self._bar is None:
            # what was read before a resume took none of this run's time
            self._bar = bar(total=self.total, initial=done, desc="reading", unit="B", unit_scale=True)
            self._begin = time.perf_counter()
        self.tokens += tokens
        if self.tokens:
            rate = self.tokens / (time.perf_counter() - self._begin)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(max(0, done - self._bar.n))

    def rate(self, seconds: float) -> dict[str, float]:
        return {"tokens_per_second": self.tokens / seconds} if self.tokens else {}

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
