"""`gemmascope-fast train --model` on every architecture that attach knows, encoders included: from a saved folder."""

import json

import numpy as np
import pytest
import torch
from test_attach_architectures import MODELS, build

import gemmascope_fast as gsf
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.cli import main as cli

LAYER, LETTERS = 1, 26
TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(700))


def tokenizer(encoder):
    """Single letters; the special ids are those of the models."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {chr(97 + i): 4 + i for i in range(LETTERS)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    names = ("cls_token", "sep_token") if encoder else ("bos_token", "eos_token")
    special = dict(zip(names, ("<bos>", "<eos>"), strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>", **special
    )


@pytest.mark.parametrize("name", [n for n in MODELS if n != "gemma3 base"])
def test_train_reads_the_layer_and_writes_an_sae_that_attaches(name, tmp_path, capsys):
    model, blocks = build(name)
    model.save_pretrained(tmp_path / "model")
    own = tokenizer(name.startswith("bert"))
    own.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    code = cli.main([
        "train", "--model", str(tmp_path / "model"), "--layer", str(LAYER), "--d-sae", "48", "--l0", "6",
        "--steps", "3", "--batch", "64", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "own.safetensors"),
        "--activations", str(tmp_path / "kept"), "--save-dtype", "float32",
    ])  # fmt: skip
    assert code == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["held_out"]["all"]["tokens"] == 70
    sae = gsf.SAE.from_pretrained(str(tmp_path / "own.safetensors"))
    assert sae.cfg.site == gsf.Site("resid", LAYER)

    # what was collected is the block's output at the letters, no more
    loaded, _ = load_model(str(tmp_path / "model"))
    assert type(loaded) is type(model)
    (kept,) = [np.load(p) for p in (tmp_path / "kept").rglob("*.npy") if "held-out" in p.parent.name]
    ids = torch.tensor([[2, *own(TEXT[630:], add_special_tokens=False)["input_ids"], *([1] * ("bert" in name))]])
    outputs = []
    with torch.no_grad(), gsf.attach(loaded, sae, tokens="all") as run:
        handle = loaded.get_submodule(blocks)[LAYER].register_forward_hook(lambda m, a, out: outputs.append(out))
        loaded(input_ids=ids)
        handle.remove()
    x = (outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0])[0, 1:71]
    assert kept.shape == (70, 32)
    assert np.array_equal(kept, x.numpy())
    assert run.latents[LAYER].n_rows == ids.numel()
