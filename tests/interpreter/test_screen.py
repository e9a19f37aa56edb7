"""The screened encode against the unscreened one, byte for byte, and its bound against fp64."""

import pytest
import torch

from gemmascope_fast import ops
from gemmascope_fast.backends.gpu import encode as gpu_encode
from gemmascope_fast.backends.gpu import screen as gpu
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.errors import BackendError, StaleScreenError
from gemmascope_fast.ops.encode import kappa

UP = 1 + 2.0**-20


def screen_of(rows, b, theta, centre=None, second=False):
    """The screen's definition: per-row codes and zero points, the error in fp64, b' with the centre folded in."""
    w = rows.double()
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = ((high - low) / 254).float().clamp(min=2.0**-100)
    zero = (-127 - low / scale).round()
    code = (w / scale[:, None] + zero[:, None]).round().clamp(-127, 127)
    error = w - scale.double()[:, None] * (code - zero[:, None])
    bias = b.double() + (0 if centre is None else w @ centre.double())
    two = None
    if second:
        scale2 = (error.abs().amax(1) / 127).float().clamp(min=2.0**-100)
        code2 = (error / scale2[:, None]).round().clamp(-127, 127)
        left = (error - scale2.double()[:, None] * code2).norm(dim=1)
        two = gpu.SecondDigit(code2.to(torch.int8), scale2, ((left + 8 * gpu.U * error.norm(dim=1)) * UP).float())
    d, norm = w.shape[1], w.norm(dim=1)
    slack = kappa(d) * b.double().abs() + 8 * gpu.U * (bias.abs() + theta.double().clamp(min=0)) + d * 2.0**-126
    sound = (norm == 0) | ((norm * UP >= 2.0**-60) & (norm * UP <= 2.0**60))
    slack = torch.where(sound, slack * UP, torch.inf).float()
    norms = [(v * UP).float() for v in (error.norm(dim=1), norm)]
    return gpu.ScreenArrays(
        code.to(torch.int8), scale, zero.int(), *norms, bias.float(), slack, centre, two
    )  # fmt: skip


def screened(x, W, b, theta, s, bandwidth=None):
    """crow, col, values through a screen of this file's own making."""
    weights = gpu.checked(x, W, b, theta, bandwidth)
    return gpu_encode.compressed(
        gpu_encode.widenable(x), weights, lambda part, w: gpu.fill_screened(part, w, s, bandwidth)
    )


