"""Every job, stopped at every operation on the disk: when run again, it ends with the bytes of an uninterrupted run
and leaves no other files.  A full disk or a missing permission is an error of one sentence."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from crash_points import Disk, Killed, tree
from tiny_model import letters, make_sae, save_model, two_blocks

from gemmascope_fast import quant as matryoshka
from gemmascope_fast.analysis import pair as pair_module
from gemmascope_fast.analysis.widths import grid, measure
from gemmascope_fast.checkpoints import bundled as demo_model
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.cli.convert import convert
from gemmascope_fast.cli.ls import listing
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.files import atomic as files
from gemmascope_fast.training.nested import blocks as training
from gemmascope_fast.training.nested import endtoend
from gemmascope_fast.training.nested.recipe import Recipe

for module in ("pyarrow", "transformers"):
    pytest.importorskip(module)

FEATURES = 6
IDS = torch.randint(1, 64, (6, 16), generator=torch.Generator().manual_seed(1))
HERE = str(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, SAEs, texts; latents; a damaged extraction."""
    where = tmp_path_factory.mktemp("crash")
    save_model(where / "model")
    save(make_sae(features=FEATURES), where / "sae.safetensors")
    save(make_sae(seed=5, features=FEATURES), where / "other.safetensors")
    lines = [json.dumps({"text": letters(n, seed=n)}) for n in (30, 5, 80, 41)]
    (where / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (where / "letters.txt").write_text(letters(900, seed=3))
    (where / "few.txt").write_text(letters(100, seed=4))
    loaded = pair_module.load_model(str(where / "model"))
    patch = pytest.MonkeyPatch()
    patch.setattr(pair_module, "load_model", lambda *_: loaded)
    run(extract(where, where / "latents"))
    yield where
    patch.undo()


def pair(root):
    return ["--model", str(root / "model"), "--sae", str(root / "sae.safetensors")]


def extract(root, out):
    text = str(root / "texts.jsonl")
    return ["extract", *pair(root), "--text", text, "--window", "40", "--shard", "60", "--out", str(out)]


def run(words):
    assert cli.main([str(word) for word in words]) == 0


# ---- the jobs: each a function of the root and of an empty folder -------------------------------------


def extraction(root, out):
    run([*extract(root, out / "latents"), "--json", out / "figures.json", "--overwrite"])
    (out / "figures.json").unlink()  # it holds the time that it took


def prepare(root, out, name):
    """What a job finds in its folder."""
    if name in ("repair", "dashboard"):
        shutil.copytree(root / "latents", out / "latents")
    if name == "repair":
        (out / "latents" / "latents" / "000001.parquet").write_bytes(b"damaged")
        (out / "latents" / "tokens" / "000000.parquet").unlink()


def repair(root, out):
    run([*extract(root, out / "latents"), "--repair"])


def dashboard(root, out):
    run(
        [
            "dashboard",
            "--latents",
            out / "latents",
            "--no-weights",
            "--out",
            out / "site",
            "--json",
            out / "f.json",
            "--overwrite",
        ]
    )


def evaluation(root, out):
    state, text = ["--state", out / "state"], ["--text", root / "few.txt", "--window", "8", "--loss-tokens", "8"]
    run(["eval", *pair(root), *text, *state, "--json", out / "figures.json", "--overwrite"])


def train(root, out):
    words = ["train", "--model", root / "model", "--layer", "1", "--d-sae", "8", "--l0", "2", "--steps", "3"]
    words += [
        "--batch",
        "64",
        "--save-every",
        "2",
        "--text",
        root / "letters.txt",
        "--out",
        out / "new" / "s.safetensors",
        "--overwrite",
    ]
    # a run that was cut off is resumed, and one that had not begun begins
    run([*words, *(["--resume"] if (out / "new" / "s.safetensors.run").exists() else [])])


def quantisation(_root, out):
    model, recipe = two_blocks(), Recipe("qat", bits=(2,), mode="alone", epochs=1)
    codes = training.train(model, IDS, recipe, work=out / "work")
    codes = endtoend.finetune(model, IDS, recipe, steps=2, start=codes, work=out / "work", save_every=1)
    results = measure.Results(out / "table.json")
    results.claim("about", {"model": "this one"})
    measure.compare(model, IDS[:2], [measure.Case(method="qat", bits=2, slicing="alone")], results, codes=codes)
    matryoshka.quantize_(model, codes=codes)
    matryoshka.save(model, out / "codes.safetensors", 2)


def comparison(_root, out):
    found = grid.Comparison(two_blocks(), IDS[:4], IDS[4:], out / "work", {"epochs": 1})
    found.do(grid.Run("ffn", 32, "omniquant", (2,), "alone", dithered=True))


def conversion(root, out):
    convert(root / "sae.safetensors", out / "new" / "saelens", "saelens")


def demo(_root, out):
    """The converted copy of the demo's model."""

    def made(_package, folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights" * 100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSF_CACHE", str(out / "cache"))
        patch.setitem(sys.modules, demo_model.MODEL_PACKAGE, SimpleNamespace(EXPECTED_SHA256="ab" * 32))
        patch.setattr(demo_model, "_convert", made)
        demo_model.converted_model()


JOBS = {
    job.__name__: job
    for job in (extraction, repair, dashboard, evaluation, train, quantisation, comparison, conversion, demo)
}


def stopped(monkeypatch, disk, job, root, out):
    """Run a job on a disk that fails; whether it came to the failure."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", disk)
        try:
            job(root, out)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("name", JOBS)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(root, tmp_path, monkeypatch, name):
    job, whole = JOBS[name], tmp_path / "whole"
    whole.mkdir()
    prepare(root, whole, name)
    counted = Disk()
    assert not stopped(monkeypatch, counted, job, root, whole)
    want = tree(whole)
    assert counted.count > 2
    assert not [path for path in want if path.endswith(".tmp")]
    for at in range(1, counted.count + 1):
        out = tmp_path / "out"
        out.mkdir()
        prepare(root, out, name)
        assert stopped(monkeypatch, Disk(at), job, root, out), counted.names[at - 1]
        job(root, out)
        got = tree(out)
        assert got.keys() == want.keys(), counted.names[at - 1]
        assert got == want, counted.names[at - 1]
        shutil.rmtree(out)


@pytest.mark.parametrize("name", ["extraction", "train", "conversion"])
def test_killed_twice_at_neighbouring_operations(root, tmp_path, monkeypatch, name):
    job, whole = JOBS[name], tmp_path / "whole"
    whole.mkdir()
    prepare(root, whole, name)
    counted = Disk()
    stopped(monkeypatch, counted, job, root, whole)
    want = tree(whole)
    for at in range(2, counted.count + 1, 3):
        out = tmp_path / "out"
        out.mkdir()
        prepare(root, out, name)
        stopped(monkeypatch, Disk(at), job, root, out)
        stopped(monkeypatch, Disk(2), job, root, out)
        job(root, out)
        assert tree(out) == want, counted.names[at - 1]
        shutil.rmtree(out)


COMMANDS = ("extraction", "repair", "dashboard", "evaluation", "train")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("number", "only", "sentence"),
    [(errno.ENOSPC, Disk.FULL, "the disk is full"), (errno.EACCES, Disk.FORBIDDEN, "Permission denied")],
)
def test_a_disk_that_refuses_is_one_sentence(root, tmp_path, monkeypatch, capsys, name, number, only, sentence):
    job, whole = JOBS[name], tmp_path / "whole"
    whole.mkdir()
    prepare(root, whole, name)
    counted = Disk(only=only)
    stopped(monkeypatch, counted, job, root, whole)
    want = tree(whole)
    for at in range(1, counted.count + 1):
        out = tmp_path / "out"
        out.mkdir()
        prepare(root, out, name)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Disk(at, number, only))
            with pytest.raises(AssertionError):  # the command's status is 1
                job(root, out)
        said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
        assert said.startswith("gemmascope-fast "), (counted.names[at - 1], said)
        assert sentence in said, counted.names[at - 1]
        assert said.count(sentence) == 1
        assert str(out) in said
        if not counted.names[at - 1].startswith("unlink"):
            assert not [path for path in tree(out) if path.endswith(".tmp")], counted.names[at - 1]
        job(root, out)
        assert tree(out) == want, counted.names[at - 1]
        shutil.rmtree(out)


@pytest.mark.parametrize("to", ["saelens", "gemma-scope-2", "gemma-scope-1", "native"])
def test_a_conversion_into_a_folder_never_mixes_two_checkpoints(root, tmp_path, monkeypatch, to):
    """At every operation a reader finds the old checkpoint, the new one, or an error."""

    def weights(folder):
        sae = from_pretrained(str(folder))
        return torch.cat([p.detach().flatten() for _, p in sorted(sae.named_parameters())]), sae.cfg.hook_name

    def same(a, b):
        return torch.equal(a[0], b[0]) and a[1] == b[1]

    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    other = from_pretrained(str(root / "other.safetensors"))
    other.cfg.site = matryoshka_site = from_pretrained(str(root / "sae.safetensors")).cfg.site.__class__("resid", 2)
    assert matryoshka_site.layer == 2
    save(other, tmp_path / "other.safetensors")
    convert(tmp_path / "other.safetensors", old, to)
    (old / "README.md").write_text("mine")
    shutil.copytree(old, new)
    convert(root / "sae.safetensors", new, to)
    before, after = weights(old), weights(new)
    assert not same(before, after)
    at, over = 0, False
    while not over:
        at += 1
        shutil.copytree(old, out)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Disk(at))
            try:
                convert(root / "sae.safetensors", out, to)
                over = True
            except Killed:
                pass
        try:
            found = weights(out)
            assert same(found, before) or same(found, after)
        except CheckpointError:
            pass
        assert len(listing(str(out))) == 1 if any(p.suffix in (".npz", ".safetensors") for p in out.iterdir()) else True
        convert(root / "sae.safetensors", out, to)
        assert tree(out) == tree(new)
        shutil.rmtree(out)
    assert at > 4


def test_a_site_written_over_another_has_no_index_of_both(root, tmp_path, monkeypatch):
    def write(out, top):
        run(["dashboard", "--latents", root / "latents", "--no-weights", "--out", out, "--top", top, "--overwrite"])

    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    write(old, 1)
    write(new, 3)
    assert all(tree(old)[page] != tree(new)[page] for page in ("feature/1.html", "feature/5.html"))
    at, over = 0, False
    while not over:
        at += 1
        shutil.copytree(old, out)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Disk(at))
            try:
                write(out, 3)
                over = True
            except Killed:
                pass
        if (out / "index.html").exists():
            pages = {name: page for name, page in tree(out).items() if name.endswith(".html")}
            assert any(pages.items() <= tree(site).items() for site in (old, new))
        write(out, 3)
        assert tree(out) == tree(new)
        shutil.rmtree(out)
    assert at > FEATURES


SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from crash_points import Disk, Killed
from gemmascope_fast.cli import main as cli
from gemmascope_fast.files import atomic as files
files.os = Disk(int(sys.argv[2]))
try:
    cli.main(sys.argv[3:])
except Killed:
    os._exit(9)
"""


@pytest.mark.slow
def test_a_process_that_is_gone_at_its_first_manifest(root, tmp_path):
    run(extract(root, tmp_path / "whole"))
    for at in (4, 12):
        out = tmp_path / f"out{at}"
        words = [*extract(root, out / "latents")]
        done = subprocess.run([sys.executable, "-c", SCRIPT, HERE, str(at), *words], check=False)
        assert done.returncode == 9
        run(words)
        assert tree(out / "latents") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("size", [50, 700, 3000, 20000])
def test_writes_that_fail_in_the_middle_of_a_file_name_it(root, tmp_path, capsys, name, size):
    """A limit on the size of files: the libraries that write them (torch, numpy, pyarrow, tokenizers) raise errors of
    their own."""
    job, limits = JOBS[name], resource.getrlimit(resource.RLIMIT_FSIZE)
    if name == "demo":
        pytest.skip("its files are written by a stand-in")
    prepare(root, tmp_path, name)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    said = None
    try:
        job(root, tmp_path)
    except OSError as error:
        said = str(error)
    except AssertionError:  # a command, whose status is 1
        said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said is not None or size > 700
    if said is not None:
        assert f"{tmp_path}/" in said
        assert said.count("too large") == 1
    assert not [path for path in tree(tmp_path) if path.endswith(".tmp")]
