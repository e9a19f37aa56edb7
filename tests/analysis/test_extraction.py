"""Extraction: against plain forwards, killed and resumed, damaged, on a full disk, from every kind of source."""

import gzip
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import BOS, LAYER, D, F, letters, make_sae, save_model

from gemmascope_fast.analysis.extraction import Document, Extractor, Store, StoreError, documents, extract, resolve
from gemmascope_fast.analysis.extraction.sources import stripped
from gemmascope_fast.analysis.extraction.windows import Cursor, batches, blocks
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.cli import main as cli

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
duckdb = pytest.importorskip("duckdb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def sae():
    return make_sae()


TEXTS = [letters(n, seed=n) for n in (5, 130, 0, 40, 41, 7, 300, 40, 1, 64)]


def source(texts):
    return lambda: (Document([t], "here", i + 1, lambda i=i: i + 1) for i, t in enumerate(texts))


def run(loaded, sae, out, texts=TEXTS, window=60, batch=200, shard=90, **more):
    extractor = Extractor(*loaded, sae, window, batch)
    return extract(extractor, source(texts), out, about={"sae": "own"}, shard=shard, **more)


def files(folder):
    """What counts: every file's bytes, the lock left out."""
    found = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {str(name): data for name, data in found.items() if name.name != ".lock"}


def dense(table, documents_, d_sae=F):
    """fp32 [tokens, d_sae] of a table of latents, with the row of each (document, position)."""
    start = np.concatenate([[0], np.cumsum([len(t) for t in documents_])])
    out = torch.zeros(int(start[-1]), d_sae)
    rows = start[table["document"].to_numpy()] + table["position"].to_numpy()
    out[torch.from_numpy(rows), torch.from_numpy(table["feature"].to_numpy()).long()] = torch.from_numpy(
        table["value"].to_numpy().copy()
    )
    return out


def test_latents_are_those_of_plain_forwards(loaded, sae, tmp_path):
    model, tokenizer = loaded
    store = run(loaded, sae, tmp_path / "out")
    assert len(store.shards) > 3
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for at in range(0, len(ids), 60):
                hidden = model(torch.tensor([[BOS, *ids[at : at + 60]]]), output_hidden_states=True).hidden_states
                rows.append(hidden[LAYER + 1][0, 1:])
    z = torch.cat(rows).double() @ sae.W_enc.detach().double()
    want = z * (z > 1)
    got = dense(pa.concat_tables([pq.read_table(p) for p in store.paths("latents")]), TEXTS).double()
    # padding and the batch change the sums' order in the model: rounding of activations of about 5, d = 32 products
    slack = 2**-23 * 100 * float(z.abs().max())
    sure = (z - 1).abs() > slack
    assert torch.equal((got != 0)[sure], (want != 0)[sure])
    assert float((got - want)[sure].abs().max()) < slack
    assert sure.float().mean() > 0.99


def test_the_tables_hold_every_token_once_and_duckdb_agrees(loaded, sae, tmp_path):
    _, tokenizer = loaded
    store = run(loaded, sae, tmp_path / "out")
    tokens = duckdb.sql(f"from read_parquet('{tmp_path}/out/tokens/*.parquet') order by document, position").fetchall()
    want = [
        (d, p, i, True)
        for d, text in enumerate(TEXTS)
        for p, i in enumerate(tokenizer(text, add_special_tokens=False)["input_ids"])
    ]
    assert tokens == want
    latents = f"read_parquet('{tmp_path}/out/latents/*.parquet')"
    count, low, high = duckdb.sql(f"select count(*), min(feature), max(feature) from {latents}").fetchall()[0]
    assert count == sum(s["rows"]["latents"] for s in store.shards)
    assert low >= 0
    assert high < F
    fired = dict(duckdb.sql(f"select feature, count(*) from {latents} group by feature").fetchall())
    from gemmascope_fast.cli.extract import firing

    assert {f: n for f, n in enumerate(firing(store).tolist()) if n} == fired
    ascending = duckdb.sql(
        f"select count(*) from (select (document, position, feature) as k, lag(k) over () as before from {latents})"
        " where before is not null and k <= before"
    ).fetchall()[0]
    assert ascending == (0,)
    named = duckdb.sql(f"from read_parquet('{tmp_path}/out/documents/*.parquet') order by document").fetchall()
    assert named == [(d, "here", d + 1, None) for d in range(len(TEXTS))]


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_interrupted_extraction_goes_on_to_the_same_bytes(loaded, sae, tmp_path, at):
    run(loaded, sae, tmp_path / "whole")
    calls = []

    def progress(tokens, done):
        calls.append(tokens)
        if len(calls) == at:
            raise Stop

    with pytest.raises(Stop):
        run(loaded, sae, tmp_path / "cut", progress=progress)
    cut = tmp_path / "cut"
    before = len(Store(cut).shards)
    # what a kill can leave: half a line, a shard without its line, a temporary file
    with open(cut / "shards.jsonl", "ab") as journal:
        journal.write(b'{"shard": 99')
    (cut / "latents" / ".000099.parquet.0.tmp").write_bytes(b"half")
    (cut / "latents" / f"{before:06d}.parquet").write_bytes(b"not recorded")
    done = []
    run(loaded, sae, cut, progress=lambda tokens, _: done.append(tokens))
    assert files(cut) == files(tmp_path / "whole")
    assert sum(done) == sum(len(t) for t in TEXTS) - sum(s["read"] for s in Store(cut).shards[:before])
    stamp = (cut / "latents" / "000000.parquet").stat().st_mtime_ns
    run(loaded, sae, cut, progress=lambda *_: pytest.fail("nothing was left to do"))
    assert (cut / "latents" / "000000.parquet").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_killed_by_signal_nine_it_resumes_to_the_same_bytes(folder, sae, tmp_path):
    from gemmascope_fast.checkpoints.native import save

    save(sae, tmp_path / "sae.safetensors")
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": letters(50 + 7 * i % 90, seed=i)}) for i in range(120)]
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "killed"
    words = ["extract", "--model", str(folder), "--sae", str(tmp_path / "sae.safetensors"), "--text", str(text)]
    words += ["--window", "64", "--shard", "400"]
    child = subprocess.Popen([sys.executable, "-m", "gemmascope_fast.cli.main", *words, "--out", str(out)])
    deadline = time.monotonic() + 120
    while not (out / "shards.jsonl").exists() or (out / "shards.jsonl").read_bytes().count(b"\n") < 3:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not Store(out).manifest["complete"]
    assert cli.main([*words, "--out", str(out)]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert files(out) == files(tmp_path / "whole")


def test_a_damaged_shard_is_named_and_made_anew(loaded, sae, tmp_path):
    out = tmp_path / "out"
    run(loaded, sae, out)
    want = files(out)
    broken = out / "latents" / "000002.parquet"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(bytes(data))
    (out / "tokens" / "000003.parquet").unlink()
    with pytest.raises(StoreError, match=r"000002.parquet was changed.*2 shards"):
        run(loaded, sae, out)
    with pytest.raises(StoreError, match="000002"):
        Store(out).check()
    run(loaded, sae, out, repair=True)
    assert files(out) == want


def test_a_full_disk_loses_nothing(loaded, sae, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle of a shard."""
    run(loaded, sae, tmp_path / "whole", window=250)
    first, second, *_ = [p.stat().st_size for p in sorted((tmp_path / "whole" / "latents").iterdir())]
    others = max(p.stat().st_size for p in (tmp_path / "whole" / "tokenizer").iterdir())
    assert max(first, others) < second
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(first, others), limits[1]))
    try:
        with pytest.raises(OSError, match=r"latents/000001.parquet.*finished shards are safe"):
            run(loaded, sae, tmp_path / "out", window=250)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(Store(tmp_path / "out").shards) == 1
    assert not list((tmp_path / "out").rglob("*.tmp"))
    run(loaded, sae, tmp_path / "out", window=250)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_extraction_is_not_mixed_in(loaded, sae, tmp_path):
    out = tmp_path / "out"
    run(loaded, sae, out)
    with pytest.raises(StoreError, match=r"window 60 .now 50"):
        run(loaded, sae, out, window=50)
    with pytest.raises(StoreError, match="sae_fingerprint"):
        run(loaded, make_sae(seed=2), out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    with pytest.raises(StoreError, match="empty folder"):
        run(loaded, sae, other)
    shutil.rmtree(out)

    def stop(tokens, _done):
        if tokens:
            raise Stop

    calls = iter([False, False, False, False, True])
    with pytest.raises(Stop):
        run(loaded, sae, out, progress=lambda tokens, done: next(calls) and stop(1, done))
    changed = [TEXTS[0], "z" + TEXTS[1][1:], *TEXTS[2:]]
    with pytest.raises(ValueError, match="not the one that this extraction read"):
        run(loaded, sae, out, texts=changed)
    with pytest.raises(ValueError, match="now there are only 1"):
        run(loaded, sae, out, texts=TEXTS[:1])
    # what comes later may be mended
    run(loaded, sae, out, texts=[*TEXTS[:-1], "mended"])


def test_two_processes_do_not_write_one_folder(loaded, sae, tmp_path):
    def within(_tokens, _done):
        with pytest.raises(StoreError, match="another process"):
            run(loaded, sae, tmp_path / "out")

    run(loaded, sae, tmp_path / "out", progress=within, texts=TEXTS[:1])


def test_blocks_go_on_from_every_end(loaded):
    _, tokenizer = loaded
    texts = [*TEXTS, "", ""]
    whole = list(blocks(source(texts)(), tokenizer, window=30, size=64))
    assert [w for b in whole for w in b.windows] == [
        (d, at, tokenizer(text[at : at + 30], add_special_tokens=False)["input_ids"])
        for d, text in enumerate(texts)
        for at in range(0, len(text), 30)
    ]
    assert [d[0] for b in whole for d in b.documents] == list(range(len(texts)))
    assert all(b.tokens >= 64 for b in whole[:-1])
    for i, block in enumerate(whole[:-1]):
        assert list(blocks(source(texts)(), tokenizer, window=30, size=64, start=block.end)) == whole[i + 1 :]
    (rest,) = blocks(source(texts)(), tokenizer, window=30, size=64, start=whole[-1].end)
    assert not rest.windows
    with pytest.raises(ValueError, match="not the one"):
        list(blocks(source(texts)(), tokenizer, window=30, size=64, start=Cursor(2, 1, "00")))


def test_batches_hold_every_window_once_within_bounds():
    lengths = [3, 17, 9, 9, 30, 1, 12, 12, 8]
    found = batches(lengths, 30)
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert all(len(rows) * max(lengths[i] for i in rows) <= 30 for rows in found)
    assert batches([50], 30) == [[0]]


def test_a_window_that_the_model_lacks_is_refused(loaded, sae):
    Extractor(*loaded, sae, 255)
    with pytest.raises(ValueError, match="--window: expected 1 to 255"):
        Extractor(*loaded, sae, 256)


# ---- sources ----------------------------------------------------------------------------------------


def read(names, **more):
    return [("".join(d.parts), d.record) for d in documents(resolve([str(n) for n in names]), **more)]


def test_text_files_as_one_as_paragraphs_as_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\n\nfour")
    assert read([path]) == [("one\ntwo\n\n\nthree\n\nfour", 1)]
    assert read([path], split="paragraph") == [("one\ntwo", 1), ("three", 5), ("four", 7)]
    assert read([path], split="line") == [("one", 1), ("two", 2), ("three", 5), ("four", 7)]
    packed = tmp_path / "b.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read([packed], split="line") == read([path], split="line")
    with pytest.raises(ValueError, match="--split"):
        read([path], split="word")


SENTENCES = ["the dogs ran", "a letter for the king", "cold", "two words"]


def sources_of_the_same(folder):
    """(names for --text, --split) of every kind of source that holds the same sentences."""
    rows = [{"text": f" {text}\n" if i % 2 else text, "label": i} for i, text in enumerate(SENTENCES)]
    unix, dos, gaps, packed = (folder / name for name in ("unix.txt", "dos.txt", "gaps.txt", "packed.txt.gz"))
    unix.write_text("\n".join(SENTENCES) + "\n")
    dos.write_bytes("\r\n".join(SENTENCES).encode())
    gaps.write_text("\n\n\n".join(f"  {text}  " for text in SENTENCES) + "\n\n")
    packed.write_bytes(gzip.compress(unix.read_bytes()))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet")
    singles = [folder / f"{i}.txt" for i in range(len(SENTENCES))]
    for path, text in zip(singles, SENTENCES, strict=True):
        path.write_text(f"\n{text} \n\n")
    return {
        "lines": ([unix], "line"), "lines of DOS": ([dos], "line"), "lines and spaces": ([gaps], "line"),
        "paragraphs": ([gaps], "paragraph"), "gzip": ([packed], "line"), "JSON lines": ([folder / "a.jsonl"], "file"),
        "Parquet": ([folder / "b.parquet"], "file"), "files": (singles, "file"),
    }  # fmt: skip


def test_every_source_of_the_same_sentences_gives_the_same_latents(loaded, sae, tmp_path, monkeypatch):
    found = {}
    for name, (paths, split) in sources_of_the_same(tmp_path).items():
        names = [str(path) for path in paths]
        assert ["".join(d.parts) for d in documents(resolve(names), split=split)] == SENTENCES, name
        extract(Extractor(*loaded, sae, 60), partial(documents, resolve(names), split=split), tmp_path / name, about={})
        found[name] = Store(tmp_path / name)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(SENTENCES)))
    assert ["".join(d.parts) for d in documents(resolve(["-"]), split="line")] == SENTENCES
    for name, store in found.items():
        for table in ("latents", "tokens"):
            want, got = found["lines"].read(table, 0), store.read(table, 0)
            assert all(np.array_equal(want[column], got[column]) for column in want), (name, table)
    # what else a record says is kept beside its text
    for name in ("JSON lines", "Parquet"):
        about = found[name].read("documents", 0)["about"].tolist()
        assert list(map(json.loads, about)) == [{"label": i} for i in range(len(SENTENCES))]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", ["", " \n ", " a", "a  b\n\n c \n", "\n\n\nab \t"])
def test_a_text_in_parts_is_stripped_as_a_whole(text, size):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(stripped(parts)) == text.strip()


def test_json_lines_and_parquet_and_folders(tmp_path):
    rows = [{"text": "नमस्ते", "n": 1}, {"text": "مرحبا\nb", "n": 2}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read([path]) == [("नमस्ते", 1), ("مرحبا\nb", 3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read([tmp_path / "b.parquet"]) == [("नमस्ते", 1), ("مرحبا\nb", 2)]
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / "ignored.png").write_text("no text")
    sources = resolve([str(tmp_path)])
    assert [Path(s.name).name for s in sources] == ["a.jsonl", "b.parquet", "c.txt"]
    done = [d.done() for d in documents(sources) if list(d.parts)]
    assert done == sorted(done)
    assert done[-1] == sum(s.size for s in sources)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "line 2: expected one JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "line 3: expected a JSON object"),
        ("a.jsonl", b'{"other": "x"}\n', "line 1: expected a string under 'text'.*it has other"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: expected a string under 'text', got 3"),
        ("a.jsonl", b'{"text": "x"}\n"\xff"\n', "line 2: expected UTF-8"),
        ("a.txt", b"abc\xff", "expected UTF-8.*near byte 3"),
        ("a.parquet", b"no parquet", "expected a Parquet file"),
        ("a.doc", b"", "expected a name ending in"),
    ],
)
def test_bad_records_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read([tmp_path / name])


def test_a_bad_line_keeps_what_came_before(folder, sae, tmp_path, capsys):
    from gemmascope_fast.checkpoints.native import save

    save(sae, tmp_path / "sae.safetensors")
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": "x" + letters(78, seed=i) + "x"}) for i in range(6)]
    path.write_text("\n".join([*good[:4], good[4][:-3], good[5]]))
    words = ["extract", "--model", str(folder), "--sae", str(tmp_path / "sae.safetensors"), "--text", str(path)]
    words += ["--out", str(tmp_path / "out"), "--window", "100", "--shard", "80", "--json", str(tmp_path / "f.json")]
    assert cli.main(words) == 1
    assert "a.jsonl, line 5: expected one JSON object" in capsys.readouterr().err
    assert len(Store(tmp_path / "out").shards) == 3
    path.write_text("\n".join(good))
    assert cli.main(words) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["tokens"] == 480
    assert figures["tokens_this_time"] == 240
    assert figures["complete"] is True
    plot = tmp_path / "plot.svg"
    assert cli.main(["extract", "--out", str(tmp_path / "out"), "--check", "--plot", str(plot)]) == 0
    assert "<svg" in plot.read_text()


def test_the_sae_is_read_at_the_layer_that_is_named(folder, loaded, tmp_path):
    from gemmascope_fast.checkpoints.native import save

    sae = make_sae()
    sae.cfg.site = None
    save(sae, tmp_path / "sae.safetensors")
    (tmp_path / "t.txt").write_text(letters(50))
    words = ["extract", "--model", str(folder), "--sae", str(tmp_path / "sae.safetensors")]
    words += ["--text", str(tmp_path / "t.txt"), "--out"]
    assert cli.main([*words, str(tmp_path / "none"), "--window", "60"]) == 1
    assert cli.main([*words, str(tmp_path / "zero"), "--window", "60", "--layer", "0"]) == 0
    assert Store(tmp_path / "zero").settings["hook_name"] == "model.layers.0.output"
    assert sae.W_enc.shape[0] == D
