"""One vLLM engine for all tests of this folder, in this process, with a small KV cache."""

import os

# before vllm is imported
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import pytest
import torch
from engine import Engine


@pytest.fixture(scope="session")
def engine():
    return Engine()


@pytest.fixture(scope="session")
def reference():
    """The same model in transformers, fp32."""
    from gemmascope_fast.checkpoints.bundled import load_demo_model

    model, _ = load_demo_model()
    return model


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test, no process-wide state of a request is left (a finished one is dropped with the next step)."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        engine.generate([[2, 3, 4]], None, max_tokens=1)
        assert engine.attached.live == {} or set(engine.attached.live) <= engine.finished()
        assert engine.scheduler.__dict__.get("_gemmascope", {}) == {}
        assert engine.llm.llm_engine.output_processor.request_states == {}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
