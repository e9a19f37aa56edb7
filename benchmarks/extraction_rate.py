"""Extraction compared with the bare model: tokens per second of `extract`, from text to checked shards.

    python benchmarks/extraction_rate.py [--tokens 12288] [--rounds 3] [--batch 2048] [--json extraction-rate.json]

Gemma 3 270M and the bundled SAE on the first tokens of `pydoc`, by paragraph.  The model is the decoder up to the layer
that the SAE reads, without the head: what extraction needs, which is less than the whole model.  It runs without hooks
on each batch again, directly after the extraction of that batch, so that conditions are equal.  The extraction's time
is everything else: tokenising, forward, SAE, Parquet, hashes, fingerprints, the check at the end.  Ratios are of sums
over all rounds, once in wall-clock seconds and once in processor seconds, which other work on the machine disturbs
less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gemmascope_fast.analysis.extraction import Document, Extractor, documents, extract, resolve
from gemmascope_fast.analysis.extraction.windows import batches, blocks, padded
from gemmascope_fast.attach.tokens import opening
from gemmascope_fast.checkpoints.bundled import load_demo
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.files.results import write_json
from gemmascope_fast.training.activations import first_layers


def first_documents(tokenizer: Any, tokens: int) -> list[Document]:
    found, seen = [], 0
    for document in documents(resolve(["pydoc"]), split="paragraph"):
        found.append(document)
        seen += len(tokenizer("".join(document.parts), add_special_tokens=False)["input_ids"])
        if seen >= tokens:
            break
    return found


def inputs(extractor: Extractor, texts: list[Document], shard: int) -> Iterator[dict[str, Any]]:
    """The arguments of each forward of the extraction, in order."""
    head = opening(extractor.tokenizer)
    for block in blocks(texts, extractor.tokenizer, window=extractor.window, size=shard):
        rows = [[*head, *window.ids] for window in block.windows]
        for batch in batches([len(row) for row in rows], extractor.batch):
            ids, mask = padded([rows[i] for i in batch], extractor.tokenizer.pad_token_id)
            yield {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})


class Stopwatch:
    """Wall-clock and processor seconds, of all threads, within its `with` blocks; read outside of them."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu


class Bare:
    """Used as the extraction's progress: after each batch, runs the model without hooks on it, timed separately."""

    def __init__(self, model: Any, layers: int, given: list[dict[str, Any]]) -> None:
        self.model, self.layers, self.given = model, layers, iter(given)
        self.watch, self.tokens = Stopwatch(), 0

    def __call__(self, tokens: int, _done: float) -> None:
        if not tokens:
            return
        with self.watch, first_layers(self.model, self.layers) as decoder, torch.inference_mode():
            decoder(**next(self.given), use_cache=False)
        self.tokens += tokens


def round_of(demo: Any, texts: list[Document], batch: int, shard: int) -> dict[str, float]:
    extractor = Extractor(demo.model, demo.tokenizer, demo.sae, batch=batch)
    bare, both = Bare(demo.model, demo.layer + 1, list(inputs(extractor, texts, shard))), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        with both:
            store = extract(extractor, lambda: texts, Path(folder) / "out", about={}, shard=shard, progress=bare)
        rows = sum(line["rows"]["latents"] for line in store.shards)
    assert next(bare.given, None) is None
    return {
        "tokens": bare.tokens,
        "l0": rows / bare.tokens,
        "model_seconds": bare.watch.wall,
        "extraction_seconds": both.wall - bare.watch.wall,
        "model_cpu_seconds": bare.watch.cpu,
        "extraction_cpu_seconds": both.cpu - bare.watch.cpu,
        "share_in_model": extractor.model_seconds / (both.wall - bare.watch.wall),
    }


def ratio(rounds: list[dict[str, float]], kind: str = "") -> float:
    """Tokens per second of the extraction divided by the model's, on the same tokens."""
    model, extraction = (sum(each[f"{name}_{kind}seconds"] for each in rounds) for name in ("model", "extraction"))
    return model / extraction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--shard", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    demo = load_demo()
    texts = first_documents(demo.tokenizer, args.tokens)
    round_of(demo, texts[:40], args.batch, args.shard)  # builds the screen, warms up the allocator
    rounds = [round_of(demo, texts, args.batch, args.shard) for _ in range(args.rounds)]
    for each in rounds:
        print(", ".join(f"{name} {value:.4g}" for name, value in each.items()))
    result = {"ratio": ratio(rounds), "cpu_ratio": ratio(rounds, "cpu_"), "batch": args.batch, "shard": args.shard}
    print(f"extraction at {result['ratio']:.1%} of the model's tokens/s; in processor time {result['cpu_ratio']:.1%}")
    if args.json is not None:
        result |= {"rounds": rounds, "machine": describe(torch.get_num_threads())}
        write_json(args.json, result)


if __name__ == "__main__":
    main()
