"""llama.cpp's process in the benchmark: asked, answered, ended; what is missing or fails says so.  A stub stands for
llama-cpp-python, which the tests' environment does not have."""

import gc
import os
import signal
import time

import pytest

from gemmascope_fast.dev.bench import llama
from gemmascope_fast.dev.bench.engine import Unavailable

STUB = """
__version__ = "0.0.stub"
class Llama:
    def __init__(self, path, n_ctx, n_threads, n_threads_batch, verbose):
        self.size, self.threads = len(open(path).read()), n_threads
    def reset(self):
        self.seen = []
    def eval(self, tokens):
        if 13 in tokens:
            raise ValueError("thirteen")
        self.seen += tokens
    def sample(self, temp):
        assert temp == 0
        return self.seen[-1] + self.threads
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(STUB)
    (tmp_path / "tiny_gguf.py").write_text("def assemble(path):\n    path.write_text('weights')\n    return path\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(llama, "MODEL_PACKAGE", "tiny_gguf")


def gone(process):
    for _ in range(500):
        if process.poll() is not None:
            return True
        time.sleep(0.01)
    return False


def test_it_decodes_when_asked_and_ends_with_the_object(stub):
    model = llama.LlamaCpp(threads=2)
    assert model.version == "0.0.stub"
    assert model.nbytes == len("weights")
    for _ in range(2):
        found = model([5, 6], 3)
        assert found.tokens == [8, 10, 12]  # each is fed back, and the prompt anew
        assert found.read >= 0
        assert found.decoded >= 0
    process = model._process
    assert process.poll() is None
    del model
    gc.collect()
    assert gone(process)


def test_a_failure_is_told_with_what_it_said(stub):
    model = llama.LlamaCpp(threads=1)
    with pytest.raises(Unavailable, match="ValueError: thirteen"):
        model([13], 1)
    assert gone(model._process)


def test_no_answer_in_time_is_a_failure(stub):
    model = llama.LlamaCpp(threads=1, patience=60)
    model._patience = 0.2
    os.kill(model._process.pid, signal.SIGSTOP)
    with pytest.raises(Unavailable, match="no answer in"):
        model([1], 1)
    assert gone(model._process)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as error:
        llama.LlamaCpp(1)
    assert error.value.name == "llama_cpp"