def case(T, d, F, seed=0, dtype=torch.float32, l0=None):
    """Weights and activations like Gemma's: a massive dimension, large products that cancel."""
    sae = make_sae(seed, d, F, l0 or max(1, F // 20), dtype)
    x = make_activations(seed + 9, T, d).to(dtype)
    return x, sae.W_enc.detach(), sae.b_enc.detach(), sae.threshold.detach(), sae.b_dec.detach().float()


@pytest.mark.parametrize("T", [1, 17])
def test_scales_divide_the_activations_and_change_no_byte(T, same_bytes):
    x, W, b, theta, mean = case(T, 70, 33)
    s = torch.exp2((torch.arange(70) % 7).float())
    code, code2, table = ops.screen_rows(W, b, theta, mean, True, None, s)
    *got, stats = gpu.encode_screened(x, W, b, theta, code, code2, table, mean, scales=s)
    same_bytes(tuple(got), ops.encode(x, W, b, theta, None))
    scaled = ops.screen_rows(W * s[:, None], b, theta, mean / s, True)
    *_, want = gpu.encode_screened(x / s, W * s[:, None], b, theta, *scaled, mean / s)
    assert stats.tolist() == want.tolist()
    assert stats[2] == 0
    assert stats[0] < T * 33 * 0.6  # the bound still discards


@pytest.mark.parametrize("shape", [(1, 33, 70), (3, 150, 31), (17, 20, 65), (1, 1100, 34)])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_equals_the_unscreened(shape, second, centred, same_bytes):
    x, W, b, theta, mean = case(*shape)
    s = screen_of(W.t(), b, theta, mean if centred else None, second)
    same_bytes(screened(x, W, b, theta, s), ops.encode(x, W, b, theta, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype, same_bytes):
    x, W, b, theta, mean = case(3, 40, 70, dtype=dtype)
    s = screen_of(W.t(), b, theta, mean.float())
    same_bytes(screened(x, W, b, theta, s), ops.encode(x, W, b, theta, None))


@pytest.mark.parametrize("shift", [1e6, -1e6])
def test_every_feature_and_no_feature(shift, same_bytes):
    x, W, b, theta, mean = case(3, 40, 70)
    s = screen_of(W.t(), b + shift, theta, mean)
    same_bytes(screened(x, W, b + shift, theta, s), ops.encode(x, W, b + shift, theta, None))


def test_tokens_and_rows_outside_the_range_skip_the_screen(same_bytes):
    x, W, b, theta, mean = case(8, 40, 70)
    W = W.clone()
    W[:, 3], W[:, 4], W[:, 5] = W[:, 3] * 1e-25, 0.0, W[:, 5] * 1e25
    x[1, 3], x[2, 5], x[3, 19], x[4] = float("nan"), float("inf"), -float("inf"), 1e-30
    x[5], x[6, 0], x[7, 1] = mean, 3e38, 1e19
    s = screen_of(W.t(), b, theta, mean)
    assert int(s.slack.isinf().sum()) == 2
    same_bytes(screened(x, W, b, theta, s), ops.encode(x, W, b, theta, None))


@pytest.mark.parametrize("bandwidth", [1.0, 3e3])
def test_bandwidth(bandwidth, same_bytes):
    x, W, b, theta, mean = case(5, 40, 70)
    s = screen_of(W.t(), b, theta, mean, True)
    same_bytes(screened(x, W, b, theta, s, bandwidth), ops.encode(x, W, b, theta, bandwidth))


def test_the_bound_holds_and_discards():
    """Of what fires nothing is lost, of the rest most is discarded; the certificate holds."""
    x, W, b, theta, mean = case(8, 128, 160, l0=4)
    s = screen_of(W.t(), b, theta, mean)
    words, candidates = screened_words(x, W, b, theta, s)
    fired = ops.encode(x, W, b, theta, None)[1].numel()
    kept = int(sum(((candidates >> i) & 1).sum() for i in range(32)))
    assert fired <= kept <= 0.15 * 8 * 160
    assert int(words.stale) == 0


def screened_words(x, W, b, theta, s):
    """What the screen alone leaves: the refinement is made to keep a copy of its input."""
    from gemmascope_fast.backends.gpu.encode import Weights
    from gemmascope_fast.kernels import screen as module

    seen = {}

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **more):
                seen["candidates"] = args[8].clone()
                return kept[grid](*args, **more)

            return launch

    kept, module.refine_kernel = module.refine_kernel, Spy()
    try:
        words = gpu.fill_screened(x, Weights.of(W, b, theta), s, None)
    finally:
        module.refine_kernel = kept
    return words, seen["candidates"]


def test_rows_that_sit_on_the_grid(same_bytes):
    """No error of the code is left: only the rounding terms stand between a firing feature and the screen."""
    x, W, b, theta, mean = case(8, 64, 64)
    scale = W.abs().amax(0) / 127
    W = (W / scale).round() * scale
    z = x.double() @ W.double() + b.double()
    theta = (z.float().median(0).values).clamp(min=0)  # a token of each feature sits on the threshold
    s = screen_of(W.t(), b, theta, mean)
    same_bytes(screened(x, W, b, theta, s), ops.encode(x, W, b, theta, None))


def test_changed_weights_are_noticed():
    x, W, b, theta, mean = case(4, 40, 70)
    s = screen_of(W.t(), b, theta, mean)
    with pytest.raises(StaleScreenError, match="bound"):
        screened(x, 3 * W, b, theta - 1e6, gpu.ScreenArrays(**{**vars(s), "bias": s.bias + 1e6}))
    code, code2, table = ops.screen_rows(W, b, theta - 1e6, None, True)
    fixed = gpu.encode_screened_fixed(x, 3 * W, b, theta - 1e6, code, code2, table, None, 4 * 70)
    assert int(fixed.stale) == 1
    with pytest.raises(StaleScreenError):
        fixed.sparse()


@pytest.mark.parametrize("T", [2, 18])
def test_fixed_capacity(T, same_bytes):
    x, W, b, theta, mean = case(T, 40, 70)
    screen = (*ops.screen_rows(W, b, theta, mean, True), mean)
    got = gpu.encode_screened_fixed(x, W, b, theta, *screen, T * 70).sparse()
    want = ops.encode(x, W, b, theta, None)
    same_bytes((got.crow_indices, got.col_indices, got.values), want)
    short = gpu.encode_screened_fixed(x, W, b, theta, *screen, want[1].numel() - 1)
    with pytest.raises(BackendError, match="do not fit"):
        short.sparse()


def test_digits_are_those_of_the_bound():
    """R, E and the digits against fp64: r is within E's share of its digits, R not below their norm."""
    x, W, b, theta, mean = case(5, 300, 32)
    s = screen_of(W.t(), b, theta, mean)
    seen = {}
    from gemmascope_fast.kernels import screen as module

    kept = module.screen_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **more):
                seen.update(zip(("high", "low", "sums", "token"), args[:4], strict=True))
                return kept[grid](*args, **more)

            return launch

    module.screen_kernel = Spy()
    try:
        screened(x, W, b, theta, s)
    finally:
        module.screen_kernel = kept
    unit, R, E = seen["token"].double().unbind(1)
    digits = 256 * seen["high"].long() + seen["low"].long()
    near = unit[:, None] * digits[:, :300]
    r = (x - mean).double()
    assert bool((digits[:, 300:] == 0).all())
    assert bool(((r - near).abs() <= unit[:, None] / 2).all())
    assert bool((near.norm(dim=1) <= R).all())
    assert bool((near.norm(dim=1) * 1.001 >= R).all())
    assert bool(((r - near).norm(dim=1) + kappa(300) * x.double().norm(dim=1) <= E).all())
    assert torch.equal(seen["sums"], torch.stack((seen["high"].long().sum(1), seen["low"].long().sum(1)), 1).int())
    assert bool((digits.abs().amax(1) > 32512 / 2.01).all())


@pytest.mark.parametrize(("T", "second"), [(8, True), (3, False)])
def test_the_op_on_the_screen_of_the_cpu(T, second, same_bytes):
    """The CPU's tiles and table, read by rows: the bytes of `encode`, and honest statistics."""
    x, W, b, theta, mean = case(T, 70, 67, l0=12)
    x[T - 1, 3] = float("nan")
    code, code2, table = ops.screen_rows(W, b, theta, mean, second)
    *csr, stats = gpu.encode_screened(x, W, b, theta, code, code2 if second else None, table, mean)
    same_bytes(csr, ops.encode(x, W, b, theta, None))
    left, refined, violations, rest = stats.tolist()
    assert csr[1].numel() <= refined <= left <= T * 67
    assert (refined < left) == second
    assert (violations, rest) == (0, 1)


def test_another_table_of_the_same_code_is_looked_at(same_bytes):
    """What is kept by code alone would answer for weights that are gone."""
    x, W, b, theta, mean = case(3, 70, 67)
    code, _, table = ops.screen_rows(W, b, theta, mean, False)
    gpu.encode_screened(x, W, b, theta, code, None, table, mean)
    higher = theta + 1e6
    _, _, other = ops.screen_rows(W, b - 2e6, higher, mean, False)
    *csr, _ = gpu.encode_screened(x, W, b - 2e6, higher, code, None, other, mean)
    same_bytes(csr, ops.encode(x, W, b - 2e6, higher, None))


@pytest.mark.parametrize("F", [1, 33, 67])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_lies_past_the_last_feature_is_never_one(F, value, same_bytes):
    """A forged table and forged codes beyond d_sae: the bytes and the pairs looked at of the honest ones."""
    x, W, b, theta, mean = case(3, 40, F)
    x[1, 5] = float("nan")  # a token whose bound says nothing
    code, code2, table = ops.screen_rows(W, b, theta, mean, True)
    *_, honest = gpu.encode_screened(x, W, b, theta, code, code2, table, mean)
    table[:, F:] = value
    for tiles in (code, code2):
        tiles[-1, :, (F - 1) % 4 + 1 :] = 255
    *csr, stats = gpu.encode_screened(x, W, b, theta, code.clone(), code2, table, mean)
    same_bytes(csr, ops.encode(x, W, b, theta, None))
    assert torch.equal(stats, honest)


@pytest.mark.parametrize(("share", "stale"), [(0.5, False), (1.5, True)])
def test_the_certificate_is_as_tight_as_the_bound(share, stale):
    """A bias edited by half the bound is within it, by one and a half times the bound is not."""
    g = torch.Generator().manual_seed(11)
    d, u = 64, 2.0**-24
    W = torch.randint(-127, 128, (d, 1), generator=g).float()
    W[0], W[1] = -128.0, 127.0
    x = torch.randint(-127, 128, (1, d), generator=g).float()
    x[0, 1] = 127.0
    b, theta = torch.full((1,), 1e6), torch.zeros(1)
    code, code2, table = ops.screen_rows(W, b, theta, None, True)
    norm, rounding = float(x.norm()), 0.5 * 2.0**-8 * d**0.5  # the unit is 2^-8
    error = rounding + kappa(d) * norm + 9 * u * (2 * norm + rounding)
    bound = float(W.norm()) * error + (kappa(d) + 5 * u) * 1e6
    weights = gpu.checked(x, W, b + share * bound, theta, None)
    arrays = gpu.ScreenArrays.of_rows(code, code2, table, None, (d, 1))
    assert int(gpu.fill_screened(x, weights, arrays, None).stale) == int(stale)


# ---- rows in pinned host memory: what can be seen of them without a device ---------------------------------


@pytest.mark.parametrize("second", [False, True])
def test_only_rows_that_the_screen_leaves_are_read(second, same_bytes):
    """In host memory a row costs a transfer: those that no candidate names hold NaN here, and nobody notices."""
    x, W, b, theta, mean = case(3, 128, 160, l0=4)
    s = screen_of(W.t(), b, theta, mean, second)
    _, candidates = screened_words(x, W, b, theta, s)
    left = torch.stack([(candidates >> i) & 1 for i in range(32)], 2).flatten(1)[:, :160].any(0)
    assert 0 < int(left.sum()) < 60
    rows = W.t().clone()
    rows[~left] = float("nan")
    same_bytes(screened(x, rows.t(), b, theta, s), ops.encode(x, W, b, theta, None))


class Recorder:
    """A module of kernels that notes what each is launched with and runs none."""

    def __init__(self):
        self.launched = {}

    def __getattr__(self, name):
        recorder = self

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **more: recorder.launched.update({name: args})

        return Kernel()


def test_host_rows_reach_the_kernels_where_they_lie(monkeypatch):
    """The activations on one device, the rows in host memory: they are passed on unmoved and uncopied, and everything
    else has to be on the device."""
    x, W, b, theta, mean = case(3, 40, 67)
    code, code2, table = ops.screen_rows(W, b, theta, mean, True)
    there = [t.to("meta") for t in (x, b, theta)]
    arrays = gpu.ScreenArrays.of_rows(code, code2, table, mean, (40, 67))
    recorder, checked = Recorder(), []
    for module in (gpu, gpu_encode):
        monkeypatch.setattr(module, "kernels", lambda name, *tensors: (checked.extend(tensors), recorder)[1])
    monkeypatch.setattr(gpu, "in_host_memory", lambda rows: rows.device.type == "cpu")
    rows = W.t().contiguous()
    weights = gpu.checked(there[0], rows.t(), *there[1:], None)
    words = gpu.fill_screened(there[0], weights, arrays, None)
    gpu_encode.gather(there[0], weights, words, None, 5)
    for name in ("refine_kernel", "gather_kernel"):
        assert recorder.launched[name][1].data_ptr() == rows.data_ptr()
    assert all(t is None or t.data_ptr() != rows.data_ptr() for t in checked)
    for mine in (arrays.code, arrays.second.code, arrays.centre, weights.bias, weights.threshold):
        assert any(t is mine for t in checked)


def test_a_screen_beside_host_rows_goes_to_the_device_once(monkeypatch):
    _, W, b, theta, mean = case(3, 40, 67)
    scales = torch.exp2((torch.arange(40) % 7).float())
    code, code2, table = ops.screen_rows(W, b, theta, mean, True, None, scales)
    there = torch.device("meta")
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "check_devices", lambda *tensors: None)  # it wants one that kernels run on
        made = gpu._arrays(there, W, code, code2, table, mean, scales)
        assert {t.device for t in (made.code, made.second.code, made.slack, made.centre, made.scales)} == {there}
        assert gpu._arrays(there, W, code, code2, table, mean, scales) is made
        assert gpu._arrays(W.device, W, code, code2, table, mean, scales).code.device == W.device
    with pytest.raises(ValueError, match="expected all tensors on cpu"):
        gpu._arrays(there, W, code, code2, table.to(there), mean, scales)


