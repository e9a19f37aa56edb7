"""Evaluation against its formulas, computed here on dense tensors; streaming, resuming; train and eval by command."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from tiny_model import BOS, LAYER, LETTERS, D, F, save_model

from gemmascope_fast import JumpReLUSAE
from gemmascope_fast.analysis.evaluation import Evaluation, Reconstruction, evaluate
from gemmascope_fast.analysis.evaluation.run import pieces
from gemmascope_fast.checkpoints.loading import open_checkpoint
from gemmascope_fast.cli import eval as eval_command
from gemmascope_fast.cli import main as cli
from gemmascope_fast.errors import CheckpointError
from gemmascope_fast.sae.sites import Site
from gemmascope_fast.training import activations as training_activations
from gemmascope_fast.training import text as texts
from gemmascope_fast.training.activations import activations, collect, first_layers, windows

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(700))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Gemma 3 with a tokenizer of single letters, saved as transformers saves them."""
    pytest.importorskip("transformers")
    return save_model(tmp_path_factory.mktemp("model"), LETTERS[:26])


@pytest.fixture(scope="module")
def loaded(folder):
    from gemmascope_fast.analysis.pair import load_model

    return load_model(str(folder))


@pytest.fixture(scope="module")
def sae():
    g = torch.Generator().manual_seed(1)
    W = torch.randn(D, F, generator=g)
    return JumpReLUSAE.from_weights(
        W_enc=W, W_dec=0.05 * W.t().contiguous(), b_enc=torch.zeros(F), b_dec=torch.ones(D), threshold=torch.ones(F)
    )


def token_windows(tokenizer, text, length):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [torch.tensor([[BOS, *ids[i : i + length]]]) for i in range(0, len(ids), length)]


def dense(sae, x):
    z = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    f = z * (z > sae.threshold.double())
    return f, f @ sae.W_dec.double() + sae.b_dec.double()


def test_reconstruction_figures_agree_with_their_formulas(sae):
    x = torch.randn(333, D, generator=torch.Generator().manual_seed(2)) + 50
    f, x_hat = dense(sae, x)
    want = {
        "tokens": 333,
        "l0": (f != 0).sum(1).double().mean().item(),
        "fvu": ((x - x_hat) ** 2).sum().item() / ((x.double() - x.double().mean(0)) ** 2).sum().item(),
        "explained_variance": 1 - ((x - x_hat).var(0).sum() / x.double().var(0).sum()).item(),
        "cosine": torch.nn.functional.cosine_similarity(x.double(), x_hat, dim=1).mean().item(),
        "dead_fraction": (f == 0).all(0).double().mean().item(),
    }
    for sizes in ([333], [1, 100, 0, 232]):
        run = Reconstruction(sae)
        for part in x.split(sizes):
            run.add(part)
        # the float32 reconstruction against the float64 one: rounding of values of about 50
        assert run.figures() == pytest.approx(want, rel=1e-5), sizes
        assert torch.allclose(run.mean(), x.double().mean(0), rtol=1e-12)
        assert torch.equal(run.fired, (f != 0).sum(0))


def test_no_tokens_is_an_error(sae):
    with pytest.raises(ValueError, match="content token"):
        Reconstruction(sae).figures()


def test_whole_evaluation_agrees_with_plain_forwards(loaded, sae):
    model, tokenizer = loaded
    got = evaluate(model, tokenizer, sae, LAYER, TEXT, window=60)
    rows, losses, count = [], torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        inputs = token_windows(tokenizer, TEXT, 60)
        for ids in inputs:
            rows.append(model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:])
        x = torch.cat(rows)
        f, x_hat = dense(sae, x)
        mean = x.mean(0)
        for ids, own in zip(inputs, rows, strict=True):
            changes = (own, dense(sae, own)[1].float(), mean.expand_as(own), torch.zeros_like(own))
            for i, new in enumerate(changes):
                handle = model.model.layers[LAYER].register_forward_hook(
                    lambda _m, _a, out, new=new: torch.cat([out[:, :1], new[None]], 1)
                )
                losses[i] += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                handle.remove()
            count += ids.shape[1] - 1
    base, spliced, by_mean, by_zero = (losses / count).tolist()
    assert got["tokens"] == got["loss_tokens"] == count == len(TEXT)
    assert got["l0"] == pytest.approx((f != 0).sum(1).double().mean().item())
    assert got["fvu"] == pytest.approx(
        ((x - x_hat) ** 2).sum().item() / ((x - mean).double() ** 2).sum().item(), rel=1e-4
    )
    assert len({base, spliced, by_mean, by_zero}) == 4
    for key, value in (("base", base), ("spliced", spliced), ("mean_ablated", by_mean), ("zero_ablated", by_zero)):
        assert got[f"ce_{key}"] == pytest.approx(value, rel=1e-5), key
    assert got["delta_loss"] == got["ce_spliced"] - got["ce_base"]
    assert got["loss_recovered_mean"] == pytest.approx(
        (got["ce_mean_ablated"] - got["ce_spliced"]) / (got["ce_mean_ablated"] - got["ce_base"])
    )
    assert got["loss_recovered_zero"] == pytest.approx(
        (got["ce_zero_ablated"] - got["ce_spliced"]) / (got["ce_zero_ablated"] - got["ce_base"])
    )


