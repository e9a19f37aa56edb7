"""A conversation, turn by turn: the cached turns are those of one forward; the command."""

import json

import numpy as np
import pytest
import torch
from tiny_model import LAYER, letters, make_sae
from two_models import KEY, base, lines, save_two

from gemmascope_fast.analysis.compare import conversation as talk
from gemmascope_fast.analysis.compare.models import Side
from gemmascope_fast.analysis.pair import load_model
from gemmascope_fast.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_two(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder / "a"))


TURNS = [
    talk.Turn("user", "what is it"),
    talk.Turn("assistant", "i ask the tool"),
    talk.Turn("tool", "rain\nwind"),
    talk.Turn("assistant", "rain"),
]


def test_cached_turns_are_those_of_one_forward(loaded):
    model, tokenizer = loaded
    sae = make_sae()
    traces = talk.read_conversation(model, tokenizer, {KEY: sae}, TURNS)
    ids = torch.cat([t.ids for t in traces])[None]
    assert tokenizer.decode(ids[0, 1:]) == "user: what is it\nmodel: i ask the tool\ntool: rain\nwind\nmodel: rain\n"
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0]
    z = (hidden.double() @ sae.W_enc.double()).detach()
    got = torch.cat([t.latents.to_dense() for t in traces]).double().detach()
    slack = 2**-23 * 100 * float(z.abs().max())
    sure = (z - 1).abs() > slack
    assert float((got - z * (z > 1))[sure].abs().max()) < slack
    for trace in traces:
        assert tokenizer.decode(trace.ids[trace.content]) == trace.turn.content
    roles = talk.by_role(traces)
    assert list(roles) == ["user", "assistant", "tool"]
    own = torch.cat([t.latents[t.content].to_dense() for t in traces if t.turn.role == "assistant"])
    assert roles["assistant"]["tokens"] == len(own) == 18
    assert roles["assistant"]["l0"] == pytest.approx((own != 0).sum(1).double().mean().item())
    (feature, mean, fired), *_ = traces[2].top()
    dense = traces[2].latents[traces[2].content].to_dense()
    assert mean == pytest.approx(dense[:, feature].mean().item())
    assert mean == pytest.approx(dense.mean(0).max().item())
    assert fired == int((dense[:, feature] != 0).sum())
    with pytest.raises(ValueError, match="at most 256 tokens"):
        talk.read_conversation(model, tokenizer, {KEY: sae}, [talk.Turn("user", letters(300))])


def test_conversation_by_command(folder, tmp_path, capsys):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([*map(vars, TURNS), {"role": "user", "content": "</script>"}]))
    words = [*base(folder, "compare conversation"), "--transcript", str(path), "--html", str(tmp_path / "t.html")]
    assert cli.main([*words, "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert [t["role"] for t in found["turns"]] == ["user", "assistant", "tool", "assistant", "user"]
    text = (tmp_path / "t.html").read_text()
    assert text.count("</script>") == 1
    data = json.loads(text.split("const turns = ")[1].split(", $ =")[0])
    assert ["".join(s["t"] for s in t["spans"] if s["read"]) for t in data][:4] == [t.content for t in TURNS]
    lines(path, [{"role": "user", "content": "a"}, {"role": "tool"}])
    assert cli.main([*words, "--overwrite"]) == 1
    assert "line 2: expected strings under 'role' and 'content'" in capsys.readouterr().err
    path.write_text("[1]")
    assert cli.main([*words, "--overwrite"]) == 1
    assert "turn 1: expected strings" in capsys.readouterr().err


def test_a_side_without_tokens_is_empty():
    assert Side(5).matrix(0).shape == (0, 5)
    side = Side(5)
    side.parts.append((np.array([1]), np.array([4]), np.array([2.0])))
    assert side.matrix(3).toarray().tolist() == [[0] * 5, [0, 0, 0, 0, 2.0], [0] * 5]
