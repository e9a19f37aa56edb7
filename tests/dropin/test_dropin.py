"""`gsf.accelerate` without the other libraries; `make test-saelens` tests it with them."""

import types
from importlib import metadata

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import dropin


def test_what_is_no_coder_of_a_known_library_is_refused():
    with pytest.raises(TypeError, match="sae_lens, sae_bench, circuit_tracer, dictionary_learning, sparsify"):
        gsf.accelerate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("peer", dropin.PEERS)
def test_a_missing_library_is_named_with_the_versions_that_serve(peer, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ImportError, match=rf"pip install '{dropin.PEERS[peer][1]}>="):
        dropin.adapter(peer)


@pytest.mark.parametrize("version", ["6.53.1", "7.0.0", "5.0"])
def test_an_unknown_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    cls = type("StandardSAE", (), {"__module__": "sae_lens.saes.standard_sae"})
    with pytest.raises(ImportError, match=rf">=6.54,<7.0, got {version}"):
        gsf.accelerate(cls())


def test_a_known_version_loads_the_adapter_of_the_object(monkeypatch):
    adapters = {"gemmascope_fast.dropin.saelens": types.SimpleNamespace(accelerate=lambda *given: given)}
    monkeypatch.setattr(metadata, "version", lambda name: "6.54.0")
    monkeypatch.setattr(dropin, "import_module", adapters.__getitem__)
    made = type("Mine", (type("SAE", (), {"__module__": "sae_lens.saes.sae"}),), {})()
    assert gsf.accelerate(made, inplace=True) == (made, True)
