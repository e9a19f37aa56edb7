"""Every GPU kernel on the device: exact ones byte for byte against the native CPU kernels, tensor mode within its
tolerance, fixed-capacity forms inside a CUDA graph."""

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.attach.fused import edit_table
from gemmascope_fast.backends.gpu import decode as gpu_decode
from gemmascope_fast.backends.gpu import encode as gpu_encode
from gemmascope_fast.backends.gpu import loop, register
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes
from gemmascope_fast.ops.encode_tensor import tolerance

BACKENDS = ["triton", *(["cuda"] if register.compiled("encode") else [])]
SHAPES = [(1, 2304, 16384), (3, 640, 4097), (16, 2304, 4096), (130, 641, 4096), (1024, 640, 4096)]


def shape_id(shape):
    """scripts/gpu.sh picks shapes by these names."""
    return "-".join(map(str, shape))


def case(T, d, F, dtype=torch.float32):
    sae = make_sae(0, d, F, F / 200, dtype)
    return sae, make_activations(1, T, d)


def on_gpu(*tensors):
    return [t.detach().cuda() for t in tensors]


def cpu(tensors):
    return [t.cpu() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_and_decode_are_the_cpu_s(backend, shape, dtype):
    sae, x = case(*shape, dtype)
    args = (x, sae.W_enc.detach(), sae.b_enc.detach(), sae.threshold.detach())
    want = ops.encode(*args, None)
    out = ops.decode(*want, sae.W_dec.detach(), sae.b_dec.detach(), None)
    with gsf.backend(backend):
        got = ops.encode(*on_gpu(*args), None)
        back = ops.decode(*got, *on_gpu(sae.W_dec, sae.b_dec), None)
    assert same_bytes(cpu(got), want)
    assert same_bytes([back.cpu()], [out])


@pytest.mark.parametrize("shape", SHAPES[:4], ids=shape_id)
def test_gradients_are_the_cpu_s(shape):
    found = []
    for device in ("cpu", "cuda"):
        sae, x = case(*shape)
        sae, x = sae.to(device), x.to(device).requires_grad_()
        sae(x).square().sum().backward()
        found.append(cpu([x.grad, sae.W_enc.grad, sae.W_dec.grad]))
    assert same_bytes(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=shape_id)
def test_tensor_mode_is_within_its_tolerance(shape, dtype):
    sae, x = case(*shape, dtype)
    args = (x, sae.W_enc.detach(), sae.b_enc.detach(), sae.threshold.detach())
    crow, col, values = cpu(ops.encode_tensor(*on_gpu(*args)))
    z = x.double() @ args[1].double() + args[2].double()
    near, row = tolerance(*args[:3]), torch.repeat_interleave(torch.arange(len(x)), crow.diff())
    fired = torch.zeros_like(z, dtype=torch.bool)
    fired[row, col.long()] = True
    tau = args[3].double().clamp(min=0)
    sure = (z - tau).abs() > near
    assert torch.equal(fired[sure], (z > tau)[sure])
    assert bool(((values.double() - z[row, col.long()]).abs() <= near[row, col.long()]).all())


@pytest.mark.parametrize("T", [1, 16])
@pytest.mark.parametrize("error", [False, True])
def test_the_fused_loop_in_a_cuda_graph(T, error):
    from gemmascope_fast.attach import Add, Clamp

    sae, x = case(T, 2304, 4096)
    weights = [sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec]
    table = edit_table([Clamp(5, 100.0), Add(9, 3.0)], 4096, "cuda")
    args = on_gpu(x, *weights)
    want, latents = loop.splice(*args, table, error)
    torch.cuda.synchronize()
    graph, still = torch.cuda.CUDAGraph(), args[0]
    with torch.cuda.graph(graph):
        out, inside = loop.splice(*args, table, error)
    still.copy_(2 * x)
    graph.replay()
    fresh, again = loop.splice(*args, table, error)
    assert same_bytes([out.cpu()], [fresh.cpu()])
    assert same_bytes([inside.sparse().values.cpu()], [again.sparse().values.cpu()])
    with gsf.backend("triton"):
        by_triton, _ = loop.splice(args[0], *args[1:], table, error)
    assert same_bytes([by_triton.cpu()], [fresh.cpu()])
    assert want.shape == fresh.shape
    assert latents.capacity == T * 4096


def test_an_overflow_in_a_graph_is_never_silent():
    sae, x = case(16, 640, 4096)
    args = on_gpu(x, sae.W_enc, sae.b_enc, sae.threshold)
    count = ops.encode(*args, None)[1].numel()
    fixed = gpu_encode.encode_fixed(*args, count - 1)
    out = gpu_decode.decode_fixed(fixed, *on_gpu(sae.W_dec, sae.b_dec))
    assert bool(fixed.overflow)
    assert bool(out[-1].isnan().all())
    with pytest.raises(gsf.errors.BackendError, match="do not fit"):
        fixed.sparse()