def test_the_second_pass_may_end_early(loaded, sae):
    model, tokenizer = loaded

    def figures(loss_tokens):
        return Evaluation(model, tokenizer, sae, LAYER, lambda: [TEXT], window=20, loss_tokens=loss_tokens).run()

    # a batch is eight windows of 20 tokens
    part, whole = figures(161), figures(None)
    assert (part["tokens"], part["loss_tokens"]) == (len(TEXT), 320)
    assert (whole["tokens"], whole["loss_tokens"]) == (len(TEXT), len(TEXT))
    assert part["ce_base"] != whole["ce_base"]
    assert part["fvu"] == whole["fvu"]
    with pytest.raises(ValueError, match="loss_tokens: expected"):
        figures(0)


def test_special_tokens_in_the_text_do_not_count(loaded):
    model, _ = loaded
    ids = torch.tensor([[BOS, 5, 6, 2, 7, 0, 8]])
    (x,) = activations(model, LAYER, [ids])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
    assert torch.equal(x, hidden[[1, 2, 4, 6]])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 7, 11])
def test_an_interrupted_evaluation_goes_on(loaded, sae, tmp_path, stop):
    """Six batches a pass: in the first pass, right after it, and in the second."""
    model, tokenizer = loaded

    def make(state):
        lines = [TEXT[i : i + 50] for i in range(0, 300, 50)]
        return Evaluation(model, tokenizer, sae, LAYER, lambda: lines * 16, window=100, state=state, save_every=1)

    whole = make(None)
    want = whole.run()
    batches = 2 * whole.done["reconstruction"]
    assert batches == 12
    seen = []

    def progress(which, tokens):
        seen.append((which, tokens))
        if len(seen) == stop:
            raise Interrupted

    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        make(state).run(progress=progress)
    again = make(state)
    done = again.done["reconstruction"] + again.done["losses"]
    assert done == stop - 1  # the batch that was cut off before its save is done again
    rest = []
    assert again.run(progress=lambda which, tokens: rest.append(tokens)) == want
    assert len(rest) == batches - done
    with pytest.raises(ValueError, match="state"):
        Evaluation(model, tokenizer, sae, LAYER, lambda: [TEXT], window=50, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="state"):
        make(state)


def test_pieces_lose_nothing_and_stay_bounded():
    lines = ["a" * 3, "b" * 25, "\n", "", "c" * 10, "d"]
    found = list(pieces(iter(lines), 10))
    assert "".join(found) == "".join(lines)
    assert all(0 < len(p) <= 10 for p in found)


def test_windows_hold_every_token_once():
    for count in (0, 1, 7, 8, 63, 64, 65, 71):
        blocks = list(windows(list(range(100, 100 + count)), SimpleNamespace(bos_token_id=BOS), 8))
        rows = [row for block in blocks for row in block.tolist()]
        assert [t for row in rows for t in row[1:]] == list(range(100, 100 + count))
        assert all(row[0] == BOS and 1 < len(row) <= 9 for row in rows)
    plain = SimpleNamespace(bos_token_id=None)
    assert [b.tolist() for b in windows([1, 2, 3], plain, 2)] == [[[1, 2]], [[3]]]
    encoder = SimpleNamespace(bos_token_id=None, cls_token_id=101, sep_token_id=102)
    assert [b.tolist() for b in windows([1, 2, 3], encoder, 2)] == [[[101, 1, 2, 102]], [[101, 3, 102]]]


def test_collecting_is_written_once_and_equals_hidden_states(loaded, tmp_path):
    model, tokenizer = loaded
    layers = len(model.model.layers)
    (x,) = collect(model, tokenizer, LAYER, TEXT, tmp_path, "text")
    assert len(model.model.layers) == layers
    with torch.no_grad():
        want = torch.cat(
            [
                model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]
                for ids in token_windows(tokenizer, TEXT, 255)
            ]
        )
    # a batch of several windows is another shape of the same GEMMs: rounding only
    assert torch.allclose(x, want, rtol=0, atol=64 * 2.0**-23 * float(want.abs().max()))
    (file,) = tmp_path.rglob("*.npy")
    stamp = file.stat().st_mtime_ns
    (again,) = collect(model, tokenizer, LAYER, TEXT, tmp_path, "text")
    assert torch.equal(x, again)
    assert file.stat().st_mtime_ns == stamp
    collect(model, tokenizer, LAYER - 1, TEXT, tmp_path, "text")
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    with pytest.raises(ValueError, match="layer: expected"):
        collect(model, tokenizer, layers, TEXT, tmp_path, "text")


