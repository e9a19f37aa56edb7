"""The parts of the vLLM plugin that need no engine; tests/vllm runs a real one."""

import pytest
import torch
from torch import nn

from gemmascope_fast import Add
from gemmascope_fast.attach.vllm import Features, RequestError, request
from gemmascope_fast.attach.vllm.features import packed
from gemmascope_fast.attach.vllm.requests import parse
from gemmascope_fast.attach.vllm.saes import About
from gemmascope_fast.attach.vllm.worker import Attached, Mounted
from gemmascope_fast.checkpoints.bundled import load_demo_sae
from gemmascope_fast.ops.latents import SparseLatents

SAES = {"res": About(0, 640, 4096)}


class _Layer(nn.Module):
    def forward(self, hidden, residual):
        return hidden, residual


def _step(asked, hidden, residual):
    """One step of two requests, with 3 and 2 rows at positions 4 and 0; the layer's output, and what each tells."""
    sae = load_demo_sae()
    layers = nn.ModuleList([_Layer()])
    attached = Attached(layers, layers, {"res": Mounted(sae, SAES["res"])})
    for name, given in asked.items():
        attached.admit(name, parse(given["gemmascope"], SAES, 9, 16), 9, 0, eos=1)
    ids = torch.arange(100, 105)
    attached.begin([("a", 0, 3, 4), ("b", 3, 2, 0)], lambda _i, first, n: ids[first : first + n])
    output = layers[0](hidden, residual)
    attached.end()
    return sae, output, attached.payloads()


def test_each_request_reads_and_changes_its_own_rows():
    hidden, residual = torch.randn(2, 5, 640, generator=torch.Generator().manual_seed(0)) * 300
    x = hidden + residual
    observed, steered = request(observe="res"), request(steer=Add(7, 50.0))
    sae, (new_hidden, new_residual), told = _step({"a": steered, "b": observed}, hidden, residual)
    features = Features()
    features.add(told["b"])
    assert features.positions().tolist() == [0, 1]
    assert features.latents() == sae.encode_sparse(x[3:])
    torch.testing.assert_close((new_hidden + new_residual)[:3], x[:3] + 50 * sae.W_dec[7])
    assert torch.equal(new_hidden[3:], hidden[3:])
    assert torch.equal(new_residual[3:], residual[3:])
    assert "rows" not in told["a"]


def test_an_observed_layer_returns_its_own_output():
    hidden, residual = torch.randn(2, 5, 640)
    _, output, _ = _step({"b": request(observe="res")}, hidden, residual)
    assert output[0] is hidden
    assert output[1] is residual


def test_the_last_computation_counts():
    first = SparseLatents.from_dense(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    again = SparseLatents.from_dense(torch.tensor([[0.0, 5.0]]))
    features = Features()
    features.add({"rows": {"res": packed(torch.tensor([0, 1]), first)}})
    features.add({"rows": {"res": packed(torch.tensor([1]), again)}})
    assert features.positions().tolist() == [0, 1]
    assert features.latents().to_dense().tolist() == [[1.0, 0.0], [0.0, 5.0]]


def test_a_stream_has_what_is_new():
    rows = SparseLatents.from_dense(torch.tensor([[1.0, 0.0]]))
    features = Features()
    features.add({"rows": {"res": packed(torch.tensor([0]), rows)}, "cached": 0})
    early = features.take()
    features.add({"rows": {"res": packed(torch.tensor([1]), rows)}})
    late = features.take()
    assert (early.positions().tolist(), late.positions().tolist()) == ([0], [1])
    early.append(late)
    assert early.positions().tolist() == [0, 1]


@pytest.mark.parametrize(
    "given",
    [{"observe": {"features": [4096]}}, {"observe": "other"}, {"observe": "res", "more": 1}, {"alarm": {"feature": 1}}],
)
def test_malformed_requests(given):
    with pytest.raises(RequestError):
        parse(given, SAES, 9, 16)
