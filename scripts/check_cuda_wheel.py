"""What a wheel with CUDA kernels must do on a machine without a driver: import, serve the CPU, say what is missing.

python scripts/check_cuda_wheel.py        (in the environment that the wheel is installed in)
"""

import torch

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import register


def main() -> None:
    assert "site-packages" in gsf.__file__, f"not the installed package: {gsf.__file__}"
    assert register.CUDA_MISSING is None, register.CUDA_MISSING
    for op in ("encode", "decode", "splice", "matryoshka_linear"):
        assert register.compiled(op), f"gemmascope_fast_cuda::{op} holds no CUDA kernel"
    x, rows, b, theta = torch.randn(3, 20), torch.randn(40, 20), torch.randn(40), torch.rand(40)
    args = (x, rows.t(), b, theta)
    with gsf.backend("native"):
        crow, col, values = ops.encode(*args, None)
        assert ops.decode(crow, col, values, rows, b[:20], None).shape == (3, 20)
    said = []
    with gsf.backend("cuda"):
        said.append(message(gsf.errors.BackendError, lambda: ops.encode(*args, None)))
    if not torch.cuda.is_available():
        said.append(message(RuntimeError, lambda: x.cuda()))
        said.append(message((RuntimeError, ValueError), lambda: torch.ops.gemmascope_fast_cuda.encode(*args)))
    print(f"torch {torch.__version__}, no device: {not torch.cuda.is_available()}")
    print("\n".join(said))


def message(kinds, call) -> str:
    """What a call that must fail says."""
    try:
        call()
    except kinds as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    raise AssertionError("expected an error")


if __name__ == "__main__":
    main()
