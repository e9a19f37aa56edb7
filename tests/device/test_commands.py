"""Commands with --device cuda: the figures of --device cpu, up to the rounding of the model."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_model import letters, make_sae, save_model

from gemmascope_fast.checkpoints.native import save
from gemmascope_fast.cli import main as cli

COMMANDS = {
    "demo": ["--prompt", "abc abd"], "eval": ["--text", "t.txt", "--window", "40"],
    "compare texts": ["--a", "t.txt", "--b", "u.txt"], "compare conversation": ["--transcript", "talk.json"],
    "compare models": ["--model-b", "model", "--text", "t.txt", "--split", "line"],
    "extract": ["--text", "t.txt", "--window", "40", "--out", "OUT"],
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    save_model(tmp_path / "model", letters="abcdefghijklmnopqrstuvwxyz \n:")
    save(make_sae(features=8), tmp_path / "sae.safetensors")
    for number, name in enumerate(("t.txt", "u.txt")):
        (tmp_path / name).write_text("\n".join(letters(60, seed=10 * number + i) for i in range(6)))
    (tmp_path / "talk.json").write_text(json.dumps([{"role": "user", "content": "abc"}]))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_the_device(root, capsys, name):
    found = {}
    for device in ("cpu", "cuda"):
        own = [device if word == "OUT" else word for word in COMMANDS[name]]
        words = [*name.split(), "--model", "model", "--sae", "sae.safetensors", *own, "--json", "-", "--device", device]
        assert cli.main(words) == 0
        found[device] = json.loads(capsys.readouterr().out)
    for key in ("fvu", "l0", "ce_base", "delta_loss", "texts", "documents"):
        if key in found["cpu"]:
            assert found["cuda"][key] == pytest.approx(found["cpu"][key], rel=1e-3, abs=1e-3), key
