"""Neuronpedia's id of an SAE, from the path of its repository or from metadata, and the page of a feature."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import weights, write_saelens

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints import names
from gemmascope_fast.checkpoints.loading import from_pretrained
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli.convert import convert

FILE = "layer_20/width_16k/average_l0_71/params.npz"
PAGE = "gemma-2-2b/20-gemmascope-res-16k"


@pytest.mark.parametrize(
    ("path", "page"),
    [
        (f"gemma-scope-2b-pt-res/{FILE}", PAGE),
        (f"hub/models--google--gemma-scope-2b-pt-res/snapshots/0123abc/{FILE}", PAGE),
        (
            "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54/params.npz",
            "gemma-2-2b/3-gemmascope-transcoder-16k",
        ),
        (
            "gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_18/params.npz",
            "gemma-2-2b/5-gemmascope-res-16k__l0-18",
        ),
        (
            "gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium/params.safetensors",
            "gemma-3-270m/12-gemmascope-2-res-16k",
        ),
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_999/params.npz", None),
        (f"elsewhere/{FILE}", None),
        ("gemma-scope-2b-pt-res", None),
    ],
)
def test_the_path_of_a_repository_says_the_page(path, page):
    assert names.neuronpedia_id(Path("/data") / path) == page


def test_the_pages_of_the_cache_are_those_of_the_paths(tmp_path):
    at = tmp_path / "gemma-scope-2b-pt-res" / FILE
    at.parent.mkdir(parents=True)
    np.savez(at, **weights())
    for sae in (
        from_pretrained(at),
        from_pretrained(tmp_path / "gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71"),
    ):
        assert sae.neuronpedia_url(7) == f"https://www.neuronpedia.org/{PAGE}/7"
    convert(at, tmp_path / "native", "native")
    assert from_pretrained(tmp_path / "native").neuronpedia_url(0).endswith("res-16k/0")
    save(sae, tmp_path / "own.safetensors")
    assert from_pretrained(tmp_path / "own.safetensors").cfg.metadata.neuronpedia_id == PAGE


def test_metadata_counts_before_the_path(tmp_path):
    config = {"architecture": "jumprelu", "sae_lens_version": "6.54.0", "apply_b_dec_to_input": False}
    config["metadata"] = {"neuronpedia_id": "gemma-2-2b/12-mine"}
    folder = write_saelens(tmp_path / "gemma-scope-2b-pt-res" / "layer_20/width_16k/average_l0_71", config, weights())
    assert from_pretrained(folder).neuronpedia_url(3) == "https://www.neuronpedia.org/gemma-2-2b/12-mine/3"


def test_features_and_saes_without_a_page():
    sae = gsf.JumpReLUSAE.from_weights(**{name: torch.from_numpy(array) for name, array in weights().items()})
    with pytest.raises(ValueError, match=r"not known; set cfg\.metadata\.neuronpedia_id"):
        sae.neuronpedia_url(0)
    sae.cfg.metadata.neuronpedia_id = PAGE
    assert sae.neuronpedia_url(torch.tensor(9)).endswith("/9")
    for feature in (-1, 10):
        with pytest.raises(IndexError, match=f"feature: expected 0 to 9, got {feature}"):
            sae.neuronpedia_url(feature)
    with pytest.raises(TypeError):
        sae.neuronpedia_url(1.5)
