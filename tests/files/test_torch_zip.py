"""Files of torch.save, read without unpickling: what is read is what torch.load gives, and anything else is refused."""

import collections
import io
import os
import pickle
import zipfile

import pytest
import torch

from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files.arrays import Entry
from gemmascope_fast.files.torch_zip import MAX_PICKLE, open_torch

CPU = torch.device("cpu")


def read(path):
    """Every tensor of the file in memory."""
    return {n: v.read(CPU, v.dtype, finite=False) if isinstance(v, Entry) else v for n, v in open_torch(path).items()}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]
)
def test_tensors_of_every_layout(tmp_path, dtype):
    big = torch.arange(60).reshape(5, 12).to(dtype)
    held = {
        "plain": big, "transposed": big.t(), "rows": big[1:3], "vector": big[2], "number": big[0, 3], "none": big[:0],
        "one column": big[:, :1].clone(), "one": big[:1, :1], "parameter": torch.nn.Parameter(big, requires_grad=False),
        "three": big.reshape(5, 3, 4),
    }  # fmt: skip
    torch.save(held, tmp_path / "x.pt")
    got = read(tmp_path / "x.pt")
    assert list(got) == list(held)
    for name, tensor in held.items():
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor.data), name


def test_a_state_dict_and_what_stands_beside_it(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    held = module.state_dict()
    held |= {"activation": "TopK", "about": {"k": 3, "rate": 0.5, "on": True, "off": None, "sizes": [1, (2, 3)]}}
    held |= {"dtype": torch.bfloat16, "device": torch.device("cuda", 1), "big": 1 << 40}
    torch.save(held, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=True)
    got = read(tmp_path / "x.pt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(got[name], tensor), name
    assert got["about"] == held["about"]
    assert (got["dtype"], got["device"], got["big"]) == ("torch.bfloat16", "cuda:1", 1 << 40)


def test_shared_storage_is_read_for_each(tmp_path):
    base = torch.arange(12.0)
    torch.save({"a": base[:4], "b": base[4:].reshape(2, 4)}, tmp_path / "x.pt")
    got = read(tmp_path / "x.pt")
    assert torch.equal(got["b"], base[4:].reshape(2, 4))


def test_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read(tmp_path / "x.pt")["a"], torch.arange(5.0))


class Runs:
    """Would run a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2),
        collections.Counter("aab"),
        {1, 2},
        torch.zeros(2, 2).to_sparse(),
        torch.nn.Linear,
        torch.zeros(3).expand(4, 3),
        torch.zeros(4, 4)[:, :2],
    ],
    ids=["module", "counter", "set", "sparse", "class", "expanded", "strided"],
)
def test_what_is_more_than_tensors_is_refused(tmp_path, value):
    torch.save({"a": torch.ones(2), "b": value}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: (data\.pkl: expected tensors|b: (expected rows|shape))"):
        open_torch(tmp_path / "x.pt")


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "made"
    torch.save({"a": Runs(marker)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"got a call of posix\.mkdir: it is not loaded"):
        open_torch(tmp_path / "x.pt")
    assert not marker.exists()
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Runs(marker)))
    with pytest.raises(CheckpointError, match="got a bare pickle, which is never loaded"):
        open_torch(tmp_path / "bare.pt")
    assert not marker.exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since version 1\.6, got a bare pickle"):
        open_torch(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="expected a dict of tensors, got list"):
        open_torch(path)
    torch.save({3: torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="expected names that are text, got 3"):
        open_torch(path)
    for data in (b"", b"PK", b"text"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"not a readable file of torch\.save"):
            open_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/other", "")
    with pytest.raises(CheckpointError, match=r"without data\.pkl"):
        open_torch(path)
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="expected a regular file, got a FIFO"):
        open_torch(path)


def archive_of(path, **members):
    """A file of torch.save with some of its members replaced: name → bytes, None to leave it out."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            data = members.get(name.replace("/", "_").replace(".", "_"), old.read(info))
            if data is not None:
                new.writestr(info.filename, data)
    return path


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"data_0": b"\0" * 20}, "a: 6 numbers of torch.float32 do not fit 20 bytes"),
        ({"data_0": None}, "a: its numbers are missing"),
        ({"data_pkl": b"\x80\x02}q\x00."}, None),
        ({"data_pkl": b"\x80\x02}q\x00"}, "data.pkl: "),
        ({"data_pkl": b"\x80\x02]."}, "expected a dict"),
        ({"data_pkl": b"."}, "data.pkl: not readable"),
        ({"data_pkl": b"\x80\x02h\x07."}, "data.pkl: not readable"),
        ({"data_pkl": b"\x80\x02}(K\x01."}, None),
        ({"data_pkl": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."}, None),
        ({"data_pkl": b"\x80\x02N."}, "expected a dict"),
        ({"data_pkl": b"\x80\x02" + b"N" * MAX_PICKLE + b"."}, "expected at most"),
        ({"byteorder": b"big"}, "byteorder: expected little"),
    ],
)
def test_damaged_files(tmp_path, members, said):
    path = archive_of(tmp_path / "x.pt", **members)
    if said is None:  # harmless: an empty dict, a dict that holds itself, values below the one that counts
        try:
            open_torch(path)
        except CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017
        return
    with pytest.raises(CheckpointError, match=said):
        open_torch(path)


def test_a_small_pickle_cannot_ask_for_much(tmp_path):
    """A memo index of 2³¹ has a C unpickler take gigabytes, and dicts of dicts can stand for more than they are."""
    open_torch(archive_of(tmp_path / "memo.pt", data_pkl=b"\x80\x02}r\xff\xff\xff\x7f."))
    nested = b"\x80\x02}q\x00"
    for i in range(1, 60):
        inner = b"".join(b"X\x02\x00\x00\x00%02dh%c" % (j, i - 1) for j in range(20))
        nested += b"}q%c(" % i + inner + b"u"
    open_torch(archive_of(tmp_path / "nested.pt", data_pkl=nested + b"."))
    nested = b"\x80\x02}" + b"".join(b"X\x03\x00\x00\x00%03d}s" % i for i in range(100)) + b"."
    with pytest.raises(CheckpointError, match="expected a few dicts"):
        open_torch(archive_of(tmp_path / "many.pt", data_pkl=nested))


def test_a_file_cut_off_while_it_is_read(tmp_path):
    torch.save({"a": torch.arange(100000.0)}, tmp_path / "x.pt")
    entry = open_torch(tmp_path / "x.pt")["a"]
    os.truncate(tmp_path / "x.pt", 5000)
    with pytest.raises(CheckpointError, match="a: truncated"):
        entry.read(CPU, torch.float32)
    with pytest.raises(CheckpointError):
        open_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x06\x85", b"K\x0c\x85"),
        (b"K\x00K\x06\x85", b"K\x03K\x06\x85"),
        (b"K\x00K\x06\x85", b"J\xfa\xff\xff\xffK\x06\x85"),
    ],
    ids=["shape", "offset", "negative offset"],
)
def test_a_tensor_that_its_storage_does_not_hold(tmp_path, old, new):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        held = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert held.count(old) == 1
    with pytest.raises(CheckpointError, match=r"does not fit 6 numbers|storage_offset: expected an integer"):
        open_torch(archive_of(tmp_path / "x.pt", data_pkl=held.replace(old, new)))
