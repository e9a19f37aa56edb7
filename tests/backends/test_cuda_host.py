"""The CUDA sources, compiled for the CPU: byte-equal to the native kernels in every order of threads, without findings
of ThreadSanitizer and AddressSanitizer, and with findings if a barrier, a bound or a lane is removed."""

import pytest
import torch
from cuda_host import (
    MAIN,
    ORDERS,
    SLOTS,
    DecodeArgs,
    EncodeArgs,
    GatherArgs,
    HostLibrary,
    build_program,
    caught,
    pointer,
    run_program,
)

from gemmascope_fast import ops
from gemmascope_fast.attach import Ablate, Add, Clamp, MinClamp, Scale
from gemmascope_fast.attach.fused import edit_table
from gemmascope_fast.dev.testing import same_bytes

SHAPES = [(1, 33, 70), (4, 16, 32), (6, 17, 131), (8, 64, 31), (9, 65, 40), (33, 20, 97)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostLibrary(tmp_path_factory.mktemp("host"))


def case(T, d, F, dtype=torch.float32):
    g = torch.Generator().manual_seed(T * d + F)
    x, rows = torch.randn(T, d, generator=g), torch.randn(F, d, generator=g)
    b, theta = torch.randn(F, generator=g), torch.rand(F, generator=g) * 2 - 0.5
    return x.to(dtype), rows.to(dtype).t(), b.to(dtype), theta.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encode_and_decode_equal_the_native_kernels(host, shape, dtype):
    args = case(*shape, dtype=dtype)
    want = ops.encode(*args, None)
    rows = args[1].t().contiguous()
    bias = torch.randn(shape[1])
    out = ops.decode(*want, rows, bias, None)
    for order in ORDERS:
        for scan in (False, True):
            assert same_bytes(host.encode(*args, order=order, scan=scan), want)
        assert same_bytes([host.decode(*want, rows, bias, order=order)], [out])


@pytest.mark.parametrize("T", [1, 3, 40])
def test_int8_rows_and_a_scale(host, T):
    crow, col, values = ops.encode(*case(T, 20, 97), None)
    g = torch.Generator().manual_seed(0)
    rows, scale = torch.randint(-127, 128, (97, 45), dtype=torch.int8, generator=g), torch.rand(97, generator=g)
    got = host.decode(crow, col, values, rows, None, scale)
    assert same_bytes([got], [ops.decode(crow, col, values, rows, None, scale)])


@pytest.mark.parametrize("T", [1, 8, 33])
def test_every_feature_and_no_feature(host, T):
    x, W, b, theta = case(T, 20, 300)
    for shift in (100.0, -100.0):
        want = ops.encode(x, W, b + shift, theta, None)
        assert want[1].numel() == (T * 300 if shift > 0 else 0)
        assert same_bytes(host.encode(x, W, b + shift, theta), want)


def test_nan_infinity_and_bandwidth(host):
    x, W, b, theta = case(9, 20, 67)
    x[1, 3], x[2, 5], x[3, 19], x[4, 0], x[4, 1] = float("nan"), float("inf"), -float("inf"), float("inf"), 3e38
    assert same_bytes(host.encode(x, W, b, theta), ops.encode(x, W, b, theta, None))
    assert same_bytes(host.encode(x, W, b, theta, 0.5), ops.encode(x, W, b, theta, 0.5))


def test_more_words_than_a_block(host):
    args = case(2, 5, 32 * 300 + 7)
    assert same_bytes(host.encode(*args), ops.encode(*args, None))


@pytest.mark.parametrize("T", [2, 40])
def test_a_short_capacity_never_passes_in_silence(host, T):
    args = case(T, 20, 97)
    rows = args[1].t().contiguous()
    crow, col, values = ops.encode(*args, None)
    cut = col.numel() - 1
    short = host.encode(*args, capacity=cut)
    assert same_bytes(short, (crow, col[:-1], values[:-1]))  # the offsets stay the true ones
    got = host.decode(*short, rows)
    assert same_bytes([got[:-1]], [ops.decode(crow, col, values, rows, None, None)[:-1]])
    assert bool(got[-1].isnan().all())


def test_offsets_beyond_2_to_the_31(host):
    """T * d_sae of 2^34, slots alone 2^31 numbers.  Pages that nobody touches are never there: the last block of each
    grid runs alone, whose offsets are the largest."""
    T, F, d = 2**17 + 1, 2**17, 16
    g = torch.Generator().manual_seed(0)
    rows, bias, theta = torch.randn(F, d, generator=g), torch.randn(F, generator=g), torch.rand(F, generator=g)
    x = torch.zeros(T, d)
    x[-1] = torch.randn(d, generator=g)
    words = F // 32
    bitmap, count = (torch.empty(T, words, dtype=torch.int32) for _ in range(2))
    slots = torch.empty(T, words, SLOTS)
    assert slots.numel() > 2**31
    e = EncodeArgs(*[pointer(t) for t in (x, rows, bias, theta, bitmap, count, slots)], T, F, d, words, 0.0)
    tail = slice(F - 32, F)
    _, col, values = ops.encode(x[-1:], rows[tail].t(), bias[tail], theta[tail], None)
    with host.last_block_alone():
        host.call("encode", e, torch.float32, "ascending")
        assert int(count[-1, -1]) == len(col) > SLOTS
        assert [i for i in range(32) if int(bitmap[-1, -1]) >> i & 1] == col.tolist()
        assert torch.equal(slots[-1, -1], values[:SLOTS])

        count[-1, -257:-1], bitmap[-1, -257:-1] = 0, 0
        total = torch.empty(T * words, dtype=torch.int64)
        total[-257] = 7
        crow = torch.empty(T + 1, dtype=torch.int64)
        gathered = torch.empty(7 + len(col), dtype=torch.int32), torch.empty(7 + len(col))
        held = [pointer(t) for t in (total, crow, *gathered)]
        host.call("gather", GatherArgs(e, *held, 7 + len(col)), torch.float32, "ascending")
    assert int(crow[-1]) == 7 + len(col)
    assert torch.equal(gathered[0][7:], col + F - 32)
    assert torch.equal(gathered[1][7:], values)  # also those beyond the slots, whose dots come again

    n = 2**31 // 64 + 1  # rows of a decode
    out = torch.empty(n, 64)
    crow = torch.empty(n + 1, dtype=torch.int64)
    crow[-2:] = torch.tensor([0, 3])
    col, values = torch.tensor([1, 4, 9], dtype=torch.int32), torch.randn(3)
    W_dec = torch.randn(10, 64)
    held = [pointer(t) for t in (crow, col, values, W_dec, None, None, out)]
    with host.last_block_alone():
        host.call("decode", DecodeArgs(*held, n, 64, 3), torch.float32, "ascending")
    assert torch.equal(out[-1:], ops.decode(torch.tensor([0, 3]), col, values, W_dec, None, None))


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize(("T", "F", "dtype"), [(1, 70, torch.float32), (16, 40, torch.bfloat16)])
def test_the_fused_loop(host, T, F, dtype, error):
    args = case(T, 33, F, dtype)
    W_dec, b_dec = torch.randn(F, 33).to(dtype), torch.randn(33).to(dtype)
    table = edit_table([Ablate(0), Scale(3, 2.5), Clamp(5, 1.5), Add([7, 31], -0.75), MinClamp(9, 0.5)], F)
    columns = (table.features, table.kind, table.amount)
    csr = ops.encode(*args, None)
    base = args[0].float() if error else ops.decode(*csr, W_dec, b_dec, None)
    old = torch.zeros(T, F)
    old[torch.repeat_interleave(torch.arange(T), csr[0].diff()), csr[1].long()] = csr[2]
    delta = torch.zeros(T, F)
    delta[:, 0], delta[:, 3], delta[:, 5] = -old[:, 0], old[:, 3] * 2.5 - old[:, 3], 1.5 - old[:, 5]
    delta[:, 7] = delta[:, 31] = -0.75
    delta[:, 9] = torch.where(old[:, 9] < 0.5, 0.5 - old[:, 9], 0.0)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (delta != 0).sum(1).cumsum(0)])
    extra = ops.decode(crow, delta.nonzero()[:, 1].int(), delta[delta != 0], W_dec, None, None)
    for order in ORDERS:
        out, got = host.splice(*args, W_dec, b_dec, columns, error, order)
        nnz = csr[1].numel()
        assert same_bytes((got[0], got[1][:nnz], got[2][:nnz]), csr)
        assert same_bytes([out], [base + extra])
    short, got = host.splice(*args, W_dec, b_dec, columns, error, capacity=nnz - 1)
    assert int(got[0][-1]) == nnz
    assert bool(short[-1].isnan().all())


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_silent_under_sanitizers_in_three_orders(sanitizer, tmp_path):
    program = build_program(tmp_path / "check", sanitizer)
    for order in ORDERS:
        done = run_program(program, order)
        assert done.returncode == 0, f"{order}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def test_the_emulator_tells_a_missing_warp_barrier(tmp_path):
    main = MAIN.with_name("warp_selftest.cpp")
    sound = build_program(tmp_path / "sound", "thread", main=main)
    assert [run_program(sound, order).returncode for order in ORDERS] == [0, 0, 0]
    broken = build_program(tmp_path / "broken", "thread", main=main, define="GSF_NO_BARRIER")
    assert "data race" in run_program(broken, "ascending").stderr
    wrong = build_program(tmp_path / "wrong", "plain", main=main, define="GSF_NO_BARRIER")
    assert any(run_program(wrong, order).returncode == 1 for order in ORDERS)


# file, text, what it becomes, the build that must notice
MUTATIONS = {
    "a barrier after the tile is filled": (
        "encode.cu", "    sync_block();  // the chunk is complete", "    // the chunk is complete", "thread",
    ),
    "a tail one too long": ("encode.cu", "inside = k0 + c < a.d", "inside = k0 + c <= a.d", "address"),
    "a lane missing in the ballot": (
        "encode.cu", "ballot(hit)", "ballot(hit && lane() != 17)", "plain",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name, tmp_path):
    assert caught(name, MUTATIONS, tmp_path)
