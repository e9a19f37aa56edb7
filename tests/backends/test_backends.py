"""Which implementation runs, what happens if one is missing, and what `info` says about it."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast import backends, ops
from gemmascope_fast.dev.testing import emulate_encode, same_bytes

CORE = ("encode", "decode", "sampled_dot", "csr_transpose")


def problem():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in ((5, 20), (20, 50), (50,), (50,))]


def python(code, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


def test_native_kernels_serve_the_core_ops_on_cpu():
    """A build without its extension would otherwise pass every other test in silence."""
    rows = {c.op: c for c in backends.choices() if c.device == "cpu"}
    for op in CORE:
        assert (rows[op].backend, rows[op].reason) == ("native", f"{backends.isa()} kernels")
    assert backends.NATIVE_MISSING is None
    assert {"plain", backends.isa()} <= set(backends.supported_isas())


def test_a_backend_by_name_serves_or_says_why_not():
    args = problem()
    with gsf.backend("native"):
        assert same_bytes(ops.encode(*args, None), emulate_encode(*args))
    with gsf.backend("eager"):
        z = args[0] @ args[1] + args[2]
        assert same_bytes(ops.encode(*args, None)[2], z[z > args[3].clamp(min=0)])
    if torch.cuda.is_available():
        return
    with gsf.backend("cuda"), pytest.raises(gsf.BackendError, match="backend 'cuda' cannot run encode on cpu: "):
        ops.encode(*args, None)


def test_an_unknown_backend_is_an_error_at_once():
    with pytest.raises(ValueError, match="backend: expected one of eager, native, triton, cuda, got 'fast'"):
        gsf.backend("fast").__enter__()
    assert backends.requested() is None


def test_requests_nest_and_leave_with_an_exception():
    with gsf.backend("eager"):
        with gsf.backend("native"):
            assert backends.requested() == "native"
        assert backends.requested() == "eager"
        with pytest.raises(RuntimeError, match="out"), gsf.backend("native"):
            raise RuntimeError("out")
        assert backends.requested() == "eager"
    assert backends.requested() is None


def test_a_request_is_of_its_own_thread():
    seen = []
    with gsf.backend("eager"):
        other = threading.Thread(target=lambda: seen.append(backends.requested()))
        other.start()
        other.join()
    assert seen == [None]


def test_forced_isa_is_restored_and_checked():
    before = backends.isa()
    with backends.forced_isa("plain"):
        assert backends.isa() == "plain"
    assert backends.isa() == before
    with pytest.raises(RuntimeError, match="out"), backends.forced_isa("plain"):
        raise RuntimeError("out")
    assert backends.isa() == before
    with pytest.raises(ValueError, match=f"isa: expected one of {', '.join(backends.ISAS)}, got sse9"):
        backends.forced_isa("sse9").__enter__()


ISA_PROBE = "from gemmascope_fast import backends; print(backends.isa())"


def test_environment_variable_forces_an_instruction_set():
    for name in backends.supported_isas():
        assert python(ISA_PROBE, GSF_ISA=name).stdout.strip() == name
    refused = python(ISA_PROBE, GSF_ISA="sse9")
    assert refused.returncode != 0
    assert "GSF_ISA=sse9: expected one of plain" in refused.stderr


WITHOUT_EXTENSION = """
import sys
sys.modules["gemmascope_fast._C"] = None  # importing it raises ImportError
import torch, gemmascope_fast as gsf
from gemmascope_fast import backends
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev.testing import make_activations, make_sae, support_equal
sae, x = make_sae(0, 40, 150, 12), make_activations(1, 9, 40)
y = x.clone().requires_grad_()
latents = sae.encode_sparse(y)
sae.decode(latents).sum().backward()
assert y.grad is not None and sae.W_dec.grad is not None and sae.W_enc.grad is not None
dense = torch.relu(z := x @ sae.W_enc + sae.b_enc) * (z > sae.threshold)
assert torch.equal(latents.to_dense(), dense)
bound = 160 * 2.0**-24 * (dense.abs() @ sae.W_dec.abs() + sae.b_dec.abs())  # 150 products and the bias, any order
assert bool(((sae(x) - (dense @ sae.W_dec + sae.b_dec)).abs() <= 2 * bound).all())
assert sae.prepare() is sae and sae.encode_sparse(x) == latents
assert backends.isa() is None and backends.supported_isas() == []
for refused in (lambda: backends.forced_isa("plain").__enter__(), lambda: native(x)):
    def native(x):
        with gsf.backend("native"):
            sae.encode_sparse(x)
    try:
        refused()
    except gsf.BackendError as error:
        assert "the compiled extension is missing" in str(error)
    else:
        raise AssertionError("served without the extension")
torch.library.opcheck(torch.ops.gemmascope_fast.decode.default, (latents.crow_indices, latents.col_indices,
    latents.values.detach(), sae.W_dec, sae.b_dec, None))
assert cli.main(["info", *sys.argv[1:]]) == 0
"""


def test_without_the_extension_the_reference_serves_and_info_says_so():
    done = python(WITHOUT_EXTENSION)
    assert done.returncode == 0, done.stderr
    assert "the compiled extension is missing" in " ".join(done.stdout.split())
    done = python(WITHOUT_EXTENSION.replace("*sys.argv[1:]", "'--json', '-'"))
    found = json.loads(done.stdout)
    rows = {r["op"]: r for r in found["ops"] if r["device"] == "cpu"}
    for op in CORE:
        assert rows[op]["backend"] == "eager"
        assert "the compiled extension is missing" in rows[op]["reason"]
    assert found["cpu"]["isa"] is None
    assert "missing" in found["extension_missing"]


def test_every_op_declares_its_parts():
    for name, op in ops.OPS.items():
        assert op.name == name
        assert callable(op.reference)
        assert callable(op.cost)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gemmascope_fast::{name}", "Meta")
