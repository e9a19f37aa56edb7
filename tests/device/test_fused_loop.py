"""attach on the device: the fused loop serves decoded tokens, in the bytes of the steps that it replaces."""

import sys
from pathlib import Path

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import Site
from gemmascope_fast.attach import Add, Clamp, MinClamp
from gemmascope_fast.attach.fused import Fused
from gemmascope_fast.backends.gpu import loop, register
from gemmascope_fast.dev.testing import same_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
import attach_models as models

BACKENDS = ["triton", *(["cuda"] if register.compiled("splice") else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["splice", "splice+error"])
def test_the_fused_loop_serves_in_the_bytes_of_the_steps(backend, mode, monkeypatch):
    model, sae = models.gemma3().cuda(), models.sae(site=Site("resid", 1)).cuda()
    ids, runs, splice = models.ids(1, 9).cuda(), [], loop.splice
    monkeypatch.setattr(loop, "splice", lambda x, *args, **more: (runs.append(len(x)), splice(x, *args, **more))[1])

    def logits_and_latents():
        edits = [Clamp(3, 2.0), Add(7, -0.5), MinClamp(9, 0.5)]
        with torch.no_grad(), gsf.backend(backend), gsf.attach(model, sae, mode=mode, edits=edits, tokens="all") as run:
            parts = [model(ids).logits, model(ids[:, :1]).logits]
        (latents,) = run.latents.values()
        return [t.cpu() for t in (*parts, latents.crow_indices, latents.col_indices, latents.values)]

    fused = logits_and_latents()
    assert runs == [9, 1]
    monkeypatch.setattr(Fused, "_serves", lambda *_: False)
    assert same_bytes(fused, logits_and_latents())
    assert runs == [9, 1]
