"""Files are written atomically, synced, with the umask's permissions; special tokens at the beginning of a text."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from gemmascope_fast.attach.tokens import ends, opening
from gemmascope_fast.files.atomic import replacing
from gemmascope_fast.files.results import write_json


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, there):
    path = tmp_path / "a.json"
    if there:
        path.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert os.listdir(tmp_path) == (["a.json"] if there else [])
    assert not there or path.read_text() == "old"


def test_permissions_are_the_umasks_whoever_wrote(tmp_path):
    """safetensors writes files that their owner alone may read."""
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
    finally:
        os.umask(old)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def replaced(source, target):
        done.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("a")
    assert done == [str(temporary), "replaced", str(tmp_path)]


@pytest.mark.parametrize(
    ("bos", "cls", "sep", "opens", "both"),
    [
        (2, None, None, [2], (2, None)),
        (2, 101, 102, [2], (2, None)),
        (None, 101, 102, [], (101, 102)),
        (None, None, None, [], (None, None)),
    ],
)
def test_what_a_text_opens_with(bos, cls, sep, opens, both):
    tokenizer = SimpleNamespace(bos_token_id=bos, cls_token_id=cls, sep_token_id=sep)
    assert opening(tokenizer) == opens
    assert ends(tokenizer) == both
