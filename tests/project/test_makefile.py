"""Each variable of the Makefile has one meaning: its recipes are printed (`make -n`), never run."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def recipe(target):
    """The commands of a target and of all it needs, whether or not they were made already."""
    # `make test` runs this too: what make tells its children does not belong here
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-nB", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", " ").splitlines()


def test_no_variable_is_defined_twice():
    """make reads `:=` top to bottom, but recipes only when they run: the last definition serves all of them."""
    names = Counter(re.findall(r"^(\w+)\s*[:?]?=", MAKEFILE, flags=re.MULTILINE))
    assert {"VENV", "LENS", "TORCH"} <= set(names)
    assert [name for name, times in names.items() if times > 1] == []


def test_the_environment_of_saelens_gets_the_libraries_that_its_tests_import():
    lines = recipe("test-saelens")
    (without_dependencies,) = [line for line in lines if "--no-deps" in line]
    packages = re.findall(r"(\S+)==\S+", without_dependencies)
    assert packages == ["circuit-tracer", "dictionary-learning", "eai-sparsify", "sae-bench"]
    assert lines[-1] == ".venv-saelens/bin/python -m pytest tests/saelens"


def test_the_peers_of_the_benchmark_get_an_environment_of_their_own():
    lines = recipe("bench-peers")
    assert re.search(r"-m venv \.venv-peers$", lines[0])
    assert all(".venv-peers/" in line for line in lines[1:]), lines
    (peers,) = [line for line in lines if "sae-lens" in line]
    assert peers.split()[-4:] == ["sae-lens", "eai-sparsify", "torchao", "scipy"]


def test_git_ignores_every_environment(tmp_path):
    """Held in an empty repository: in a checkout `.venv` may be a link, behind which git does not look."""
    folders = set(re.findall(r"\.venv[\w-]*", MAKEFILE))
    assert len(folders) >= 5
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    for folder in folders:
        ignored = subprocess.run(["git", "check-ignore", "-q", f"{folder}/bin/python"], cwd=tmp_path, check=False)
        assert ignored.returncode == 0, folder
