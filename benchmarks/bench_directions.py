"""Benefit for the screen of removing directions from real activations: number of candidates and time.

    python benchmarks/bench_directions.py [--tokens 16,256,1024] [--json directions.json]

Uses the bundled SAE on Gemma 3 270M's activations of a text, as bench_exact.py's case `real`: without directions, with
the screen's default (massive dimensions), and with 8 principal directions of other tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from bench_exact import SECONDS, real_case
from torch import Tensor

from gemmascope_fast.dev.bench.machine import describe
from gemmascope_fast.dev.bench.timing import interleave, percentiles_ms
from gemmascope_fast.sae.jumprelu import JumpReLUSAE

FROM = 512  # tokens from here on are the sample; earlier ones are timed, also with the sample's directions


def encode(sae: JumpReLUSAE, x: Tensor) -> tuple[Tensor, ...]:
    screen = sae.screen_cache.screen
    assert screen is not None
    return screen.call(x, sae.W_enc, sae.b_enc, sae.threshold)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16,256,1024")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sae, activations = real_case()
    kinds: dict[str, dict[str, Any]] = {
        "none": {"directions": 0},
        "massive": {"directions": None},
        "8 of a sample": {"sample": activations[FROM:], "directions": 8},
    }
    saes = {name: copy.deepcopy(sae).prepare(**options) for name, options in kinds.items()}
    rows = []
    with torch.inference_mode():
        for tokens in (int(t) for t in args.tokens.split(",")):
            x = activations[:tokens]
            times = interleave({name: lambda s=own, x=x: encode(s, x) for name, own in saes.items()}, SECONDS)
            for name, own in saes.items():
                _crow, col, _values, stats = encode(own, x)
                false = (int(stats[0]) - col.numel()) / (tokens * own.d_sae)
                row = {"T": tokens, "directions": name, "false": false, "ms": percentiles_ms(times[name])[0]}
                rows.append(row)
                print(f"T={tokens} {name}: false {100 * false:.1f} %, {row['ms']:.2f} ms", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": describe(torch.get_num_threads()), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
