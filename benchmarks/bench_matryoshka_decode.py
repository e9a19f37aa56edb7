"""Greedy decoding of Gemma 3 270M: all linear layers and the output head at 8, 4 and 2 bits, bf16, and llama.cpp.

    python benchmarks/bench_matryoshka_decode.py [--new-tokens 24] [--rounds 3] [--json FILE]

The models take turns.  The quantised one is a single model whose width is set before its turn. Its output head has its
own code, although it was tied to the embedding, which is not quantised.  The text of an untrained model at 2 bits is
useless: only time is measured.  llama.cpp decodes the file that the model comes from (Q4_K_M, 4 to 6 bits a weight) in
a separate process, with the same threads and prompt; if llama-cpp-python is not installed, it is listed as missing
(`make bench-peers`).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.bundled import load_demo_model
from gemmascope_fast.dev.bench.engine import Unavailable
from gemmascope_fast.dev.bench.llama import LlamaCpp
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.quant.model import nbytes

PROMPT = "The city of Bern lies on the river Aare and is known for its arcades, its fountains and"
LLAMA = "llama.cpp Q4_K_M"


def seconds_a_token(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds for `new` tokens after the first, whose step reads the prompt."""
    times: list[float] = []

    def stamp(*_: object) -> None:
        times.append(time.perf_counter())

    handle = model.register_forward_pre_hook(stamp)
    try:
        model.generate(ids, max_new_tokens=new + 1, min_new_tokens=new + 1, do_sample=False)
        end = time.perf_counter()
    finally:
        handle.remove()
    return (end - times[1]) / (len(times) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    plain = model.to(torch.bfloat16)
    coded = gsf.quantize_(copy.deepcopy(plain), "all-linear", head=True)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    new = args.new_tokens

    def at(bits: int) -> float:
        gsf.set_bits(coded, bits)
        return seconds_a_token(coded, ids, new)

    calls: dict[str, Callable[[], float]] = {"bf16": lambda: seconds_a_token(plain, ids, new)}
    calls |= {f"{bits} bits": lambda bits=bits: at(bits) for bits in (8, 4, 2)}
    sizes = {"bf16": 2 * sum(p.numel() for p in plain.parameters())}
    for bits in (8, 4, 2):
        gsf.set_bits(coded, bits)
        sizes[f"{bits} bits"] = nbytes(coded)
    missing: dict[str, str] = {}
    try:
        llama = LlamaCpp(torch.get_num_threads())
        calls[LLAMA] = lambda: llama(ids[0].tolist(), new).decoded / new
        sizes[LLAMA] = llama.nbytes
    except ModuleNotFoundError as error:
        missing[LLAMA] = f"not installed: {error.name}"
    except Unavailable as error:
        missing[LLAMA] = str(error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for round_ in range(args.rounds + 1):
            for name, call in calls.items():
                one = call()
                if round_:  # the first warms up
                    times[name].append(one)
    report = {
        "machine": describe(torch.get_num_threads()),
        "seconds_a_token": {name: statistics.median(found) for name, found in times.items()},
        "bytes_a_token": sizes,
        "missing": missing,
    }
    base = report["seconds_a_token"]["bf16"]
    for name, one in report["seconds_a_token"].items():
        size = sizes[name] / 1e6
        print(f"{name:16} {1 / one:6.1f} tokens/s   {base / one:5.2f}x bf16   {size:6.1f} MB of weights")
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
