"""Greedy generation with Gemma 3 270M: all linear layers and the output head at 8, 4 and 2 bits, bf16, and llama.cpp.

    python benchmarks/matryoshka_decode.py [--new-tokens 24] [--seconds 60] [--json FILE]

The models take turns.  The quantised one is a single model whose width is set before its turn. Its output head has its
own code, although it was tied to the embedding, which is not quantised.  The text of an untrained model at 2 bits is
useless: only time is measured.  llama.cpp decodes the file that the model comes from (Q4_K_M, 4 to 6 bits a weight) in
a separate process, with the same threads and prompt; if llama-cpp-python is not installed, it is listed as missing
(`make bench-peers`).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.bundled import load_demo_model
from gemmascope_fast.dev.bench.engine import Unavailable
from gemmascope_fast.dev.bench.llama import LlamaCpp
from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.dev.bench.suite_loop import seconds_a_token
from gemmascope_fast.dev.bench.timing import Seconds, interleave, percentiles_ms
from gemmascope_fast.files.results import write_json
from gemmascope_fast.quant.model import nbytes

PROMPT = "The city of Bern lies on the river Aare and is known for its arcades, its fountains and"
LLAMA = "llama.cpp Q4_K_M"
WIDTHS = (8, 4, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60, help="of all together; at least seven turns")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    plain = model.to(torch.bfloat16)
    coded = gsf.quantize_(copy.deepcopy(plain), "all-linear", head=True)
    ids, new = tokenizer(PROMPT, return_tensors="pt")["input_ids"], args.new_tokens

    def at(bits: int) -> Seconds:
        gsf.set_bits(coded, bits)
        return seconds_a_token(coded, ids, new)

    calls: dict[str, Callable[[], Seconds]] = {"bf16": lambda: seconds_a_token(plain, ids, new)}
    calls |= {f"{bits} bits": lambda bits=bits: at(bits) for bits in WIDTHS}
    sizes = {"bf16": 2 * sum(p.numel() for p in plain.parameters())}
    for bits in WIDTHS:
        gsf.set_bits(coded, bits)
        sizes[f"{bits} bits"] = nbytes(coded)
    missing: dict[str, str] = {}
    try:
        llama = LlamaCpp(torch.get_num_threads())
        calls[LLAMA] = lambda: Seconds(llama(ids[0].tolist(), new).decoded / new)
        sizes[LLAMA] = llama.nbytes
    except ModuleNotFoundError as error:
        missing[LLAMA] = f"not installed: {error.name}"
    except Unavailable as error:
        missing[LLAMA] = str(error)
    with torch.inference_mode():
        times = interleave(calls, args.seconds)
    seconds = {name: percentiles_ms(found)[0] / 1e3 for name, found in times.items()}
    for name, one in seconds.items():
        print(
            f"{name:16} {1 / one:6.1f} tokens/s   {seconds['bf16'] / one:5.2f}x bf16"
            f"   {sizes[name] / 1e6:6.1f} MB of weights"
        )
    for name, why in missing.items():
        print(f"missing: {name}: {why}")
    if args.json:
        machine = describe(torch.get_num_threads())
        report = {"machine": machine, "seconds_a_token": seconds, "bytes_a_token": sizes, "missing": missing}
        write_json(args.json, report)


if __name__ == "__main__":
    main()
