"""Evaluation of SAEs that read or write other sites than the residual stream, compared with hand-written hooks."""

import json
from contextlib import contextmanager

import pytest
import torch
from tiny_model import BOS, LAYER, LETTERS, D, letters, make_model, save_model

from gemmascope_fast.analysis.evaluation import Evaluation, Reconstruction, evaluate
from gemmascope_fast.analysis.evaluation.run import sites_of
from gemmascope_fast.attach import attach
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.errors import AttachError
from gemmascope_fast.sae.config import SAEConfig
from gemmascope_fast.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemmascope_fast.sae.multi_site import CrossLayerTranscoder
from gemmascope_fast.sae.sites import Site

HEAD_DIM = 24  # two heads: what o_proj reads is wider than the residual stream
F = 80
TEXT = letters(150, seed=3)
WINDOW = 40
PATH = f"model.layers.{LAYER}.mlp.gate_proj.input"

# kind of the SAE, where it reads, where it writes
CASES = {
    "mlp": ("sae", "mlp", "mlp"),
    "attention": ("sae", "attn", "attn"),
    "attention output": ("sae", "attn_out", "attn_out"),
    "embedding": ("sae", "embed", "embed"),
    "a module's path": ("sae", PATH, PATH),
    "transcoder without gain": ("transcoder", "mlp_in_no_gain", "mlp"),
    "transcoder with gain": ("transcoder", "mlp_in", "mlp"),
    "skip transcoder": ("skip_transcoder", "mlp_in", "mlp"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_model(tmp_path_factory.mktemp("model"), LETTERS)


@pytest.fixture(scope="module")
def pair(folder):
    import transformers

    model = make_model(head_dim=HEAD_DIM)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:  # a gain of one would hide which of two norms was read
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.7)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def site(kind, layer=LAYER):
    if "." in kind:
        return Site("path", path=kind)
    return Site(kind) if kind == "embed" else Site(kind, layer)


def make(kind, reads, writes, layer=LAYER):
    g = torch.Generator().manual_seed(7)
    d_in = 2 * HEAD_DIM if reads == "attn" else D
    W = torch.randn(d_in, F, generator=g)
    cls = {"sae": JumpReLUSAE, "transcoder": JumpReLUTranscoder, "skip_transcoder": JumpReLUSkipTranscoder}[kind]
    d_out = d_in if reads == writes else D
    more = {"W_skip": torch.randn(d_in, d_out, generator=g) * 0.1} if kind == "skip_transcoder" else {}
    return cls.from_weights(
        W_enc=W, W_dec=torch.randn(F, d_out, generator=g) * 0.1, b_enc=torch.randn(F, generator=g) * 0.1,
        b_dec=torch.randn(d_out, generator=g) * 0.1, threshold=torch.full((F,), 0.02 if reads == "embed" else 0.5),
        cfg=SAEConfig(d_in, F, d_out, site(reads, layer), site(writes, layer) if kind != "sae" else None), **more,
    )  # fmt: skip


def dense(sae, x):
    z = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    f = z * (z > sae.threshold.double())
    y = f @ sae.W_dec.double() + sae.b_dec.double()
    return f, y + x.double() @ sae.W_skip.double() if sae.kind == "skip_transcoder" else y


@contextmanager
def hooked(model, kind, visit):
    """visit(what passes at the site [1, S, d]) → what is to pass instead, or None; by torch's hooks alone."""
    block = model.model.layers[LAYER]
    read_only = lambda change: lambda *a: change(*a) and None  # noqa: E731
    norm = block.pre_feedforward_layernorm

    def no_gain(_module, args):
        x = args[0]
        visit(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps))

    def embedded(module, _args, out):
        new = visit(out / module.embed_scale)
        return None if new is None else new * module.embed_scale

    def leading(_module, args):
        new = visit(args[0])
        return None if new is None else (new,)

    handle = {
        "mlp": lambda: block.post_feedforward_layernorm.register_forward_hook(lambda _m, _a, out: visit(out)),
        "attn_out": lambda: block.post_attention_layernorm.register_forward_hook(lambda _m, _a, out: visit(out)),
        "attn": lambda: block.self_attn.o_proj.register_forward_pre_hook(leading),
        PATH: lambda: block.mlp.gate_proj.register_forward_pre_hook(leading),
        "embed": lambda: model.model.embed_tokens.register_forward_hook(embedded),
        "mlp_in": lambda: norm.register_forward_hook(read_only(lambda _m, _a, out: visit(out))),
        "mlp_in_no_gain": lambda: norm.register_forward_pre_hook(no_gain),
    }[kind]()
    try:
        yield
    finally:
        handle.remove()


def seen_at(model, kind, ids):
    rows = []
    with hooked(model, kind, lambda x: rows.append(x[0, 1:].clone())):
        model(ids)
    return rows[0]


