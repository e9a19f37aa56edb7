"""The cases and peers shared by tests, `gemmascope-fast dev bench` and the pytest-benchmark files here.

They are in the package (gemmascope_fast/dev/bench/cases.py, peers.py), so that an installed package can be timed too.
This file adds which of them `make bench` uses: GSF_BENCH_CASES=640x4096,2304x65536 selects others.
"""

from __future__ import annotations

import os

from gemmascope_fast.dev.bench.cases import CASES, FEW_TOKENS, Case, copies, rotated
from gemmascope_fast.dev.bench.peers import compiled_sae, eager_decode, eager_encode, eager_sae, embedding_bag_decode

__all__ = [
    "CASES",
    "FEW_TOKENS",
    "IDS",
    "RUNS",
    "Case",
    "compiled_sae",
    "copies",
    "eager_decode",
    "eager_encode",
    "eager_sae",
    "embedding_bag_decode",
    "rotated",
]

CHOSEN = os.environ.get("GSF_BENCH_CASES", "640x4096,2304x16384").split(",")
TOKENS = (1, 16, 256)
RUNS = [(CASES[name], tokens) for name in CHOSEN for tokens in CASES[name].tokens if tokens in TOKENS]
IDS = [f"{case.name}-T{tokens}" for case, tokens in RUNS]
