"""llama.cpp decoding the same Gemma 3 270M (Q4_K_M), in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gemmascope_fast.bench.rows import Row
from gemmascope_fast.bench.timing import percentiles_ms
from gemmascope_fast.demo_model import MODEL_PACKAGE

SCRIPT = """
import json, sys, time
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[2]), verbose=False)
count, times = int(sys.argv[3]), []
for _ in range(8):
    model.reset()
    model.eval(model.tokenize(b"The history of the sea is also a history of trade, and of the people"))
    start = time.perf_counter()
    for _ in range(count):
        model.eval([model.sample(temp=0)])
    times.append(time.perf_counter() - start)
print(json.dumps(times[1:]))
"""


def llama_row(threads: int, tokens: int = 16) -> tuple[Row | None, str | None]:
    """(row, None), or (None, why not)."""
    for package in ("llama_cpp", MODEL_PACKAGE):
        if importlib.util.find_spec(package) is None:
            return None, f"not installed: {package}"
    with tempfile.TemporaryDirectory() as folder:
        gguf = importlib.import_module(MODEL_PACKAGE).assemble(Path(folder) / "model.gguf")
        command = [sys.executable, "-c", SCRIPT, str(gguf), str(threads), str(tokens)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            return None, "failed: no answer in 300 s"
    if done.returncode:
        return None, f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    median, p20, p80 = percentiles_ms(np.array(json.loads(done.stdout.splitlines()[-1])))
    row = Row(
        "loop", "generate", "llama.cpp, model alone", tokens, 640, 0, None, "q4_k_m", threads, median, p20, p80,
        None, None, None, None, None, None,
    )  # fmt: skip
    return row, None
