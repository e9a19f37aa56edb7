"""When an SAE uses its screen, stores it, and detects that it was built from other weights."""

import json

import numpy as np
import pytest
import torch
from screen_problems import problem, screened

import gemmascope_fast as gsf
from gemmascope_fast import ops
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.dev.testing import make_activations, make_sae, same_bytes, threads
from gemmascope_fast.ops.codes import Codes, quantize
from gemmascope_fast.ops.screen_rows import rows_of
from gemmascope_fast.sae.screen import Screen, weights_digest


def test_none_true_and_false_give_the_same_bytes():
    sae, x = make_sae(1, 200, 900, 20), make_activations(2, 20, 200)
    none, on, off = (sae.encode_sparse(x, screen=s) for s in (None, True, False))
    assert none == on == off
    assert sae.packed_bytes() > 2 * 900 * 200
    assert sae.encode_sparse(x, screen=True, bandwidth=0.5) == sae.encode_sparse(x, bandwidth=0.5)


def edit_parameter(sae):
    sae.W_enc = torch.nn.Parameter(sae.W_enc.detach() * 1.7)


def edit_data(sae):
    sae.W_enc.data = sae.W_enc.data * 1.7


def edit_in_place(sae):
    with torch.no_grad():
        sae.W_enc.mul_(1.7)


def edit_threshold(sae):
    with torch.no_grad():
        sae.threshold.mul_(0.5)


def edit_bias(sae):
    with torch.no_grad():
        sae.b_enc.add_(3.0)


def edit_by_assignment(sae):
    state = {k: v * 1.3 for k, v in sae.state_dict().items()}
    sae.load_state_dict(state, assign=True)


def edit_dtype(sae):
    sae.to(torch.bfloat16)


@pytest.mark.parametrize(
    "edit",
    [edit_parameter, edit_data, edit_in_place, edit_threshold, edit_bias, edit_by_assignment, edit_dtype],
    ids=lambda f: f.__name__,
)
def test_edits_are_noticed(edit):
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    before = sae.encode_sparse(x, screen=True)
    edit(sae)
    after = sae.encode_sparse(x, screen=True)
    assert after == sae.encode_sparse(x, screen=False)
    assert after != before


def test_weights_laid_out_where_the_old_ones_lay_are_noticed():
    """Gemma Scope's layout given by `.data =` is laid out anew, often at the address that was just given back."""
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    for _ in range(20):
        sae.encode_sparse(x, screen=True)
        sae.W_enc.data = (sae.W_enc.data * 1.1).contiguous()
        assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)


def test_weights_edited_at_each_step_are_not_packed_at_each_step(monkeypatch):
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    built = []
    build = Screen.build.__func__
    monkeypatch.setattr(Screen, "build", classmethod(lambda cls, *a, **k: built.append(1) or build(cls, *a, **k)))
    sae.encode_sparse(x)
    assert len(built) == 1
    for _ in range(3):
        edit_in_place(sae)
        assert sae.encode_sparse(x) == sae.encode_sparse(x, screen=False)
    assert len(built) == 1
    sae.encode_sparse(x)  # the same weights a second time
    assert len(built) == 2


def test_what_nobody_can_see_is_caught_by_the_bound():
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 20, 200)
    sae.encode_sparse(x, screen=True)
    sae.W_enc.data.mul_(1.5)
    with pytest.raises(gsf.StaleScreenError, match="force=True"):
        sae.encode_sparse(x, screen=True)
    sae.prepare(force=True)
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)


