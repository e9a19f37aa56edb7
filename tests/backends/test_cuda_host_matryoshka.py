"""The nested-bit product in CUDA C++, compiled for the CPU: byte-equal to the native kernel, and when it is used."""

import ctypes

import pytest
import torch
from cuda_host import ORDERS, HostLibrary, MatryoshkaArgs, caught, pointer

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import matryoshka, register
from gemmascope_fast.dev.testing import same_bytes
from gemmascope_fast.ops._planes import EXTRA, MATQUANT, PREFIX
from gemmascope_fast.ops.codes import quantize
from gemmascope_fast.quant.planes import Packed


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostLibrary(tmp_path_factory.mktemp("host"))


def case(T, d, out, group=None, mode="prefix"):
    g = torch.Generator().manual_seed(T * d + out)
    packed = Packed.of(quantize(torch.randn(out, d, generator=g) * 0.05, group), mode)
    return torch.randn(T, d, generator=g), packed, torch.randn(out, generator=g), torch.randn(d, generator=g) / 4


def both(host, x, packed, bias, mean, bits, rule, order="ascending", planes=None):
    planes = list(packed.read(bits)) if planes is None else planes
    args = x, planes, packed.scale, packed.zero_point, bias, mean
    more = packed.out_features, packed.group_size or 0, bits, rule
    return host.matryoshka_linear(*args, *more, order=order), ops.matryoshka_linear(*args, None, None, *more, False)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("T", "d", "out", "group"),
    [(1, 32, 16, None), (1, 2304, 40, None), (3, 70, 17, 32), (4, 200, 33, 96), (16, 2100, 5, 64), (5, 1300, 20, 640)],
)
def test_prefix_slices_are_the_native_kernel_s_bytes(host, bits, T, d, out, group):
    problem = case(T, d, out, group)
    for order in ORDERS:
        got, want = both(host, *problem, bits, PREFIX, order)
        assert same_bytes([got], [want])


@pytest.mark.parametrize("rule", [MATQUANT, EXTRA])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [None, 32])
def test_the_paper_s_slices_are_the_native_kernel_s_bytes(host, bits, rule, group):
    got, want = both(host, *case(5, 170, 37, group, "matquant"), bits, rule)
    assert same_bytes([got], [want])


def test_all_planes_given_a_slice_reads_what_it_needs(host):
    problem = case(2, 70, 20)
    for bits in (2, 4, 6):
        got, want = both(host, *problem, bits, PREFIX, planes=list(problem[1].planes))
        assert same_bytes([got], [want])


def test_half_and_16_bit_tokens_no_bias_no_mean_and_a_flat_copy(host):
    x, packed, bias, mean = case(3, 70, 20, mode="matquant")
    for dtype in (torch.float16, torch.bfloat16):
        got, want = both(host, x.to(dtype), packed, None, mean, 8, MATQUANT)
        assert same_bytes([got], [want])
    got, want = both(host, x, packed.materialize(4), bias, None, 4, MATQUANT)
    assert same_bytes([got], [want])


def test_tokens_of_zeros_of_little_and_of_what_is_not_finite(host):
    x, packed, bias, mean = case(8, 70, 20)
    x[0], x[1], x[2], x[3] = 0.0, 1e-42, mean, 3e38
    x[4, 69], x[5, 0], x[6, 31] = float("nan"), float("inf"), -float("inf")
    got, want = both(host, x, packed, bias, None, 4, PREFIX)
    finite = x.isfinite().all(1)
    assert same_bytes([got[finite]], [want[finite]])
    assert bool(got[~finite].isnan().all())
    x[:4] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 64)  # halves go to the even code
    got, want = both(host, x[:4], packed, bias, None, 8, PREFIX)
    assert same_bytes([got], [want])


