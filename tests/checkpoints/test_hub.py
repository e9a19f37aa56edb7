"""Hugging Face without a network: one short request, then the cache, then an error of one sentence."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import test_fuzz_checkpoints
import torch

import gemmascope_fast as gsf
from gemmascope_fast.analysis.compare.reward import load_reward_model
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.checkpoints import hub, repository
from gemmascope_fast.checkpoints.bundled import load_demo_sae
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev.testing import make_sae

COMMIT, PLACE = "0123456789" * 4, "layer_1/sae.safetensors"


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the hub; `asked.error` is its answer, `asked.cached` the root of a snapshot or None."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    seen = SimpleNamespace(error=None, cached=None, calls=[], options=[])

    def repo_info(_api, repo, **options):
        seen.calls.append(repo)
        if isinstance(seen.error, Exception):
            raise seen.error
        if callable(seen.error):
            seen.error()

    def snapshot_download(repo, **options):
        seen.options.append(options)
        if seen.cached is None:
            raise LocalEntryNotFoundError("nothing there\nadvice about options")
        return str(seen.cached)

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.list_repo_files", lambda *_a, **_o: pytest.fail("retries for 25 seconds")
    )
    return seen


def no_network():
    return next(test_fuzz_checkpoints.hub_errors())


def test_without_a_network_one_question_and_one_sentence(asked, capsys):
    for call in (
        lambda: gsf.SAE.from_pretrained("google/nothing", "layer_1"),
        lambda: gsf.SAE.from_pretrained("google/nothing"),
        lambda: gsf.SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"),
        lambda: repository.repository_files("google/nothing"),
        lambda: gsf.Bank("google/nothing"),
    ):
        asked.error, asked.calls = no_network(), []
        with pytest.raises(gsf.CheckpointError, match=r"^google/\S+: .*cannot be reached.*name or service") as caught:
            call()
        assert len(asked.calls) == 1
        assert "\n" not in str(caught.value)
    assert cli.main(["ls", "google/nothing"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_a_name_server_that_never_answers_is_given_up(asked, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.05)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    never = threading.Event()
    asked.error = lambda: never.wait(60)
    start = time.monotonic()
    with pytest.raises(gsf.CheckpointError, match=r"no answer in 0\.05 seconds"):
        gsf.SAE.from_pretrained("google/nothing", "layer_1")
    assert time.monotonic() - start < 30
    never.set()


def test_what_is_in_the_cache_loads_without_a_network(asked, tmp_path):
    (tmp_path / "layer_1").mkdir()
    save(make_sae(1, 8, 12, 3), tmp_path / PLACE)
    asked.error, asked.cached = no_network(), tmp_path
    assert gsf.SAE.from_pretrained("google/there", PLACE).d_sae == 12
    assert [o.get("local_files_only") for o in asked.options] == [True]
    with pytest.raises(gsf.CheckpointError, match="layer_2: not a local path, not in the cache"):
        gsf.SAE.from_pretrained("google/there", "layer_2")
    with pytest.raises(gsf.CheckpointError, match="not in the cache"):  # asked for anew
        gsf.SAE.from_pretrained("google/there", PLACE, force_download=True)


def test_a_commit_that_is_in_the_cache_asks_nobody(asked, tmp_path):
    (tmp_path / "layer_1").mkdir()
    save(make_sae(1, 8, 12, 3), tmp_path / PLACE)
    asked.cached = tmp_path
    gsf.SAE.from_pretrained("google/there", PLACE, revision=COMMIT)
    assert not asked.calls
    gsf.SAE.from_pretrained("google/there", PLACE, revision="main")
    gsf.SAE.from_pretrained("google/there", PLACE, revision=COMMIT, force_download=True)
    assert len(asked.calls) == 2
    assert [o.get("force_download") for o in asked.options] == [None, False, True]


@pytest.mark.parametrize(("status", "silent"), [(401, False), (404, False), (429, False), (500, True), (503, True)])
def test_a_refusal_is_an_answer_and_a_broken_hub_is_none(asked, status, silent):
    from huggingface_hub.errors import HfHubHTTPError

    asked.error = HfHubHTTPError.__new__(HfHubHTTPError)
    asked.error.args, asked.error.response = (f"{status} for this URL",), SimpleNamespace(status_code=status)
    assert (hub.no_answer("google/there") is not None) == silent


def test_a_name_that_no_repository_has_is_an_answer():
    assert hub.no_answer("a/b/c", seconds=30) is None


@pytest.mark.parametrize("load", [load_model, load_reward_model])
def test_a_model_without_a_network(asked, load, tmp_path):
    asked.error = no_network()
    with pytest.raises(gsf.GemmaScopeFastError, match=r"model google/no-model: .*not in the cache.*cannot be reached"):
        load("google/no-model")
    assert asked.calls == ["google/no-model"]
    with pytest.raises(Exception) as caught:  # what is wrong with a folder is transformers' to say
        load(str(tmp_path))
    assert not isinstance(caught.value, gsf.GemmaScopeFastError)
    assert asked.calls == ["google/no-model"]


# ---- names that from_pretrained takes --------------------------------------------------------------------------


def test_saelens_keywords(asked, tmp_path):
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = {"W_enc": torch.ones(8, 12), "W_dec": torch.ones(12, 8), "b_enc": torch.zeros(12), "b_dec": torch.zeros(8)}
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in (arrays | {"threshold": torch.ones(12)}).items()})
    asked.cached = tmp_path
    names = {"release": "gemma-scope-2b-pt-res-canonical", "sae_id": "layer_20/width_16k/canonical"}
    for cls in (gsf.SAE, gsf.JumpReLUSAE):
        sae = cls.from_pretrained(**names, device="cpu", dtype="float32", force_download=False)
        assert sae.d_sae == 12
        assert sae.cfg.metadata.model_name.endswith("gemma-2-2b")
        positional = cls.from_pretrained(names["release"], names["sae_id"], "cpu", "float32")
        assert torch.equal(positional.W_enc, sae.W_enc)
    with pytest.raises(gsf.CheckpointError, match="such as layer_20/width_16k/canonical"):
        gsf.SAE.from_pretrained(release=names["release"], sae_id="layer_20/width_16k/canonicle")
    local = gsf.SAE.from_pretrained(release=tmp_path, sae_id="layer_20/width_16k/average_l0_71")
    assert local.d_sae == 12
    with pytest.raises(TypeError, match=r"canonical: expected a checkpoint of kind 'transcoder'"):
        gsf.JumpReLUTranscoder.from_pretrained(**names)


def test_one_place_is_given():
    for options, got in (({}, "neither"), ({"release": "x", "repo_or_folder": "y"}, "both")):
        for cls in (gsf.SAE, gsf.JumpReLUSAE):
            with pytest.raises(TypeError, match=f"repo_or_folder or release, got {got}"):
                cls.from_pretrained(**options)


def test_demo_is_the_bundled_sae(tmp_path, monkeypatch):
    bundled = load_demo_sae()
    for sae in (gsf.SAE.from_pretrained("demo"), gsf.SAE.from_pretrained(release="demo")):
        assert torch.equal(sae.W_enc, bundled.W_enc)
        assert sae.cfg.hook_name == "model.layers.12.output"
    with pytest.raises(gsf.CheckpointError, match="'demo' is a single SAE"):
        gsf.SAE.from_pretrained("demo", "layer_1")
    # as on the command line, whatever folder is there; a path is a path
    (tmp_path / "demo").mkdir()
    save(make_sae(1, 8, 12, 3), tmp_path / "demo" / "sae.safetensors")
    monkeypatch.chdir(tmp_path)
    assert gsf.SAE.from_pretrained("demo").d_sae == 4096
    assert gsf.SAE.from_pretrained("./demo").d_sae == 12
