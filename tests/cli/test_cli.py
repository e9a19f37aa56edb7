"""The command line: info against what it reports on, errors as one line and a status."""

import json
import platform

import pytest
import torch

from gemmascope_fast import backends
from gemmascope_fast.backends.versions import versions
from gemmascope_fast.cli import info
from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev.bench import machine


def test_info_json_gives_the_choices_of_the_dispatcher(capsys):
    assert cli.main(["info", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(c.op, c.device, c.backend, c.reason) for c in backends.choices()]
    assert [(r["op"], r["device"], r["backend"], r["reason"]) for r in found["ops"]] == rows
    assert found["cpu"]["isa"] == backends.isa()


def test_versions_are_those_installed_and_none_of_what_is_not():
    found = versions(("torch", "no-package-of-this-name"))
    assert list(found) == ["gemmascope-fast", "python", "torch", "no-package-of-this-name"]
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["no-package-of-this-name"] is None
    told = machine.describe(threads=1)["versions"]
    assert told | found == told | {"no-package-of-this-name": None}
    assert "gguf" in info.collect()["versions"]


def test_wrong_input_is_one_line_and_status_one(capsys):
    assert cli.main(["demo", "--text", "/nonexistent/text"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "/nonexistent/text" in captured.err


def test_unknown_command_is_a_usage_error():
    with pytest.raises(SystemExit) as stopped:
        cli.main(["nothing"])
    assert stopped.value.code == 2
