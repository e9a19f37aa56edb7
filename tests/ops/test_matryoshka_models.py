"""Which weights of a model `quantize_` replaces, which it reports as left out, and a tied output head."""

import copy

import pytest
import torch
from tiny_model import make_model
from torch import nn

from gemmascope_fast import quant as matryoshka
from gemmascope_fast.analysis.widths import measure
from gemmascope_fast.cli import main as cli
from gemmascope_fast.quant.model import fused_experts

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXTURES = {
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {"num_experts": 4, "moe_intermediate_size": 32},
    "OlmoeConfig": {"num_experts": 4},
    "GptOssConfig": {"num_local_experts": 4},
    "GraniteMoeConfig": {"num_local_experts": 4},
    "Llama4TextConfig": {"num_local_experts": 4},
    "JetMoeConfig": {"num_local_experts": 4},
}
IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def mixture(name):
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"transformers has no {name}")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**SIZES | MIXTURES[name])).eval()


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_not_left_out_without_a_word(name):
    model = mixture(name)
    fused = fused_experts(model)
    if not fused:
        pytest.skip("its experts are linear layers here")
    assert {int(model.get_parameter(path).shape[0]) for path in fused} == {4}
    before = {n: p.clone() for n, p in model.state_dict().items()}
    for scope in matryoshka.model.SCOPES:
        with pytest.raises(ValueError, match=rf"{fused[0]}.*skip_experts=True"):
            matryoshka.quantize_(model, scope)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    matryoshka.quantize_(model, "all-linear", skip_experts=True)
    assert matryoshka.layers(model)
    assert all(torch.equal(model.get_parameter(path), before[path]) for path in fused)


@pytest.mark.parametrize("name", ["Gemma3", "Llama", "Mamba"])
def test_other_models_have_none(name):
    small = {**SIZES, "state_size": 8} if name == "Mamba" else SIZES
    config = transformers.Gemma3TextConfig if name == "Gemma3" else getattr(transformers, f"{name}Config")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(**small))
    assert fused_experts(model, "ffn") == fused_experts(model, "all-linear") == []


def test_linear_experts_are_quantised():
    """transformers before 5 held them so."""
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(32, 32) for _ in range(3))})})
    matryoshka.quantize_(block)
    assert len(matryoshka.layers(block)) == 3


@pytest.mark.parametrize("command", ["quantize", "quantize tables"])
def test_the_commands_say_so_before_they_work(monkeypatch, tmp_path, capsys, command):
    from gemmascope_fast.analysis import pair

    model = mixture("MixtralConfig")
    monkeypatch.setattr(pair, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(pair, "load_pair", lambda *_: (model, None, None, 0))
    more = ["--out", str(tmp_path / "c.safetensors")] if command == "quantize" else ["--work", str(tmp_path / "w")]
    assert cli.main([*command.split(), *more]) == 1
    assert "--skip-experts" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- heads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
def test_a_quantised_head_is_not_tied_again(loaded, tmp_path):
    model = make_model(tie_word_embeddings=True)
    matryoshka.quantize_(model, head=True)
    if loaded:
        matryoshka.save(model, tmp_path / "codes.safetensors")
        model = matryoshka.load_(make_model(tie_word_embeddings=True), tmp_path / "codes.safetensors")
    want, embedding = model(IDS).logits, model.get_input_embeddings().weight.clone()
    model.tie_weights()
    assert isinstance(model.lm_head, matryoshka.MatryoshkaLinear)
    assert torch.equal(model(IDS).logits, want)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_model_of_which_the_head_was_left_is_tied_as_before():
    model = make_model(tie_word_embeddings=True)
    config = copy.deepcopy(model.config.to_dict())
    with measure.quantised(model, "ffn", head=True):
        assert not model.config.tie_word_embeddings
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.get_input_embeddings().weight
    matryoshka.quantize_(model)
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
