"""Op `encode_tensor` on any device: its meaning, its tolerance and its place in the SAE."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.ops.encode_tensor import tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_the_tolerance_of_fp64(dtype):
    sae, x = make_sae(0, 48, 96, 8, dtype), make_activations(1, 7, 48)
    got = sae.encode_sparse(x, precision="tensor")
    args = [t.detach() for t in (sae.W_enc, sae.b_enc)]
    z, near = x.double() @ args[0].double() + args[1].double(), tolerance(x, *args)
    tau = sae.threshold.detach().double().clamp(min=0)
    sure = (z - tau).abs() > near
    assert float(sure.double().mean()) > 0.95  # or the tolerance would decide nothing
    fired = got.to_dense() != 0
    assert torch.equal(fired[sure], (z > tau)[sure])
    # the SAE's dtype rounds the value once more
    ulp = torch.finfo(dtype).eps * z.abs()
    assert bool(((got.to_dense().double() - z).abs() <= near + ulp)[fired].all())


def test_opcheck():
    sae, x = make_sae(0, 16, 40, 4), make_activations(1, 3, 16)
    args = (x, sae.W_enc.detach(), sae.b_enc.detach(), sae.threshold.detach())
    torch.library.opcheck(torch.ops.gemmascope_fast.encode_tensor.default, args)
    args[0].requires_grad_()
    # without opcheck's own backward, which fails for any op whose first output is integer (tests/ops/test_encode.py)
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.gemmascope_fast.encode_tensor.default, args, test_utils=parts)
    crow, _, _ = ops.encode_tensor(*args)
    assert crow.shape == (4,)


def test_what_it_does_not_take():
    sae, x = make_sae(0, 16, 40, 4), make_activations(1, 3, 16)
    with pytest.raises(ValueError, match="'exact' or 'tensor', got 'fast'"):
        sae.encode_sparse(x, precision="fast")
    with pytest.raises(ValueError, match="neither screen nor bandwidth"):
        sae.encode_sparse(x, screen=True, precision="tensor")
    with pytest.raises(ValueError, match="neither screen nor bandwidth"):
        sae.encode_sparse(x, bandwidth=0.1, precision="tensor")
