"""`gemmascope-fast watch`: what it shows is what attach says, what it holds is held; lines, commands, a terminal."""

import io

import pytest
import torch
from attach_models import F, gemma3, lively, sae
from test_training_architectures import tokenizer

import gemmascope_fast as gsf
from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli
from gemmascope_fast.cli import watch
from gemmascope_fast.cli.arguments import load_pair

LAYER, TEXT = 1, "abcabd"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("watch")
    model = gemma3(vocab_size=32)
    lively(model).save_pretrained(where / "model")
    tokenizer(False).save_pretrained(where / "model")
    save(sae(site=gsf.Site("resid", LAYER)), where / "own.safetensors", matrix_dtype=torch.float32)
    return where


def arguments(folder, *more):
    words = ["watch", "--model", str(folder / "model"), "--sae", str(folder / "own.safetensors"), "--max-tokens", "6"]
    return cli.parse([*words, *more])


@pytest.fixture(scope="module")
def session(folder):
    args = arguments(folder)
    return watch.Session(*load_pair(args), args)


def test_each_token_is_shown_with_its_strongest_features(session):
    seen = []
    writing = session.write(TEXT, [], lambda w: seen.append((len(w.ids), len(w.steps))))
    model, own = session.model, session.tokenizer
    ids = own(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode(), gsf.attach(model, session.sae, tokens="content", mode="observe") as run:
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert writing.ids == out[0, ids.shape[1] :].tolist()
    content = ~torch.isin(run.tokens.token_id, torch.tensor([0, 1, 2]))
    values, features = run.latents[LAYER][content].topk(4)
    assert [s.token for s in writing.steps] == [own.decode([t]) for t in run.tokens.token_id[content].tolist()]
    for step, own_values, own_features in zip(writing.steps, values.tolist(), features.tolist(), strict=True):
        assert step.features == [(f, v) for f, v in zip(own_features, own_values, strict=True) if f >= 0]
    # told at every token, before the next: as many tokens were read as were written, and the prompt
    assert seen[0] == (1, 6)
    assert len(seen) == len(writing.ids) + 1
    assert 0 < writing.hooks < writing.seconds


def test_held_features_are_edits_and_the_newest_counts(session):
    plain = session.write(TEXT, [], lambda w: None)
    session.held = []
    assert session.command("/clamp 7 40")
    assert session.command("/ablate 5")
    assert session.command("/clamp 7 900")
    assert [watch._named(e) for e in session.held] == ["ablate 5", "clamp 7 at 900"]
    held = session.write(TEXT, session.held, lambda w: None)
    edits = [gsf.Ablate(5), gsf.Clamp(7, 900.0)]
    ids = session.tokenizer(TEXT, return_tensors="pt").input_ids
    with (
        torch.inference_mode(),
        gsf.attach(session.model, session.sae, mode="splice+error", edits=edits, tokens="content"),
    ):
        want = session.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert held.ids == want[0, ids.shape[1] :].tolist()
    assert held.ids != plain.ids
    assert session.command("/off")
    assert session.held == []


def test_what_is_no_command_or_no_feature_is_named(session):
    assert not session.command("abc")
    for line, message in (
        ("/clamp 3", "Type a text"),
        ("/stop", "Type a text"),
        ("/clamp a 3", "expected a feature and a number"),
        (f"/ablate {F}", r"\[0, 96\)"),
    ):
        with pytest.raises(ValueError, match=message):
            session.command(line)
    with pytest.raises(StopIteration):
        session.command("/quit")


def test_the_command_shows_both_texts_and_goes_on_over_lines(folder, monkeypatch, capsys):
    args = arguments(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\n/clamp 3 60\n/nonsense\nab\n/quit\nnot read\n"))
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert out.count("as it is") == 2
    assert "clamp 3 at 60" in out
    assert "strongest features" in out
    assert "/nonsense: Type a text" in " ".join(out.split())
    assert "not read" not in out


def test_ctrl_c_ends_what_is_written_and_not_the_session(folder, monkeypatch, capsys):
    args = arguments(folder)
    write, calls = watch.Session.write, []

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return write(self, *given)

    monkeypatch.setattr(watch.Session, "write", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\n{TEXT}\n/quit\n"))
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert (out.count("interrupted"), out.count("as it is")) == (1, 1)
    assert calls[1][0] == TEXT  # the interrupted line is not part of the text
    calls.clear()  # with --prompt there is no session to go back to
    words = ["watch", "--model", str(folder / "model"), "--sae", str(folder / "own.safetensors"), "--prompt", TEXT]
    assert cli.main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "gemmascope-fast watch: interrupted"


def test_a_prompt_is_enough(folder, capsys):
    args = arguments(folder, "--prompt", TEXT, "--clamp", "3=60", "--add", "4=2", "--ablate", "5", "--top", "2")
    assert args.run(args) == 0
    out = capsys.readouterr().out
    assert "clamp 3 at 60, add 4 at 2, ablate 5" in " ".join(out.split())
    assert cli.main(["watch", "--top", "0"]) == 1
    assert "--top: expected at least 1" in capsys.readouterr().err
