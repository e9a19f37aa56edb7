"""Arrays of more than eight dimensions are refused by every reader, before anything of that size is made."""

import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

import gemmascope_fast as gsf
from gemmascope_fast.files import fields
from gemmascope_fast.files.arrays import open_npz, open_safetensors


def safetensors(path: Path, dimensions: int) -> Path:
    data = save({"a": np.zeros(1, "f4")})
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["a"]["shape"] = [1] * dimensions
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return path


def npz(path: Path, dimensions: int) -> Path:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((1,) * dimensions, "f4"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", buffer.getvalue())
    return path


@pytest.mark.parametrize(("write", "read"), [(safetensors, lambda p: open_safetensors(p)[0]), (npz, open_npz)])
def test_eight_dimensions_are_the_most(tmp_path, write, read):
    assert len(read(write(tmp_path / "good", 8))["a"].shape) == 8
    with pytest.raises(gsf.CheckpointError, match=r"bad.*expected up to 8 sizes"):
        read(write(tmp_path / "bad", 9))


def test_sizes():
    assert fields.sizes(Path("x"), "shape", [1] * 8) == (1,) * 8
    for wrong in ([1] * 9, [-1], [1.0], "11", None):
        with pytest.raises(gsf.CheckpointError, match="x: shape"):
            fields.sizes(Path("x"), "shape", wrong)


@pytest.mark.parametrize("shape", [(0,), (0, 6), (4, 0), (2, 0, 6), (0, 0)])
def test_arrays_without_elements_are_read(tmp_path, shape):
    """A forged file may have them; what needs other sizes says so afterwards."""
    path = tmp_path / "empty.safetensors"
    path.write_bytes(save({"a": np.zeros(shape, "f4")}))
    for transposed in (False, True) if len(shape) == 2 else (False,):
        found = open_safetensors(path)[0]["a"].read(torch.device("cpu"), torch.float32, transposed)
        assert found.shape == shape
