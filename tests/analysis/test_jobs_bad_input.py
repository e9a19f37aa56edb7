"""Wrong input of extract, dashboard, concepts, the comparisons and conversation, by command: one line says what is
wrong, the status is 1, and existing files stay."""

import errno
import gzip
import json
import os
import resource
from contextlib import contextmanager

import pytest
from tiny_model import letters, make_sae, save_model

from gemmascope_fast.analysis.extraction import Store
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.files import atomic as files

for module in ("pyarrow", "scipy", "sklearn", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, another, an SAE, and sound input for every command."""
    where = tmp_path_factory.mktemp("jobs")
    alphabet = "abcdefghijklmnopqrstuvwxyz \n:"
    save_model(where / "a", alphabet)
    save_model(where / "b", alphabet, seed=1)
    save(make_sae(), where / "sae.safetensors")
    texts = [letters(40, seed=i) for i in range(8)]
    jsonl(where / "texts.jsonl", [{"text": t} for t in texts])
    jsonl(where / "pairs.jsonl", [{"chosen": t, "rejected": t[::-1]} for t in texts])
    concepts = [{"text": t, "concept": "xy"[i % 2], "label": 1} for i, t in enumerate(texts)]
    jsonl(where / "concepts.jsonl", concepts)
    variants = [{"group": f"g{i // 2}", "text": t, "label": "ab"[i // 2 % 2]} for i, t in enumerate(texts)]
    jsonl(where / "variants.jsonl", variants)
    jsonl(where / "talk.jsonl", [{"role": r, "content": t[:12]} for r, t in zip(("user", "tool"), texts, strict=False)])
    return where


def jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def words(root, command, data=None, tmp=None):
    """A command that works, its data replaced where `data` is given."""
    model = ["--model", str(root / "a"), "--sae", str(root / "sae.safetensors")]
    text = str(data or root / "texts.jsonl")
    return {
        "extract": ["extract", *model, "--window", "100", "--text", text, "--out", str(tmp and tmp / "out")],
        "concepts": [
            "concepts",
            *model,
            "--data",
            str(data or root / "concepts.jsonl"),
            "--methods",
            "SAE",
            "--factors",
        ],
        "sets": ["compare", "texts", *model, "--a", text, "--b", str(root / "texts.jsonl")],
        "pairs": ["compare", "texts", *model, "--no-covariates", "--pairs", str(data or root / "pairs.jsonl")],
        "models": ["compare", "models", *model, "--model-b", str(root / "b"), "--text", text],
        "variants": [
            "compare",
            "variants",
            *model,
            "--labels",
            "a",
            "b",
            "--data",
            str(data or root / "variants.jsonl"),
        ],
        "conversation": ["compare", "conversation", *model, "--transcript", str(data or root / "talk.jsonl")],
    }[command]


SOURCES = {
    "extract": "texts.jsonl", "concepts": "concepts.jsonl", "sets": "texts.jsonl", "pairs": "pairs.jsonl",
    "models": "texts.jsonl", "variants": "variants.jsonl", "conversation": "talk.jsonl",
}  # fmt: skip


def said(words, capsys):
    """What stands on stderr after the progress bars, of a command that must fail."""
    capsys.readouterr()
    assert cli.main(words) == 1
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]


@pytest.mark.parametrize("command", SOURCES)
@pytest.mark.parametrize("line", ['{"text": "x', "[1]", "\xff"], ids=["cut short", "an array", "no UTF-8"])
def test_a_malformed_line_is_named(root, tmp_path, capsys, command, line):
    data = tmp_path / "bad.jsonl"
    good = (root / SOURCES[command]).read_bytes().splitlines(keepends=True)
    data.write_bytes(good[0] + b"\n" + line.encode("latin-1") + b"\n" + b"".join(good[1:]))
    # conversation takes a whole JSON array too: this file begins with an object
    message = said(words(root, command, data, tmp_path), capsys)
    assert f"{data}, line 3: expected" in message
    assert message.startswith("gemmascope-fast ")


@pytest.mark.parametrize("command", SOURCES)
def test_half_a_surrogate_pair_and_json_too_deep_are_named(root, tmp_path, capsys, command):
    good = (root / SOURCES[command]).read_text()
    line = good.count("\n") + 1
    own = words(root, command, tmp_path / "bad.jsonl", tmp_path)
    (tmp_path / "bad.jsonl").write_text(good + good.splitlines()[0].replace(': "', ': "\\ud800') + "\n")
    assert f"bad.jsonl, line {line}: expected text under" in said(own, capsys)
    (tmp_path / "bad.jsonl").write_text(good + "[" * 200_000 + "\n")
    assert f"bad.jsonl, line {line}: expected one JSON object" in said(own, capsys)


def test_an_array_of_turns_that_is_too_deep_is_named(root, tmp_path, capsys):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    assert "deep.json: expected a JSON array of turns" in said(
        words(root, "conversation", tmp_path / "deep.json"), capsys
    )


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "junk.jsonl.gz", "plain.txt.gz", "flipped.txt.gz"])
def test_a_damaged_gzip_file_is_named(root, tmp_path, capsys, name):
    packed = gzip.compress((root / "texts.jsonl").read_bytes())
    flipped = bytearray(packed)
    flipped[30] ^= 0xFF
    contents = {"cut": packed[:-12], "junk": b"\x1f\x8b\x08\0junk", "plain": b"no gzip", "flipped": bytes(flipped)}
    (tmp_path / name).write_bytes(contents[name.split(".")[0]])
    assert f"{tmp_path / name}: expected a whole gzip file" in said(
        words(root, "extract", tmp_path / name, tmp_path), capsys
    )


def test_a_damaged_page_of_a_parquet_file_is_named(root, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["abc"] * 100}), path)
    data = bytearray(path.read_bytes())
    data[10:40] = b"\xff" * 30
    path.write_bytes(data)
    assert f"{path}: expected a Parquet file whose pages" in said(words(root, "extract", path, tmp_path), capsys)


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("extract", ["--device", "banana"], "--device: expected cpu, cuda or cuda:N, got 'banana'"),
        ("models", ["--most", "-1"], "--most: expected at least 1, got -1"),
        ("concepts", ["--reft-steps", "-1"], "--reft-steps: expected at least 1, got -1"),
    ],
)
def test_numbers_and_names_that_mean_nothing_are_told(root, tmp_path, capsys, command, more, message):
    assert message in said([*words(root, command, None, tmp_path), *more], capsys)


# `extract` alone reads parts of any number; what holds a text together wants all of it
@pytest.mark.parametrize("command", SOURCES)
def test_a_text_longer_than_the_models_window(root, tmp_path, capsys, command):
    data = tmp_path / "long.jsonl"
    records = [json.loads(line) for line in (root / SOURCES[command]).read_text().splitlines()]
    for key in ("text", "chosen", "content"):
        if key in records[1]:
            records[1][key] = letters(300, seed=9)
    jsonl(data, records)
    own = words(root, command, data, tmp_path)
    if command == "extract":
        assert cli.main(own) == 0
        store = Store(tmp_path / "out")
        texts = [r["text"].strip() for r in records]
        lengths = [len(store.read("tokens", 0)["document"][store.read("tokens", 0)["document"] == d]) for d in range(8)]
        assert lengths == [len(text) for text in texts]
        assert max(lengths) >= 298
        return
    assert "expected at most 25" in said(own, capsys)
    if command in ("sets", "pairs", "models"):  # read in parts where that is asked for
        assert cli.main([*own, "--window", "100"]) == 0


@pytest.mark.parametrize(
    ("command", "records", "message"),
    [
        (
            "concepts",
            [{"text": "ab", "concept": "x", "label": 0}] * 5,
            "'x': expected at least 4 texts of label 1, got 0",
        ),
        ("concepts", [], "expected at least one"),
        ("sets", [], "--a: expected at least two texts, got 0"),
        ("pairs", [], "expected at least three pairs, got 0"),
        ("models", [{"text": " \n"}], "--text: expected at least one text"),
        ("variants", [], "expected at least one text"),
        ("conversation", [], "expected at least one turn"),
    ],
)
def test_an_empty_class_is_named(root, tmp_path, capsys, command, records, message):
    jsonl(tmp_path / "few.jsonl", records)
    assert message in said(words(root, command, tmp_path / "few.jsonl"), capsys)


def test_nothing_to_extract_is_an_empty_store_with_an_empty_dashboard(root, tmp_path):
    (tmp_path / "nothing.jsonl").write_text("\n")
    assert cli.main(words(root, "extract", tmp_path / "nothing.jsonl", tmp_path)) == 0
    store = Store(tmp_path / "out")
    assert (store.tokens, store.shards, store.manifest["complete"]) == (0, [], True)
    made = ["dashboard", "--latents", str(tmp_path / "out"), "--no-weights", "--out", str(tmp_path / "site")]
    assert cli.main(made) == 0
    assert "never fires on this text" in (tmp_path / "site" / "feature" / "0.html").read_text()


@contextmanager
def files_end_at(size):
    """A limit on the size of files stands for the disk: writes fail in the middle of one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITTEN = [(c, "json") for c in SOURCES] + [(c, "plot") for c in SOURCES if c != "conversation"]


# what `extract` writes besides fails first: its own test is in test_extraction.py
@pytest.mark.parametrize(("command", "kind"), [*(w for w in WRITTEN if w[0] != "extract"), ("conversation", "html")])
def test_a_full_disk_keeps_the_earlier_file(root, tmp_path, capsys, command, kind):
    path = tmp_path / f"figures.{'svg' if kind == 'plot' else kind}"
    path.write_text("the earlier one")
    with files_end_at(64):
        message = said([*words(root, command), f"--{kind}", str(path), "--overwrite"], capsys)
    assert message.endswith(f"{path}: File too large")
    assert path.read_text() == "the earlier one"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_no_index_of_half_a_site(root, tmp_path, capsys):
    assert cli.main(words(root, "extract", None, tmp_path)) == 0
    site = tmp_path / "site"
    made = ["dashboard", "--latents", str(tmp_path / "out"), "--no-weights", "--out", str(site)]
    with files_end_at(64):
        assert "dashboard.npz: File too large" in said(made, capsys)
    assert cli.main(["dashboard", *made[1:-2], "--json", str(tmp_path / "f.json")]) == 0
    with files_end_at(3000):
        assert "feature/0.html: File too large" in said(made, capsys)
    assert not (site / "index.html").exists()
    assert cli.main([*made, "--overwrite"]) == 0
    assert (site / "index.html").exists()
    Store(tmp_path / "out").check()


def test_a_disk_without_space_is_called_full(tmp_path, monkeypatch):
    def no_space(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from gemmascope_fast.files.results import write_json

    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match=r"f\.json: the disk is full$"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", [c for c in SOURCES if c != "conversation"])
def test_places_that_cannot_be_written_are_told_first(root, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_pair", lambda *_: pytest.fail("a model was loaded"))
    own = words(root, command, None, tmp_path)
    (tmp_path / "file").write_text("")
    wrong = tmp_path / "file" / "f.json"
    assert f"--json: expected a place in a folder, got {wrong}: {tmp_path / 'file'} is a file" in said(
        [*own, "--json", str(wrong)], capsys
    )
    assert "--plot: expected a name ending in .png" in said([*own, "--plot", str(tmp_path / "p.jpeg")], capsys)