def test_host_rows_that_cannot_serve(monkeypatch):
    x, W, b, theta, mean = case(3, 20, 67)
    code, code2, table = ops.screen_rows(W, b, theta, mean, True)
    there = [t.to("meta") for t in (x, b, theta)]
    with pytest.raises(ValueError, match="on meta or in pinned host memory, got one on cpu"):
        gpu.encode_screened(there[0], W, *there[1:], code, code2, table, mean)
    monkeypatch.setattr(gpu, "in_host_memory", lambda rows: True)
    with pytest.raises(ValueError, match="transposed view of contiguous rows"):
        gpu.checked(there[0], W.contiguous(), *there[1:], None)
    with pytest.raises(ValueError, match="b_enc: expected a tensor on meta"):
        gpu.checked(there[0], W.t().contiguous().t(), b, there[2], None)
    # without a screen every row would cross the bus: encode wants them on the device
    with pytest.raises(ValueError, match="expected a tensor on cpu, like W_enc, got meta"):
        gpu_encode.encode(there[0], W, *there[1:])


def test_bad_arguments():
    x, W, b, theta, mean = case(3, 20, 67)
    code, code2, table = ops.screen_rows(W, b, theta, mean, True)
    with pytest.raises(ValueError, match="code: expected"):
        gpu.encode_screened(x, W[:, :60], b[:60], theta[:60], code, None, table, None)
    with pytest.raises(TypeError, match=r"code: expected torch\.uint8"):
        gpu.encode_screened(x, W, b, theta, code.int(), None, table, None)
    with pytest.raises(ValueError, match="code2: expected"):
        gpu.encode_screened(x, W, b, theta, code, code2[1:], table, None)
    with pytest.raises(ValueError, match="table: expected"):
        gpu.encode_screened(x, W, b, theta, code, None, table[:, :67], None)
    with pytest.raises(ValueError, match="centre: expected"):
        gpu.encode_screened(x, W, b, theta, code, None, table, mean[1:])
    with pytest.raises(ValueError, match="expected all tensors on cpu"):
        gpu.encode_screened(x, W, b, theta, code, None, table.to("meta"), None)
    with pytest.raises(ValueError, match="threshold: expected"):
        gpu.encode_screened(x, W, b, theta[1:], code, None, table, None)
