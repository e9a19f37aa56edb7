"""llama.cpp decoding the same Gemma 3 270M (Q4_K_M), in a process of its own that waits while others are timed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemmascope_fast.checkpoints.bundled import MODEL_PACKAGE
from gemmascope_fast.dev.bench.engine import Unavailable

SCRIPT = """
import json, sys, time
import llama_cpp
threads = int(sys.argv[2])
model = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
print(json.dumps({"version": llama_cpp.__version__}), flush=True)
for line in sys.stdin:
    prompt, count = json.loads(line)
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    read = time.perf_counter()
    tokens = []
    for _ in range(count):
        tokens.append(model.sample(temp=0))
        model.eval(tokens[-1:])
    print(json.dumps({"read": read - start, "decoded": time.perf_counter() - read, "tokens": tokens}), flush=True)
"""


class Decoded(NamedTuple):
    """Seconds of reading the prompt, of decoding, and the tokens."""

    read: float
    decoded: float
    tokens: list[int]


class LlamaCpp:
    """Gemma 3 270M in llama.cpp on so many threads, loaded once; it answers when asked and otherwise sleeps.

    Raises ModuleNotFoundError without llama-cpp-python or the model, Unavailable where it does not run.  The process
    ends with the object.
    """

    def __init__(self, threads: int, patience: float = 600.0) -> None:
        for package in ("llama_cpp", MODEL_PACKAGE):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        self._patience = patience  # seconds for an answer: loading takes a second, the machine may be busy
        folder = tempfile.TemporaryDirectory(prefix="llama-")
        gguf = Path(importlib.import_module(MODEL_PACKAGE).assemble(Path(folder.name) / "model.gguf"))
        self.nbytes = gguf.stat().st_size
        self._errors = Path(folder.name) / "stderr"
        # threads that spin while they wait would take the cores from whoever is timed
        env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(gguf), str(threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env,
            )  # fmt: skip
        self.close = weakref.finalize(self, _end, self._process, folder)
        self.version = str(self._answer()["version"])

    def __call__(self, prompt: Sequence[int], tokens: int) -> Decoded:
        """Read the prompt (token ids) and decode so many tokens greedily, each fed back."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([list(prompt), tokens]) + "\n")
        self._process.stdin.flush()
        return Decoded(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._patience)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            said = self._errors.read_text().strip().splitlines() or ["no message"]
            self.close()
            raise Unavailable(f"failed: {said[-1]}" if ready else f"failed: no answer in {self._patience:.0f} s")
        return json.loads(line)


def _end(process: subprocess.Popen[str], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    folder.cleanup()
