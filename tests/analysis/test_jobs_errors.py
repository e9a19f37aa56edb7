"""Errors that come early and with one message: coders that no command accepts, paths that cannot be written, latents
that are not finite, a shard that differs when made again, a journal that is not on the disk."""

import errno
import os
import stat

import numpy as np
import pytest
import torch
from crash_points import Disk, tree
from tiny_model import LAYER, D, letters, make_sae, save_model
from transformers import AutoModelForCausalLM

from gemmascope_fast import Site
from gemmascope_fast.analysis.extraction import Store, StoreError
from gemmascope_fast.analysis.extraction.store import Writer
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.files import atomic as files
from gemmascope_fast.files import identity
from gemmascope_fast.sae.multi_site import Crosscoder, CrossLayerTranscoder

for module in ("pyarrow", "scipy", "sklearn", "matplotlib"):
    pytest.importorskip(module)
COMMANDS = ("demo", "eval", "extract", "concepts", "compare-texts", "compare-models", "variants", "conversation",
            "compare", "profile", "watch")  # fmt: skip

NAMES = {  # short name here: words of the command
    "compare-texts": "compare texts", "compare-models": "compare models", "variants": "compare variants",
    "conversation": "compare conversation", "compare": "quantize tables", "profile": "dev profile",
    "gpu-check": "dev gpu-check", "report": "dev report", "bench": "dev bench",
}  # fmt: skip


def named(command):
    return NAMES.get(command, command).split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    where = tmp_path_factory.mktemp("errors")
    save_model(where / "model", letters="abcdefghijklmnopqrstuvwxyz \n:")
    save(make_sae(features=8), where / "sae.safetensors")
    (where / "t.txt").write_text("\n\n".join(letters(60, seed=i) for i in range(6)))
    return where


