"""The table of names compared with the installed SAELens: every Gemma Scope entry, including site and kind."""

from importlib.resources import files

import numpy as np
import pytest
import yaml
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.numpy import save_file

from gemmascope_fast.checkpoints import names, transformer_lens
from gemmascope_fast.checkpoints.loading import find_checkpoint
from gemmascope_fast.sae.sites import Site

THEIRS = yaml.safe_load(files("sae_lens").joinpath("pretrained_saes.yaml").read_text("utf-8"))
RELEASES = {name: release for name, release in THEIRS.items() if name.startswith("gemma-scope")}


def test_the_yaml_is_read_where_it_is():
    assert len(RELEASES) >= 92
    assert sum(len(release["saes"]) for release in RELEASES.values()) >= 11_643


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_stands_for_what_saelens_says(release):
    """A release or SAE that this table lacks: run scripts/saelens_names.py on the wheel."""
    theirs = RELEASES[release]
    assert names.ids(release) == [sae["id"] for sae in theirs["saes"]]
    for sae in theirs["saes"]:
        found = names.lookup(release, sae["id"])
        assert (found.repo, found.path) == (theirs["repo_id"], sae["path"])
        assert (found.model, found.neuronpedia_id) == (theirs["model"], sae.get("neuronpedia"))
        assert found.scale == sae.get("norm_scaling_factor")


def test_no_name_is_one_that_saelens_has_not():
    assert {name for name in names.releases() if name.startswith("gemma-scope")} == set(RELEASES)


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """Bytes of one small checkpoint of each format: `params.npz`, `params.safetensors` without a skip and with one."""
    where = tmp_path_factory.mktemp("files")
    g = np.random.default_rng(0)
    shapes = {"w_enc": (4, 8), "w_dec": (8, 4), "b_enc": 8, "b_dec": 4, "threshold": 8}
    arrays = {name: g.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    np.savez(where / "params.npz", **{name.replace("w_", "W_"): array for name, array in arrays.items()})
    save_file(arrays, where / "plain")
    save_file(arrays | {"affine_skip_connection": np.eye(4, dtype="f4")}, where / "skip")
    return {path.name: path.read_bytes() for path in where.iterdir()}


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_opens_at_the_site_that_saelens_says(release, files_of, tmp_path, monkeypatch):
    """The hub is a folder; a checkpoint without a config, so that names alone tell what it is."""
    theirs = RELEASES[release]
    repo, gemma_3 = theirs["repo_id"], theirs["conversion_func"] == "gemma_3"
    root = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / "0"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_options: str(root))
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_args, **_options: None)
    for sae in theirs["saes"]:
        folder = root / sae["path"]
        folder.mkdir(parents=True, exist_ok=True)
        if gemma_3:
            kind = "skip" if "affine" in sae["path"] else "plain"
            (folder / "params.safetensors").write_bytes(files_of[kind])
        else:
            (folder / "params.npz").write_bytes(files_of["params.npz"])
        found = find_checkpoint(release, sae["id"])
        want = what_gemma_3_is(repo, sae["path"]) if gemma_3 else what_gemma_2_is(theirs, sae["path"])
        assert (found.kind, found.site, found.site_out, found.model_name) == want, sae
        assert found.kind_known


def what_gemma_3_is(repo, path):
    """(kind, site read, site written, model) by SAELens's own reading of the names."""
    config = loaders._infer_gemma_3_raw_cfg_dict(repo, path)
    kind = {None: "sae", False: "transcoder", True: "skip_transcoder"}[config.get("affine_connection")]
    out = config.get("hf_hook_point_out")
    model = config["model_name"].replace("270m-pt", "270m")  # as SAELens does after this
    return (
        kind,
        Site.from_hook_name(config["hf_hook_point_in"]),
        None if out is None else Site.from_hook_name(out),
        model,
    )


def what_gemma_2_is(release, path):
    transcoder = release["conversion_func"] == "gemma_2_transcoder"
    read = loaders.get_gemma_2_transcoder_config_from_hf if transcoder else loaders.get_gemma_2_config_from_hf
    config = read(release["repo_id"], path, "cpu")
    hook, model = config["hook_name"], config["model_name"]
    site = Site("embed") if hook == "hook_embed" else transformer_lens.site_of(hook, model)
    out = transformer_lens.site_of(config.get("hook_name_out"), model)
    return "transcoder" if transcoder else "sae", site, out, f"google/{model}"
