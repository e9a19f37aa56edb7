"""The demo's figures on a small random Gemma 3 and a random SAE, recomputed here from their formulas."""

import pytest
import torch

from gemmascope_fast import JumpReLUSAE
from gemmascope_fast.report.figures import check_support, read_text
from gemmascope_fast.report.page import render

D, F, LAYER = 32, 96, 1


class Letters:
    """A tokenizer of letters: BOS, then one token a character."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[2, *(3 + ord(c) % 60 for c in text)]])}

    def decode(self, ids):
        return "<bos>" if ids[0] == 2 else chr(60 + ids[0])


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=D, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sae():
    g = torch.Generator().manual_seed(1)
    W = torch.randn(D, F, generator=g)
    return JumpReLUSAE.from_weights(
        W_enc=W, W_dec=0.05 * W.t().contiguous(), b_enc=torch.zeros(F), b_dec=torch.zeros(D), threshold=torch.ones(F)
    )


def test_figures_agree_with_their_formulas(model, sae):
    ids = Letters()("a small text to read", "pt")["input_ids"]
    hooks = dict(model.model.layers[LAYER]._forward_hooks)
    figures = read_text(model, Letters(), sae, LAYER, "a small text to read", model_name="tiny").figures
    assert model.model.layers[LAYER]._forward_hooks == hooks
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]
        ce = model(ids, labels=ids).loss.item()
        z = x @ sae.W_enc + sae.b_enc
        f = z.relu() * (z > sae.threshold)
        x_hat = f @ sae.W_dec + sae.b_dec
    assert figures["tokens"] == ids.shape[1] - 1
    assert figures["l0"] == pytest.approx((f != 0).sum(1).double().mean().item())
    assert figures["fvu"] == pytest.approx(
        ((x - x_hat) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item(), rel=1e-4
    )
    assert figures["ce_base"] == pytest.approx(ce, rel=1e-5)
    assert figures["dead_fraction"] == pytest.approx((f == 0).all(0).double().mean().item())
    assert figures["delta_loss"] == figures["ce_spliced"] - figures["ce_base"] != 0
    assert figures["ce_mean_ablated"] != figures["ce_base"]
    assert figures["support_equal"] is True


def test_a_wrong_support_is_seen(sae):
    x = torch.randn(70, D, generator=torch.Generator().manual_seed(2))
    latents = sae.encode_sparse(x).detach()
    assert check_support(sae, x, latents) == (True, 0)
    values = latents.values.clone()
    values[-1] = 0
    assert check_support(sae, x, latents.with_values(values)) == (False, 1)


def test_page_is_self_contained_and_escapes_the_text(model, sae):
    reading = read_text(model, Letters(), sae, LAYER, "some text", model_name="<tiny>")
    reading.pieces[1] = "</script><b>"
    page = render(reading)
    assert page.count("</script>") == 1
    assert "<tiny>" not in page
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_bad_input_names_the_argument(model, sae):
    with pytest.raises(ValueError, match="layer: expected"):
        read_text(model, Letters(), sae, 9, "some text", model_name="tiny")
    with pytest.raises(ValueError, match="text: expected"):
        read_text(model, Letters(), sae, LAYER, "", model_name="tiny")
