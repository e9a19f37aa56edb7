"""Forged screens and packed files: digests and checksums are right, but the contents are invalid."""

import math

import numpy as np
import pytest
import torch
from checkpoint_files import weights
from forged_files import Packed, forged_native

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import packed
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.mapped import verify
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.checkpoints.stored_screen import check_screen
from gemmascope_fast.dev.testing import make_activations, make_sae
from gemmascope_fast.ops.screen_rows import Row
from gemmascope_fast.sae.screen import Screen

# ---- screens ---------------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan


def at(row, columns, value):
    def change(tensors):
        tensors["table"][row, columns] = value

    return change


def array(name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


PAST, FIRST = slice(70, None), slice(0, 1)
FORGED = {
    "columns past d_sae survive": at(Row.START, PAST, INF),
    "one column past d_sae survives": at(Row.START, slice(71, 72), 0.0),
    "columns past d_sae are NaN": at(Row.START, PAST, NAN),
    "scales past d_sae": at(Row.SCALE, PAST, 1.0),
    "NaN zero points": at(Row.ZERO, FIRST, NAN),
    "zero points of 1e30": at(Row.ZERO, FIRST, 1e30),
    "negative zero points": at(Row.ZERO, FIRST, -1.0),
    "zero points between": at(Row.ZERO, FIRST, 0.5),
    "a feature that never fires": at(Row.START, FIRST, -INF),
    "a NaN start": at(Row.START, FIRST, NAN),
    "a negative error": at(Row.ERROR, FIRST, -1.0),
    "an infinite error": at(Row.ERROR, FIRST, INF),
    "a NaN norm": at(Row.NORM, FIRST, NAN),
    "a negative slack": at(Row.SLACK, FIRST, -1.0),
    "an infinite bias": at(Row.CENTRED_BIAS, FIRST, INF),
    "a negative scale": at(Row.SCALE, FIRST, -1.0),
    "a NaN second scale": at(Row.SCALE2, FIRST, NAN),
    "a negative second error": at(Row.ERROR2, FIRST, -1.0),
    "an infinite product with a direction": at(len(Row), FIRST, INF),
    "NaN in the centre": array("centre", NAN),
    "infinity in the directions": array("directions", INF),
    "scales that are no powers of two": array("scales", 3.0),
    "scales below one": array("scales", 0.5),
    "scales of 2^21": array("scales", 2.0**21),
    "NaN in the scales": array("scales", NAN),
}


@pytest.fixture(scope="module")
def screened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screened")
    sae = make_sae(1, 64, 70, 3).requires_grad_(False)
    sample = make_activations(2, 50, 64)
    sae.prepare(sample=sample, directions=2)
    save(sae, folder / "sae.safetensors", screen=True)
    return folder


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_screen_with_the_right_digest(screened, tmp_path, name):
    forged_native(screened / "sae.safetensors", tmp_path / "sae.safetensors", FORGED[name])
    with pytest.raises(gsf.CheckpointError, match=r"sae\.safetensors: screen\.\w+.*: expected"):
        from_pretrained(tmp_path)


SHAPES = {
    "a table that is too short": lambda t: t.update(table=t["table"][:, :-16].contiguous()),
    "a table without its last row": lambda t: t.update(table=t["table"][:-1].contiguous()),
    "a table in fp64": lambda t: t.update(table=t["table"].double()),
    "codes that are too short": lambda t: t.update(code=t["code"][:-1].contiguous()),
    "codes as int8": lambda t: t.update(code=t["code"].view(torch.int8)),
    "second codes of another shape": lambda t: t.update(code2=t["code2"].reshape(-1, 1, 4, 64)[:-1].contiguous()),
    "a centre that is too short": lambda t: t.update(centre=t["centre"][:-1].clone()),
    "no directions": lambda t: t.update(directions=torch.empty(0, 64), table=t["table"][: len(Row)].clone()),
    "directions of another width": lambda t: t.update(directions=t["directions"][:, 1:].contiguous()),
    "directions of one dimension": lambda t: t.update(directions=t["directions"][0].clone()),
    "no codes": lambda t: t.pop("code"),
    "no table": lambda t: t.pop("table"),
    "another array": lambda t: t.update(more=torch.ones(3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_forged_screen_of_other_shapes(screened, tmp_path, name):
    forged_native(screened / "sae.safetensors", tmp_path / "sae.safetensors", SHAPES[name])
    with pytest.raises(gsf.CheckpointError, match=r"sae\.safetensors: screen"):
        from_pretrained(tmp_path)


def test_a_screen_that_is_what_a_build_gives_is_taken(screened, tmp_path):
    forged_native(screened / "sae.safetensors", tmp_path / "sae.safetensors", lambda tensors: None)
    sae, x = from_pretrained(tmp_path), make_activations(3, 9, 64)
    assert sae.screen_cache.screen is not None
    assert sae.encode_sparse(x, screen=True) == sae.encode_sparse(x, screen=False)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (65, 17), (640, 100)])
def test_screens_of_every_build_pass(shape, second, tmp_path):
    """Of ordinary rows, of rows that are always refined, of biases at the ends of what is screened."""
    d, F = shape
    sae = make_sae(5, d, F, 1).requires_grad_(False)
    W, b, theta = sae.W_enc.clone(), sae.b_enc.clone(), sae.threshold.clone()
    extremes = [0.0, 1e-45, 1e-30, 1e20, 3e38, -1e20]
    for i, value in enumerate(extremes[:F]):
        W[:, i] = value
    for i, value in enumerate([1e38, -1e38, 3e38, 1e30, -1e30][: max(0, F - 6)]):
        b[6 + i] = value
    theta[-1] = 3e38
    for centre in (None, torch.full((d,), 1e30), torch.ones(d)):
        check_screen(tmp_path, Screen.build(W, b, theta, centre=centre, second_digit=second), d, F)


# ---- packed files ----------------------------------------------------------------------------------------------


@pytest.fixture
def forge(tmp_path):
    save(make_sae(1, 200, 902, 20).requires_grad_(False), tmp_path / "sae.safetensors")
    from_pretrained(tmp_path, rows="mmap")
    return Packed(tmp_path / "sae.safetensors.packed")


INTEGERS = [0, -1, -64, 1.0, 64.5, 10**30, True, "64", None, [64], INF, NAN, 2**63]
FIELDS = {name: INTEGERS for name in ("d_in", "d_sae", "d_out", "panel")}
FIELDS["decoder"] = [v for v in INTEGERS if v is not None] + [4, 2**40]
FIELDS["panel"] = [*INTEGERS, 1, 65, 2**40 + 1]
FIELDS["kind"] = ["nonsense", "topk_sae", "skip_transcoder", "transcoder", None, 3, [], {}]
FIELDS["hook_name"] = FIELDS["hook_name_out"] = [5, "", [], True, {}]
FIELDS["file"] = ["..", ".", "", "/etc/passwd", "a/b", None, 3, "sae", "\0"]
FIELDS["source"] = [None, 3, "", "another"]
FIELDS["checksums"] = [None, [1], {}, 3, "x", {"W_dec": [1]}]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in FIELDS.items() for v in values])
def test_a_forged_packed_header(forge, name, value):
    forge.write({**forge.about, name: value})
    if (name, value) == ("source", "another"):  # of another checkpoint: written again
        assert from_pretrained(forge.path.parent, rows="mmap").d_sae == 902
        return
    with pytest.raises(gsf.CheckpointError, match=str(forge.path)):
        from_pretrained(forge.path.parent, rows="mmap")


