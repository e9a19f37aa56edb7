"""The site and model in an SAE's checkpoint: attaching to another site is an error, to another model a warning."""

import warnings

import attach_models as tiny
import pytest
import torch
from tiny_model import LAYER, LETTERS, letters, make_sae, save_model

import gemmascope_fast as gsf
from gemmascope_fast import JumpReLUTranscoder, Site
from gemmascope_fast.attach import Activations
from gemmascope_fast.attach.origin import plain_name
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli

TEXT = letters(120, seed=3)


@pytest.fixture(scope="module")
def gemma():
    return tiny.gemma2()


def path(text):
    return Site("path", path=text)


PRE, POST = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
# the checkpoint's own site, a key of `saes`, whether it is the same place in Gemma 2
KEYS = [
    (Site("resid", 1), 1, True),
    (Site("resid", 1), 3, False),
    (Site("resid", 1), (1, "resid"), True),
    (Site("resid", 1), (1, "mlp"), False),
    (Site("resid", 1), Site("resid", 2), False),
    (Site("resid", 1), "model.layers.1.output", True),
    (Site("resid", 1), "model.layers.1", True),
    (Site("resid", 1), "layers.1", True),
    (Site("resid", 1), "model.layers.2.output", False),
    (Site("resid", 1), "model.layers.1.mlp.output", False),
    (Site("mlp", 1), 1, True),
    (Site("mlp", 1), 2, False),
    (Site("mlp", 1), f"model.layers.1.{POST}", True),
    (Site("mlp", 1), "model.layers.1.mlp", False),
    (Site("attn_out", 2), (2, "attn_out"), True),
    (Site("attn_out", 2), (2, "resid"), False),
    (Site("embed"), 1, False),
    (Site("embed"), Site("embed"), True),
    (path("model.layers.1.mlp.output"), 1, True),
    (path("model.layers.1.mlp.output"), "model.layers.1.mlp", True),
    (path("model.layers.1.mlp.output"), 2, False),
    (path("model.layers.1.mlp.output"), (1, "mlp"), False),
    (Site("resid", 30), 1, False),
    (None, 1, True),
    (None, (2, "mlp"), True),
]


@pytest.mark.parametrize(("own", "key", "same"), KEYS)
def test_another_site_than_the_checkpoints_is_an_error(gemma, own, key, same):
    sae = tiny.sae(site=own)
    if same:
        gsf.attach(gemma, {key: sae})
    else:
        with pytest.raises(gsf.AttachError, match="the checkpoint's own site is") as error:
            gsf.attach(gemma, {key: sae})
        assert own.hook_name in str(error.value)
        assert "anywhere=True" in str(error.value)
    with torch.no_grad(), gsf.attach(gemma, {key: sae}, anywhere=True) as run:
        gemma(tiny.ids())
    assert run.latents[key].n_rows == 18


TRANSCODERS = [(1, True), (2, False), ((1, "mlp_in"), True), ((1, "mlp"), True), ((2, "mlp"), False),
               (f"model.layers.1.{PRE}", True), (f"model.layers.2.{PRE}", False)]  # fmt: skip


@pytest.mark.parametrize(("key", "same"), TRANSCODERS)
def test_a_transcoder_belongs_where_it_reads(gemma, key, same):
    coder = tiny.sae(kind=JumpReLUTranscoder, site=Site("mlp_in", 1), site_out=Site("mlp", 1))
    if not same:
        with pytest.raises(gsf.AttachError, match=r"own site is model\.layers\.1\.pre_feedforward_layernorm"):
            gsf.attach(gemma, {key: coder})
    run = gsf.attach(gemma, {key: coder}, anywhere=True)
    layer = 1 if same else 2
    assert run._taps[0].reads.name == f"model.layers.{layer}.{PRE}"
    assert run._taps[0].writes.name == f"model.layers.{layer}.{POST}", "it writes in the layer that it reads"


def test_activations_and_edits_belong_anywhere(gemma):
    gsf.attach(gemma, {3: Activations()})
    gsf.attach(gemma, tiny.sae(site=Site("resid", 1)), mode="splice", edits={3: gsf.Direction(torch.ones(tiny.D))})


NAMES = {
    "google/gemma-2-2b": "gemma-2-2b",
    "gemma-2-2b": "gemma-2-2b",
    "google/gemma-3-1b-pt": "gemma-3-1b",
    "google/gemma-3-1b-it": "gemma-3-1b-it",
    "unsloth/gemma-2-2b-bnb-4bit": "gemma-2-2b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "gpt2-small": "gpt2",
    "/cache/models--google--gemma-2-9b/snapshots/0a1b2c": "gemma-2-9b",
    "/home/someone/models/run-7": None,
    "./checkpoint": None,
    "": None,
    "/": None,
    None: None,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_models(name):
    assert plain_name(name) == NAMES[name]


@pytest.mark.parametrize(
    ("trained_on", "model_name", "warns"),
    [
        ("google/gemma-2-2b", "google/gemma-2-9b", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", True),
        ("gemma-2-2b", "google/gemma-2-2b", False),
        ("gemma-2-2b", "", False),
        ("gemma-2-2b", "/tmp/some-folder", False),
        (None, "google/gemma-2-2b", False),
    ],
)
def test_a_model_that_the_sae_was_not_trained_on_is_a_warning(gemma, trained_on, model_name, warns):
    sae = tiny.sae(site=Site("resid", 1))
    sae.cfg.metadata.model_name = trained_on
    gemma.config._name_or_path = gemma.name_or_path = model_name
    try:
        if warns:
            with pytest.warns(UserWarning, match=f"trained on {trained_on}, and the model is {model_name}"):
                gsf.attach(gemma, sae)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                gsf.attach(gemma, sae)
    finally:
        gemma.config._name_or_path = gemma.name_or_path = ""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder of a model, file of an SAE of its layer LAYER, text file)."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("origin")
    save_model(root / "model", LETTERS)
    save(make_sae(), root / "sae.safetensors")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def commands(root, out):
    pair = ["--model", str(root / "model"), "--sae", str(root / "sae.safetensors"), "--layer", "2"]
    text = str(root / "text.txt")
    return {
        "demo": ["demo", *pair, "--prompt", TEXT],
        "eval": ["eval", *pair, "--text", text, "--window", "40", "--no-losses"],
        "extract": ["extract", *pair, "--text", text, "--out", str(out / "latents"), "--window", "40"],
        "watch": ["watch", *pair, "--prompt", "abc", "--max-tokens", "2"],
    }


@pytest.mark.parametrize("name", ["demo", "eval", "extract", "watch"])
def test_a_command_at_another_layer(files, tmp_path, capsys, name):
    if name == "extract":
        pytest.importorskip("pyarrow")
    assert LAYER == 1
    words = commands(files, tmp_path)[name]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "own site is model.layers.1.output (layer 1, 'resid')" in said
    assert "--anywhere" in said
    assert cli.main([*words, "--anywhere"]) == 0
