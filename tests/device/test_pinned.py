"""An SAE whose encoder's rows are in pinned host memory: the CPU's bytes, and the rows stay where they are."""

import pytest
import torch

from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes


def parts(latents):
    return [latents.crow_indices.cpu(), latents.col_indices.cpu(), latents.values.cpu()]


@pytest.mark.parametrize("shape", [(1, 2304, 16384), (3, 640, 4097), (130, 641, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pinned_rows_give_the_cpu_s_bytes(shape, dtype):
    T, d, F = shape
    x = make_activations(1, T, d)
    want = make_sae(0, d, F, F / 200, dtype).encode_sparse(x)
    sae = make_sae(0, d, F, F / 200, dtype)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sae.pin_rows()
    on_device = sum(p.nbytes for name, p in sae.named_parameters() if name != "W_enc")
    assert torch.cuda.memory_allocated() - before < on_device + (1 << 20)
    assert sae.W_enc.is_pinned()
    assert same_bytes(parts(sae.encode_sparse(x.cuda())), parts(want))
    back = sae(x.cuda())
    assert back.is_cuda
    sae.to("cuda")
    assert sae.W_enc.is_cuda
    assert same_bytes(parts(sae.encode_sparse(x.cuda())), parts(want))