@pytest.mark.parametrize("sums", [None, [], [1, 2], ["1"], [1.0], [-1], [2**32], [None], {}])
@pytest.mark.parametrize("name", ["W_dec", "screen.table", "b_enc"])
def test_forged_checksums(forge, name, sums):
    forge.write({**forge.about, "checksums": {**forge.about["checksums"], name: sums}})
    with pytest.raises(gsf.CheckpointError, match=str(forge.path)):
        from_pretrained(forge.path.parent, rows="mmap")


def test_checks_are_not_switched_off_by_a_panel(forge):
    sums = {n: [] if n in packed.PANELLED else v for n, v in forge.about["checksums"].items()}
    for panel in (-64, 0, 2**62):
        forge.write({**forge.about, "panel": panel, "checksums": sums})
        with pytest.raises(gsf.CheckpointError, match=r"panel|checksums"):
            from_pretrained(forge.path.parent, rows="mmap")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "", "3", "{", '{"source"', "null", "\ud800"])
def test_metadata_that_is_no_object(forge, text):
    forge.write(raw=text)
    for call in (lambda: from_pretrained(forge.path.parent, rows="mmap"), lambda: verify(forge.path)):
        with pytest.raises(gsf.CheckpointError, match=str(forge.path)):
            call()


PAST_D_SAE = [name for name in FORGED if "past d_sae" in name]
INSIDE = [name for name in FORGED if name not in PAST_D_SAE and "direction" not in name and "scales" not in name]


@pytest.mark.parametrize("name", PAST_D_SAE + INSIDE)
def test_a_forged_packed_screen_with_the_right_checksum(forge, name):
    def change(tensors):
        first = 902 - 70 if name in PAST_D_SAE else 0  # so that column 70 is the first past d_sae
        FORGED[name]({"table": tensors["screen.table"][:, first:], "centre": tensors["screen.centre"]})

    forge.change(change)
    with pytest.raises(gsf.CheckpointError, match=r"packed: screen\.\w+.*: expected"):
        from_pretrained(forge.path.parent, rows="mmap")


@pytest.mark.parametrize("name", ["b_enc", "b_dec", "threshold"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_forged_vectors_with_the_right_checksum(forge, name, value):
    forge.change(lambda tensors: tensors[name].fill_(value))
    with pytest.raises(gsf.CheckpointError, match=rf"packed: {name}: expected finite"):
        from_pretrained(forge.path.parent, rows="mmap")


def test_sites_and_kind_are_those_that_are_told(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    np.savez(folder / "params.npz", **weights(64, 70, 64))
    from_pretrained(folder, rows="mmap")
    told = from_pretrained(folder, rows="mmap", site=gsf.Site("resid", 3))
    assert told.cfg.site == gsf.Site("resid", 3)
    with pytest.raises(gsf.CheckpointError, match=r"kind: expected transcoder, as in params\.npz, got sae"):
        from_pretrained(folder, rows="mmap", kind="transcoder")
