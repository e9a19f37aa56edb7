"""Greedy decoding of Gemma 3 270M: all linear layers and the output head at 8, 4 and 2 bits against bf16.

    python benchmarks/bench_matryoshka_decode.py [--new-tokens 24] [--rounds 3] [--json FILE]

The models take turns in one process.  The quantised one is a single model whose width is set before its turn; its
output head is a code of its own, though tied to the embedding, which stays as it is.  What an untrained model writes at
2 bits is worthless: this measures time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import gemmascope_fast as gsf
from gemmascope_fast.demo_model import load_demo_model
from gemmascope_fast.matryoshka.model import nbytes

sys.path.insert(0, str(Path(__file__).parent))
from bench_matryoshka import cpu_name

PROMPT = "The city of Bern lies on the river Aare and is known for its arcades, its fountains and"


def seconds_a_token(model, ids: torch.Tensor, new: int) -> float:
    """Of `new` tokens after the first, whose step reads the prompt."""
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
    times: dict[str, list[float]] = {"bf16": [], "8": [], "4": [], "2": []}
    sizes = {"bf16": 2 * sum(p.numel() for p in plain.parameters())}
    with torch.inference_mode():
        for round_ in range(args.rounds + 1):
            for name, found in times.items():
                if name != "bf16":
                    gsf.set_bits(coded, int(name))
                    sizes[name] = nbytes(coded)
                one = seconds_a_token(plain if name == "bf16" else coded, ids, args.new_tokens)
                if round_:  # the first warms up
                    found.append(one)
    report = {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "seconds_a_token": {name: statistics.median(found) for name, found in times.items()},
        "bytes_a_token": sizes,
    }
    base = report["seconds_a_token"]["bf16"]
    for name, one in report["seconds_a_token"].items():
        label = "bf16" if name == "bf16" else f"{name} bits"
        print(f"{label:8} {1 / one:6.1f} tokens/s   {base / one:5.2f}x bf16   {sizes[name] / 1e6:6.1f} MB of weights")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
