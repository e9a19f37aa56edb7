"""Files of public SAEs through SAELens's own loaders and through this package's: the same latents and outputs."""

import public_files as public
import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class

from gemmascope_fast.checkpoints.loading import from_pretrained

F = 1024  # Qwen Scope's widths are thousands


@pytest.fixture
def local(tmp_path, monkeypatch):
    """SAELens's downloads come from a folder."""

    def fetched(repo_id, filename=None, subfolder=None, **_):
        path = tmp_path / repo_id.rpartition("/")[2] / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(f"no {path}")
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", fetched)
    monkeypatch.setitem(loaders.QWEN_SCOPE_MODEL_INFO, "Tiny", ("Qwen/Tiny", public.D))
    return tmp_path


def theirs(name, repo, folder, dtype="float32", **more):
    """The SAE that SAELens's loader `name` makes, as `SAE.from_pretrained` builds it."""
    overrides = {"dtype": dtype, "device": "cpu"}
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[name](repo, folder, "cpu", False, overrides)
    cfg = loaders.handle_config_defaulting(cfg) | more
    cls, config = get_sae_class(cfg["architecture"])
    sae = cls(config.from_dict(cfg))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    return sae


def assert_same(mine, their, tolerance=1e-5):
    x = public.tokens()
    with torch.no_grad():
        want = their.encode(x)
        assert torch.equal(mine.encode(x) != 0, want != 0)
        assert 0 < int((want != 0).sum()) < want.numel()
        torch.testing.assert_close(mine.encode(x), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mine(x), their(x), rtol=tolerance, atol=tolerance)


def test_qwen_scope(local):
    repository = "SAE-Res-Tiny-W1K-L0_5"
    path = public.qwen_scope(local, public.weights(f=F), repository)
    assert_same(from_pretrained(path), theirs("qwen_scope", f"Qwen/{repository}", "layer3.sae.pt"))


def test_llama_scope(local):
    folder = public.llama_scope(local / "LXR", public.weights())
    sae = theirs("llama_scope", "fnlp/LXR", folder.name, normalize_activations="none")
    sae.fold_activation_norm_scaling_factor(public.D**0.5 / 6.3125)
    assert_same(from_pretrained(folder), sae)


def test_llama_scope_r1(local):
    folder = public.llama_scope_r1(
        local / "R1", public.weights(f=public.D * 8), norms={"blocks.15.hook_resid_post": 6.0}
    )
    sae = theirs("llama_scope_r1_distill", "fnlp/R1", folder.name, normalize_activations="none")
    sae.fold_activation_norm_scaling_factor(public.D**0.5 / 6.0)
    assert_same(from_pretrained(folder), sae)


@pytest.mark.parametrize("dict_class", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder"])
def test_dictionary_learning(local, dict_class):
    more = {}
    if dict_class == "GatedAutoEncoder":
        g = torch.Generator().manual_seed(3)
        more = {name: torch.randn(public.F, generator=g) for name in ("r_mag", "gate_bias", "mag_bias")}
    if dict_class == "BatchTopKSAE":
        more = {"threshold": torch.tensor(0.5), "k": torch.tensor(5)}
    folder = public.dictionary_learning(local / "saes" / "trainer_0", public.weights(), dict_class, **more)
    assert_same(from_pretrained(folder), theirs("dictionary_learning_1", "andyrdt/saes", "trainer_0"))


@pytest.mark.parametrize(
    ("name", "repo", "file", "infix"),
    [
        ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear"),
        ("deepseek_r1", "qresearch/X", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", ""),
    ],
)
def test_two_linear_layers(local, name, repo, file, infix):
    path = public.goodfire(local / repo.rpartition("/")[2], public.weights(), file, infix)
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[name](repo, file, "cpu", False, {"dtype": "float32"})
    mine = from_pretrained(path)
    for key, tensor in state.items():
        assert torch.equal(getattr(mine, key), tensor), key
    assert (cfg["architecture"], cfg["apply_b_dec_to_input"]) == ("standard", False)
    assert not mine.threshold.any()
    layer = int(cfg["hook_name"].split(".")[1])
    assert (mine.cfg.site.kind, mine.cfg.site.layer) == ("resid", layer)
    assert mine.cfg.metadata.model_name == cfg["model_name"]


def test_transcoders_of_circuit_tracer(local):
    path = public.circuit_tracer(
        local / "qwen3-4b-transcoders", public.weights(), 2, config='model_name: "Qwen/Qwen3-4B"\n'
    )
    (path.parent / "wandb-config.yaml").write_text(
        f"d_model: {{value: {public.D}}}\nd_feature: {{value: {public.F}}}\nbatch_size: {{value: 8}}\n"
    )
    their = theirs("mwhanna_transcoder", "mwhanna/qwen3-4b-transcoders", path.name)
    assert isinstance(their, SAE)
    assert_same(from_pretrained(path), their)