def test_prepare_keeps_its_options():
    sae, x = make_sae(1, 200, 300, 20), make_activations(2, 40, 200)
    sae.prepare(sample=x, directions=3)
    centre, directions = sae.screen_cache.screen.centre, sae.screen_cache.screen.directions
    torch.testing.assert_close(directions @ directions.t(), torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(centre, x.double().mean(0).float())
    edit_in_place(sae)
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    assert torch.equal(sae.screen_cache.screen.centre, centre)
    assert torch.equal(sae.screen_cache.screen.directions, directions)
    sae.prepare(second_digit=False)
    assert sae.screen_cache.screen.code2 is None
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    for wrong, match in (
        ({"sample": x, "centre": x[0]}, "sample, centre: give at most one"),
        ({"sample": x[:, 1:]}, "sample: expected"),
        ({"centre": x[0, 1:]}, "centre: expected"),
        ({"directions": 3}, "directions: 3 of them"),
    ):
        with pytest.raises(ValueError, match=match):
            sae.prepare(**wrong)


def test_a_trained_code_decides_in_place_of_the_screens_own():
    sae, x = make_sae(1, 200, 900, 20), make_activations(2, 20, 200)
    want = sae.encode_sparse(x, screen=False)
    own = quantize(sae.W_enc.detach().t())
    g = torch.Generator().manual_seed(3)
    moved = (own.q.int() + torch.randint(-20, 21, own.q.shape, generator=g)).clamp(0, 255).to(torch.uint8)
    sae.prepare(codes=Codes(moved, own.scale, own.zero_point))
    screen = sae.screen_cache.screen
    assert torch.equal(rows_of(screen.code)[:900, :200], moved)
    assert screen.scales is None
    assert sae.encode_sparse(x, screen=True) == want
    edit_in_place(sae)  # the code is kept, its error is measured anew
    again = sae.encode_sparse(x, screen=True)
    assert torch.equal(rows_of(sae.screen_cache.screen.code)[:900, :200], moved)
    assert again == sae.encode_sparse(x, screen=False)


def test_massive_dimensions_are_taken_out_unless_told():
    sae, x = make_sae(1, 640, 300, 20), make_activations(2, 40, 640)
    assert torch.equal(sae.prepare().screen_cache.screen.directions.abs(), torch.eye(640)[163:164])
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    edit_in_place(sae)
    sae.encode_sparse(x, screen=True)
    assert sae.screen_cache.screen.directions is not None
    assert sae.prepare(directions=0).screen_cache.screen.directions is None
    edit_in_place(sae)
    sae.encode_sparse(x, screen=True)
    assert sae.screen_cache.screen.directions is None
    with torch.no_grad():
        sae.b_dec[163] = 0.0
    assert sae.prepare(directions=None).screen_cache.screen.directions is None


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("k", [None, 3])
def test_a_stored_screen_is_taken_and_not_built(tmp_path, monkeypatch, second, k):
    sae, x = make_sae(1, 200, 302, 20), make_activations(2, 40, 200)
    sae.prepare(sample=x, directions=k, second_digit=second)
    save(sae, tmp_path / "sae.safetensors", screen=True)
    monkeypatch.setattr(Screen, "build", None)  # a build would fail
    loaded = gsf.SAE.from_pretrained(tmp_path)
    assert loaded.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)
    for name, tensor in sae.screen_cache.screen.tensors().items():
        assert torch.equal(loaded.screen_cache.screen.tensors()[name], tensor)


def test_a_stored_screen_follows_a_cast_by_being_built_anew(tmp_path):
    sae, x = make_sae(1, 200, 302, 20), make_activations(2, 40, 200)
    save(sae, tmp_path / "sae.safetensors", screen=True)
    loaded = gsf.SAE.from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.screen_cache.screen is None
    assert loaded.encode_sparse(x, screen=True) == loaded.encode_sparse(x, screen=False)
    with pytest.raises(ValueError, match="screen"):
        save(sae, tmp_path / "other.safetensors", torch.bfloat16, screen=True)


@pytest.mark.parametrize("name", ["W_enc", "threshold", "screen.code", "screen.code2", "screen.table"])
def test_a_stored_screen_of_other_weights_is_refused(tmp_path, name):
    path = tmp_path / "sae.safetensors"
    save(make_sae(1, 200, 302, 20), path, screen=True)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    at = 8 + length + (begin + end) // 2 // 4 * 4
    data[at] ^= 1  # the lowest bit of a mantissa, or of a code
    path.write_bytes(data)
    with pytest.raises(gsf.CheckpointError, match="screen"):
        gsf.SAE.from_pretrained(tmp_path)


def test_digest_sees_every_array():
    _, W, b, theta = problem(1, 40, 30)
    first = weights_digest(W, b, theta)
    assert first == weights_digest(W.clone(), b, theta)
    for other in ((W + 1e-3, b, theta), (W, b + 1, theta), (W, b, theta + 1), (W.bfloat16(), b, theta)):
        assert weights_digest(*other) != first


def test_without_a_native_kernel_the_screen_still_answers():
    sae, x = make_sae(1, 64, 100, 10), make_activations(2, 5, 64)
    with gsf.backend("eager"):
        on, off = sae.encode_sparse(x, screen=True), sae.encode_sparse(x, screen=False)
    assert on == off
    assert isinstance(np.asarray(on.values.detach()), np.ndarray)


@pytest.mark.parametrize(("theta", "scale", "looks"), [(0.0, 1.0, False), (2.5, 20.0, True)])
def test_the_second_look_goes_where_few_candidates_are_false(isa, theta, scale, looks):
    """Many tokens: where more than half of the first candidates fire, all but the first are refined unlooked at."""
    x, W, b, threshold = problem(160, 64, 512, theta=theta)
    # a wide digit step for all dimensions and nothing for the sums: many false candidates
    x[:, 5] *= scale
    W[5] = 0
    screen = Screen.build(W, b, threshold)
    with threads(1):
        want = ops.encode(x, W, b, threshold)
        got, own = screened(x, W, b, threshold, screen, 0, second=False)
        _, always = screened(x, W, b, threshold, screen, 1, second=False)
        _, both = screened(x, W, b, threshold, screen, 2, second=False)
    assert same_bytes(got, want)
    assert own["violations"] == 0
    if isa == "amx":  # both digits at once, and nothing left to look at
        assert own == both
        assert own["survivors"] < always["survivors"]
        return
    assert own["survivors"] == always["survivors"]
    assert (own["refined"] == always["refined"]) == looks
    # the first chunk's are looked at, to see
    assert own["refined"] < own["survivors"]