def said(words, capsys):
    """The one line on stderr, after progress bars, of a command that must fail."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 1
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]


def words(root, tmp_path, command, sae):
    pair = ["--model", root / "model", "--sae", sae]
    text = root / "t.txt"
    more = {
        "demo": ["--prompt", "abc"], "eval": ["--text", text], "extract": ["--text", text, "--out", tmp_path / "out"],
        "compare-texts": ["--a", text, "--b", text], "compare-models": ["--model-b", root / "model", "--text", text],
        "compare": ["--work", tmp_path / "work"], "watch": ["--prompt", "abc"],
    }  # fmt: skip
    return [*named(command), *pair, *more.get(command, [])]


def of_several_sites(kind):
    sites = [Site("mlp_in", i) for i in range(2)]
    one = make_sae(features=8)
    if kind == "crosscoder":
        weights = {"W_enc": torch.cat([one.W_enc] * 2).detach(), "W_dec": torch.cat([one.W_dec] * 2, 1).detach()}
        vectors = {"b_enc": torch.zeros(8), "b_dec": torch.zeros(2 * D), "threshold": torch.ones(8)}
        return Crosscoder.from_weights(**weights, **vectors)
    made = CrossLayerTranscoder.from_weights(
        W_enc=[one.W_enc.detach()] * 2, W_dec=[torch.zeros(8, 2, D)] * 2, b_enc=[torch.zeros(8)] * 2,
        b_dec=[torch.zeros(D)] * 2, threshold=[torch.ones(8)] * 2,
    )  # fmt: skip
    made.cfg.sites = tuple(sites)
    return made


@pytest.mark.parametrize("kind", ["cross_layer_transcoder", "crosscoder"])
@pytest.mark.parametrize("layer", [[], ["--layer", "1"]], ids=["own layer", "--layer"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_coder_of_several_sites_is_one_sentence(root, tmp_path, capsys, monkeypatch, command, layer, kind):
    made = of_several_sites(kind)
    monkeypatch.setattr("gemmascope_fast.analysis.pair.from_pretrained", lambda *_: made)
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_model", lambda *_: pytest.fail("a model was loaded"))
    message = said([*words(root, tmp_path, command, "some/clt"), *layer], capsys)
    assert message == (
        f"gemmascope-fast {' '.join(named(command))}: --sae some/clt: expected an SAE or transcoder that reads one site"
        " and writes one,"
        f" got a {kind}; use `attach` in Python"
    )
    assert not list(tmp_path.iterdir())


def test_concepts_refuse_a_transcoder(root):
    from gemmascope_fast.analysis.concepts.run import Concepts
    from gemmascope_fast.sae.jumprelu import JumpReLUTranscoder

    sae = make_sae()
    weights = [getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")]
    with pytest.raises(ValueError, match="expected an SAE of the residual stream, got a transcoder"):
        Concepts(None, None, JumpReLUTranscoder(*weights), LAYER, [])


# ---- places to write ---------------------------------------------------------------------------------

PLACES = [
    ("demo", "--json", "file"), ("demo", "--html", "file"), ("eval", "--json", "file"), ("eval", "--plot", "file"),
    ("eval", "--state", "file"), ("extract", "--json", "file"), ("extract", "--out", "folder"),
    ("compare", "--work", "folder"), ("compare", "--plot", "file"), ("conversation", "--html", "file"),
    ("conversation", "--json", "file"), ("profile", "--trace", "file"), ("profile", "--json", "file"),
    ("quantize", "--out", "file"), ("quantize", "--table", "file"), ("quantize", "--work", "folder"),
    ("train", "--out", "folder of file"), ("train", "--activations", "folder"), ("dashboard", "--out", "folder"),
    ("dashboard", "--json", "file"), ("gpu-check", "--out", "file"), ("report", "--html", "file"),
    ("report", "--png", "folder"), ("bench", "--json", "file"), ("bench", "--write-guard", "file"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "flag", "kind"), PLACES, ids=lambda value: value.replace(" ", "-"))
def test_a_place_that_cannot_be_written_is_told_before_any_work(
    root, tmp_path, capsys, monkeypatch, command, flag, kind
):
    loaders = ("analysis.pair.load_model", "analysis.pair.load_pair", "analysis.pair.load_sae")
    for name in loaders:
        monkeypatch.setattr(f"gemmascope_fast.{name}", lambda *_: pytest.fail("something was loaded"))
    for name in (
        "dev.gpu.check.collect",
        "dev.bench.run.run_suites",
        "dev.bench.rows.Results.load",
        "cli.dashboard.build",
    ):
        monkeypatch.setattr(f"gemmascope_fast.{name}", lambda *_, **__: pytest.fail("it worked"))
    (tmp_path / "file").write_text("")
    own = {
        "quantize": ["--out", tmp_path / "c.safetensors"] if flag == "--work" else [],
        "train": ["--layer", "1", *(["--out", tmp_path / "s.safetensors"] if flag != "--out" else [])],
        "dashboard": ["--latents", tmp_path],
        "extract": [] if flag == "--out" else ["--out", tmp_path / "out"],
        "compare": [] if flag == "--work" else ["--work", tmp_path / "work"],
        "report": [],
    }.get(command, [])
    if kind == "file":
        wrong = [tmp_path / "file" / "f.svg", tmp_path]
    else:
        wrong = [tmp_path / "file", tmp_path / "file" / "in.safetensors"]
        wrong = wrong[1:] if kind == "folder of file" else wrong
    before = tree(tmp_path)
    for place in wrong:
        message = said([*named(command), *own, flag, place], capsys)
        assert message.startswith(f"gemmascope-fast {' '.join(named(command))}: {flag}: expected"), message
        assert tree(tmp_path) == before


def test_a_place_without_permission_is_told_before_any_work(tmp_path, capsys, monkeypatch):
    """Asked of the system, which allows root everything."""
    asked = []

    def access(path, mode):
        asked.append((path, mode))
        return False

    monkeypatch.setattr("gemmascope_fast.cli.arguments.os.access", access)
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_pair", lambda *_: pytest.fail("a model was loaded"))
    message = said(["demo", "--json", tmp_path / "f.json"], capsys)
    assert message.endswith(f"got {tmp_path / 'f.json'}: no permission to write in {tmp_path}")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_training_that_fails_leaves_no_folder(root, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "sae.safetensors"
    for words_, message in (
        (["--model", tmp_path / "no-model"], "no-model"),
        (["--model", root / "model", "--layer", "9"], "layer: expected a layer below 3, got 9"),
        (["--model", root / "model", "--text", tmp_path / "no-text"], "no-text"),
    ):
        assert message in said(["train", "--layer", "1", "--out", out, *words_], capsys)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["5", "7", "1", "9", "0"])
def test_a_width_that_no_file_has_is_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, bits):
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_model", lambda *_: pytest.fail("a model was loaded"))
    message = said(["quantize", "--out", tmp_path / "c.safetensors", "--bits", bits], capsys)
    assert message == f"gemmascope-fast quantize: --bits must be 2, 3, 4, 6 or 8 (got {bits})"


# ---- latents ------------------------------------------------------------------------------------------


@pytest.fixture
def latents(root, tmp_path):
    pair = ["--model", root / "model", "--sae", root / "sae.safetensors"]
    command = ["extract", *pair, "--text", root / "t.txt", "--split", "paragraph", "--window", "40", "--shard", "100"]
    command += ["--out", tmp_path / "latents"]
    assert cli.main([str(word) for word in command]) == 0
    return tmp_path / "latents", command


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dashboard_of_latents_that_are_not_finite(latents, tmp_path, capsys, value):
    folder, _ = latents
    store = Store(folder)
    rows = store.read("latents", 1)
    values = rows["value"].copy()
    values[3] = value
    with Writer(folder, store.settings, store.tokenizer()) as writer:
        writer.shards = writer.shards[:1]
        tables = {name: dict(store.read(name, 1)) for name in ("latents", "tokens", "documents")}
        tables["latents"]["value"] = values
        os.unlink(folder / "shards.jsonl")
        files.append(folder / "shards.jsonl", json_line(writer.shards[0]))
        from gemmascope_fast.analysis.extraction.windows import Cursor

        writer.write(1, tables, Cursor(*store.shards[1]["end"]), store.shards[1]["done"])
    Store(folder).check()
    message = said(["dashboard", "--latents", folder, "--no-weights", "--out", tmp_path / "site"], capsys)
    where = f"{value} for feature {rows['feature'][3]} in document {rows['document'][3]}"
    assert f"{folder}/latents/000001.parquet: expected finite latents, got 1 that are not: {where}" in message
    assert f"at position {rows['position'][3]}" in message
    assert not (tmp_path / "site").exists()
    assert not (folder / "dashboard.npz").exists()


def json_line(value):
    import json

    return json.dumps(value).encode() + b"\n"


def test_a_repaired_shard_that_comes_out_otherwise_is_refused(root, latents, capsys, monkeypatch):
    """The text up to a shard is held against a hash; its own text is held against what was written."""
    folder, command = latents
    (folder / "latents" / "000001.parquet").write_bytes(b"damaged")
    before = tree(folder)
    text = root / "t.txt"
    was = text.read_text()
    number = len(Store(folder).read("tokens", 0)["document"]) + 5
    changed = list(was)
    at = [i for i, c in enumerate(was) if c not in "\n"][number]
    changed[at] = "a" if changed[at] != "a" else "b"
    text.write_text("".join(changed))
    try:
        message = said([*command, "--repair"], capsys)
    finally:
        text.write_text(was)
    assert "shard 1: made again, its" in message
    assert "differ from what was written before" in message
    assert tree(folder) == before
    assert cli.main([str(word) for word in [*command, "--repair"]]) == 0
    Store(folder).check()


def test_a_shard_counts_when_its_line_is_on_the_disk(root, tmp_path, monkeypatch):
    """In this order: the tables under their names, the line, the line's bytes on the disk (and for the first one its
    name), and nothing of the next shard before."""
    done = []

    class Recorded(Disk):
        def __getattr__(self, name):
            real = getattr(os, name)

            def call(*args, **options):
                if name == "fsync":
                    done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}"))))
                if name == "write":
                    done.append(("write", os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}"))))
                if name == "replace":
                    done.append(("replace", f"{args[1].parent.name}/{args[1].name}"))
                return real(*args, **options)

            return call if name in ("fsync", "write", "replace") else real

    monkeypatch.setattr(files, "os", Recorded())
    pair = ["--model", root / "model", "--sae", root / "sae.safetensors", "--text", root / "t.txt", "--window", "40"]
    assert cli.main([str(w) for w in ["extract", *pair, "--shard", "100", "--out", tmp_path / "out"]]) == 0
    lines = [i for i, event in enumerate(done) if event == ("write", "shards.jsonl")]
    assert len(lines) == len(Store(tmp_path / "out").shards) > 2
    for number, at in enumerate(lines):
        own = done[lines[number - 1] if number else 0 : at]
        for table in ("latents", "tokens", "documents"):
            renamed = own.index(("replace", f"{table}/{number:06d}.parquet"))
            assert ("fsync", f".{number:06d}.parquet.0.tmp") in own[:renamed]
            assert ("fsync", table) in own[renamed:]
        assert done[at + 1] == ("fsync", "shards.jsonl")
    assert done[lines[0] + 2] == ("fsync", "out")


def test_a_dashboard_names_another_model_and_sae(root, latents, tmp_path, capsys):
    folder, _ = latents
    made = ["dashboard", "--latents", folder, "--out", tmp_path / "site"]
    save(make_sae(seed=4, features=8), tmp_path / "other.safetensors")
    assert "is not the SAE that these latents come from" in said(
        [*made, "--sae", tmp_path / "other.safetensors"], capsys
    )
    weights = root / "model" / "model.safetensors"
    was = weights.read_bytes()
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    with torch.no_grad():
        model.model.norm.weight[5] += 1
    model.save_pretrained(root / "model")
    try:
        assert "is not the model that these latents come from" in said(made, capsys)
    finally:
        weights.write_bytes(was)
    assert cli.main([str(word) for word in made]) == 0


# ---- files --------------------------------------------------------------------------------------------


def test_what_a_kill_left_is_removed_by_the_next_write_of_that_name_alone(tmp_path):
    for name in (".a.json.0.tmp", ".a.json.7.tmp", ".a.json.1a2b.tmp", ".b.json.0.tmp", ".a.json", "a.json.tmp"):
        (tmp_path / name).write_text("left")
    with files.replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json", ".b.json.0.tmp", "a.json", "a.json.tmp"]
    files.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json", "a.json", "a.json.tmp"]


def test_what_another_writer_writes_now_stays(tmp_path):
    with files.replacing(tmp_path / "a") as one:
        one.write_text("one")
        with files.replacing(tmp_path / "a") as two:
            assert one != two
            two.write_text("two")
            files.clean(tmp_path)
            assert one.read_text() == "one"
        assert (tmp_path / "a").read_text() == "two"
    assert (tmp_path / "a").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_system_without_locks_is_written_and_not_cleaned(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", none)
    (tmp_path / ".a.0.tmp").write_text("whose?")
    with files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.0.tmp", "a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    for write in (lambda: files.append(folder / "a", b"x"), lambda: files.make_folder(folder / "in")):
        with pytest.raises(OSError, match=r"closed/\w+: Permission denied$"):
            write()


def test_an_error_of_reading_is_not_called_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), files.replacing(tmp_path / "a"):
        open(tmp_path / "missing").close()
    assert not list(tmp_path.iterdir())


def test_identity_of_a_tokenizer_without_a_backend():
    class Slow:
        bos_token_id = 1

        def get_vocab(self):
            return {"a": 0, "b": 1}

    class Other(Slow):
        def get_vocab(self):
            return {"a": 1, "b": 0}

    assert identity.of_tokenizer(Slow()) == identity.of_tokenizer(Slow())
    assert identity.of_tokenizer(Slow()) != identity.of_tokenizer(Other())


def test_numbers_of_shards(latents):
    """What the tests above build on."""
    folder, _ = latents
    store = Store(folder)
    assert len(store.shards) >= 3
    assert np.isfinite(store.read("latents", 1)["value"]).all()
    with pytest.raises(StoreError, match="expected a folder that `extract` wrote"):
        Store(folder / "latents")