@pytest.mark.parametrize("case", CASES)
def test_evaluation_agrees_with_hooks_written_by_hand(pair, case):
    model, tokenizer = pair
    kind, reads, writes = CASES[case]
    sae = make(kind, reads, writes)
    got = evaluate(model, tokenizer, sae, None, TEXT, window=WINDOW)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    inputs = [torch.tensor([[BOS, *ids[i : i + WINDOW]]]) for i in range(0, len(ids), WINDOW)]
    losses = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        before = [seen_at(model, reads, each) for each in inputs]
        after = [seen_at(model, writes, each) for each in inputs]
        (f, y_hat), y = dense(sae, torch.cat(before)), torch.cat(after).double()
        mean = y.mean(0)
        for each, x, target in zip(inputs, before, after, strict=True):
            changes = (None, dense(sae, x)[1].float(), mean.float().expand_as(target), torch.zeros_like(target))
            for i, new in enumerate(changes):
                change = lambda old, new=new: None if new is None else torch.cat([old[:, :1], new[None]], 1)  # noqa: E731
                with hooked(model, writes, change):
                    losses[i] += model(each, labels=each).loss.item() * (each.shape[1] - 1)
    base, spliced, by_mean, by_zero = (losses / len(ids)).tolist()
    assert 0 < got["l0"] < F
    assert got["l0"] == pytest.approx((f != 0).sum(1).double().mean().item())
    assert got["fvu"] == pytest.approx(((y - y_hat) ** 2).sum().item() / ((y - mean) ** 2).sum().item(), rel=1e-5)
    assert got["explained_variance"] == pytest.approx(1 - ((y - y_hat).var(0).sum() / y.var(0).sum()).item(), rel=1e-5)
    assert len({base, spliced, by_mean, by_zero}) == 4
    for key, value in (("base", base), ("spliced", spliced), ("mean_ablated", by_mean), ("zero_ablated", by_zero)):
        assert got[f"ce_{key}"] == pytest.approx(value, rel=1e-6), key


def test_a_layer_means_the_saes_own_kind_of_site_there(pair):
    model, tokenizer = pair
    away, here = make("transcoder", "mlp_in", "mlp", layer=0), make("transcoder", "mlp_in", "mlp")
    assert sites_of(away) == (Site("mlp_in", 0), Site("mlp", 0))
    with pytest.raises(AttachError, match=r"own site is model\.layers\.0\.pre_feedforward_layernorm\.output \(layer 0"):
        sites_of(away, LAYER)
    with pytest.raises(AttachError, match="anywhere=True"):
        evaluate(model, tokenizer, away, LAYER, TEXT, window=WINDOW)
    assert sites_of(away, LAYER, anywhere=True) == sites_of(here) == (Site("mlp_in", LAYER), Site("mlp", LAYER))
    assert sites_of(make("sae", "resid", "resid"), 2, anywhere=True) == (Site("resid", 2), Site("resid", 2))
    assert evaluate(model, tokenizer, away, LAYER, TEXT, window=WINDOW, anywhere=True) == evaluate(
        model, tokenizer, here, None, TEXT, window=WINDOW
    )


def test_refusals_name_what_is_missing(pair):
    model, tokenizer = pair
    homeless = make("sae", "resid", "resid")
    homeless.cfg.site = None
    with pytest.raises(ValueError, match="layer: expected a layer number"):
        sites_of(homeless)
    several = CrossLayerTranscoder([make("transcoder", "mlp_in", "mlp")])
    with pytest.raises(ValueError, match="got a cross_layer_transcoder"):
        evaluate(model, tokenizer, several, None, TEXT)
    with pytest.raises(ValueError, match="y: expected the activations that a transcoder"):
        Reconstruction(make("transcoder", "mlp_in", "mlp")).add(torch.zeros(2, D))
    with pytest.raises(ValueError, match="y: expected \\[n, d_out = 32\\], got"):
        Reconstruction(make("transcoder", "mlp_in", "mlp")).add(torch.zeros(2, D), torch.zeros(2, D - 1))
    wrong = make("sae", "attn", "attn")
    wrong.cfg.site = Site("mlp", LAYER)
    with pytest.raises(AttachError, match="d_in is 48"):
        Evaluation(model, tokenizer, wrong, None, lambda: [TEXT])
    with pytest.raises(AttachError, match="has 3 layers"):
        Evaluation(model, tokenizer, make("sae", "mlp", "mlp"), 3, lambda: [TEXT], anywhere=True)


def test_a_state_of_another_site_is_not_resumed(pair, tmp_path):
    model, tokenizer = pair

    def run(reads):
        return Evaluation(
            model, tokenizer, make("sae", reads, reads), None, lambda: [TEXT], window=WINDOW, state=tmp_path / "state"
        )

    run("mlp").run()
    with pytest.raises(ValueError, match="post_feedforward_layernorm"):
        run("attn_out")


def test_the_command_takes_a_transcoder_at_its_own_sites(folder, tmp_path, capsys):
    """The saved model has heads of 16; its norms' gains are one."""
    from gemmascope_fast.analysis.pair import load_model

    sae = make("skip_transcoder", "mlp_in", "mlp")
    save(sae, tmp_path / "sae.safetensors")
    text, out = tmp_path / "text", tmp_path / "figures.json"
    text.write_text(TEXT, encoding="utf-8")
    command = ["eval", "--model", str(folder), "--sae", str(tmp_path / "sae.safetensors"), "--text", str(text)]
    assert cli.main([*command, "--window", str(WINDOW), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["layer"] == LAYER
    assert figures["site"] == f"model.layers.{LAYER}.pre_feedforward_layernorm.output"
    assert figures["site_out"] == f"model.layers.{LAYER}.post_feedforward_layernorm.output"
    want = evaluate(*load_model(str(folder)), sae, None, TEXT, window=WINDOW)
    assert {key: figures[key] for key in want} == want
    model, tokenizer = load_model(str(folder))
    ids, pairs = tokenizer(TEXT, add_special_tokens=False)["input_ids"], 0
    for start in range(0, len(ids), WINDOW):
        with attach(model, sae, tokens="content") as run:
            model(torch.tensor([[BOS, *ids[start : start + WINDOW]]]))
        pairs += run.latents[sae.cfg.site].nnz
    assert 0 < figures["l0"] == pytest.approx(pairs / len(ids))