def test_collecting_goes_on_with_the_part_that_is_missing(loaded, tmp_path, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(training_activations, "PART", 16)
    text, every = TEXT[:40], training_activations.activations
    whole = collect(model, tokenizer, LAYER, text, tmp_path / "whole", "text")
    assert [part.shape[0] for part in whole[:-1]] == [16] * (len(whole) - 1)
    assert len(whole) > 2
    calls = []

    def cut_off(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Interrupted
        return every(*args)

    monkeypatch.setattr(training_activations, "activations", cut_off)
    with pytest.raises(Interrupted):
        collect(model, tokenizer, LAYER, text, tmp_path / "cut", "text")
    assert [p.name for p in (tmp_path / "cut").rglob("*.npy")] == ["00000.npy"]
    parts = collect(model, tokenizer, LAYER, text, tmp_path / "cut", "text")
    assert len(calls) == 2 + len(whole) - 1
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    begun = collect(model, tokenizer, LAYER, text, tmp_path / "cut", "text", limit=17)
    assert [part.shape[0] for part in begun] == [16, 16]
    assert len(calls) == 2 + len(whole) - 1


def test_layers_come_back_after_an_error(loaded):
    model, _ = loaded
    layers = model.model.layers
    with pytest.raises(Interrupted), first_layers(model, 1):
        raise Interrupted
    assert model.model.layers is layers


def test_train_then_eval_by_command(folder, tmp_path, capsys):
    text = tmp_path / "letters.txt"
    text.write_text(TEXT * 4, encoding="utf-8")
    out = tmp_path / "sae.safetensors"
    arguments = ["train", "--model", str(folder), "--layer", "1", "--d-sae", "64", "--l0", "6", "--steps", "30"]
    arguments += ["--batch", "128", "--text", str(text), "--bandwidth", "0.1", "--out", str(out)]
    assert cli.main(arguments) == 0
    assert not out.with_name(out.name + ".run").exists()
    entries = open_checkpoint(out).arrays
    assert entries["W_enc"].dtype == torch.float16
    assert entries["b_enc"].dtype == torch.float32
    trained = JumpReLUSAE.from_pretrained(str(out))
    assert trained.cfg.site == Site("resid", 1)
    assert trained.cfg.metadata.extra["figures"]["settings"]["steps"] == 30
    capsys.readouterr()
    result, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    command = ["eval", "--model", str(folder), "--sae", str(out), "--text", str(text), "--held-out"]
    command += ["--json", str(result), "--state", str(tmp_path / "state")]
    pytest.importorskip("matplotlib")
    assert cli.main([*command, "--plot", str(plot)]) == 0
    figures = json.loads(result.read_text())
    # train measured the SAE as it is stored, on the same windows of the same tenth
    for key, value in trained.cfg.metadata.extra["figures"]["held_out"][str(text)].items():
        assert figures[key] == pytest.approx(value, rel=1e-6), key
    assert figures["tokens"] == len(TEXT) * 4 // 10
    assert sum(figures["firing_frequencies"]) == pytest.approx(figures["l0"])
    assert "<svg" in plot.read_text()


def test_a_run_of_other_settings_is_not_resumed(folder, tmp_path, capsys):
    text = tmp_path / "letters.txt"
    text.write_text(TEXT, encoding="utf-8")
    out = tmp_path / "sae.safetensors"
    arguments = ["train", "--model", str(folder), "--layer", "1", "--d-sae", "64", "--l0", "6", "--steps", "4"]
    arguments += ["--batch", "64", "--text", str(text), "--out", str(out)]
    assert cli.main([*arguments, "--resume"]) == 1
    assert "--resume: expected a run in" in capsys.readouterr().err
    from gemmascope_fast.training.checkpoint import save_run
    from gemmascope_fast.training.trainer import Scaling, TrainConfig, Trainer

    run = Trainer(TrainConfig(d_sae=64, l0=6, steps=5), Scaling.of([torch.randn(9, D)]))
    save_run(run, out.with_name(out.name + ".run"), {})
    assert cli.main(arguments) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 1
    assert "it was started with another model" in capsys.readouterr().err
    assert not out.exists()


def test_a_file_is_read_anew_in_bounded_parts(tmp_path):
    file = tmp_path / "text"
    file.write_text("é" * (3 << 20), encoding="utf-8")
    lines, label = eval_command._text(argparse.Namespace(text=[str(file)], held_out=False))
    for _ in range(2):
        parts = list(lines())
        assert sum(map(len, parts)) == 3 << 20
        assert max(map(len, parts)) <= 1 << 20
    file.write_text("x", encoding="utf-8")
    assert eval_command._text(argparse.Namespace(text=[str(file)], held_out=False))[1] != label


def test_held_out_is_the_last_tenth_and_texts_are_english():
    first, last = texts.Text("t", "".join(map(str, range(1000)))).split()
    assert first + last == "".join(map(str, range(1000)))
    assert len(last) == len(first + last) // 10
    assert len(texts.pydoc_topics()) > 300_000
    documented = texts.stdlib_docstrings()
    assert len(documented) > 500_000
    assert documented.count(" the ") > 5_000
    assert len(set(texts.OPENINGS)) == 64


def test_the_model_writes_the_same_text_again(loaded):
    model, tokenizer = loaded
    state = torch.random.get_rng_state()
    one = texts.sampled(model, tokenizer, rounds=2, tokens=5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts.sampled(model, tokenizer, rounds=2, tokens=5, seed=1) == one
    assert texts.sampled(model, tokenizer, rounds=2, tokens=5, seed=2) != one