def test_offsets_beyond_2_to_the_31(host):
    """Planes of 2^31 bytes and more; pages that nobody touches are never there."""
    units, blocks = 2**11, 2**13 + 1
    block = torch.randint(0, 256, (units, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plane = torch.empty(blocks, units, 128, dtype=torch.uint8)
    assert plane.numel() > 2**31
    plane[-1] = block
    q = torch.randint(-127, 128, (1, units * 32), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    s, sums = torch.ones(1), q.sum(1, dtype=torch.int32)
    scale, zero = torch.rand(blocks, 1, 16), torch.full((blocks, 1, 16), 128, dtype=torch.uint8)
    y = torch.empty(1, blocks * 16)
    held = (ctypes.c_void_p * 5)(pointer(plane))
    args = MatryoshkaArgs(
        *[pointer(t) for t in (q, s, sums)], held, pointer(scale), pointer(zero), None, pointer(y),
        1, blocks * 16, units, 1, units, 0, 2, 2, 0, 3, 31.5,
    )  # fmt: skip
    with host.last_block_alone():
        host.call("matryoshka", args, torch.float32, "ascending")
    code = ops.matryoshka_slice([block[None]], 16, units * 32, 2, PREFIX)
    whole = (code.long() @ q[0].long() * 64 - 128 * sums.long()).float() + 31.5 * sums.float()
    assert torch.equal(y[0, -16:], scale[-1, 0] * whole)


@pytest.mark.parametrize(
    "mutation",
    [
        ("matryoshka.cu", "    sync_block();  // a row's dot comes from all warps", "    // a row's dot", "thread"),
        ("matryoshka.cu", "if (k >= a.d) return 0.0f;", "if (k > a.d) return 0.0f;", "address"),
        ("matryoshka.cu", "half = 16; half >= 4;", "half = 8; half >= 4;", "plain"),
    ],
)
def test_a_mutation_is_caught(mutation, tmp_path):
    assert caught("it", {"it": mutation}, tmp_path)


def call(T=1, bits=4, planes=None, **more):
    x, packed, bias, mean = case(T, 70, 20)
    args = dict(zip(NAMES, (x, planes or list(packed.read(bits)), packed.scale, packed.zero_point, bias, mean, None,
                            None, 20, 0, bits, PREFIX, False), strict=True))  # fmt: skip
    return tuple((args | more).values())


NAMES = (
    "x",
    "planes",
    "scale",
    "zero_point",
    "bias",
    "mean",
    "crow",
    "col",
    "out",
    "group_size",
    "bits",
    "rule",
    "exact",
)


def test_which_kernel_serves_which_call(monkeypatch):
    op = "matryoshka_linear"
    assert register.pick(op, None, call()) == "triton"  # this build holds no CUDA C++ kernels
    monkeypatch.setattr(register, "compiled", lambda name: name == op)
    assert register.choice(op) == ("cuda", register.PREFERRED[op])
    assert [register.pick(op, None, call(T)) for T in (0, 1, 4, 5, 17)] == ["cuda", "cuda", "cuda", "triton", "triton"]
    assert register.pick(op, "triton", call()) == "triton"
    assert [register.pick(op, "cuda", call(T)) for T in (1, 16)] == ["cuda", "cuda"]
    five = ops.matryoshka_pack(torch.zeros(20, 70, dtype=torch.uint8), 5)
    for args, words in (
        (call(17), "17 tokens, more than 16"),
        (call(exact=True), "fp32 activations"),
        (call(crow=torch.zeros(21), col=torch.zeros(0)), "an overflow list"),
        (call(bits=5, planes=five), "planes of 5 bits"),
    ):
        assert register.pick(op, None, args) == "triton"
        with pytest.raises(gsf.BackendError, match=f"backend 'cuda' cannot run matryoshka_linear with {words}"):
            register.pick(op, "cuda", args)
    assert matryoshka.cuda_refuses(*call(bits=7)) is None  # reads the planes of 8
    # a step of an op that was asked for in CUDA C++, of which there is no such kernel
    monkeypatch.setattr(register, "missing", lambda name, backend: None if name == op else "no kernel")
    assert register.pick("matryoshka_pack", "cuda", ()) == register.pick("matryoshka_pack", None, ())
