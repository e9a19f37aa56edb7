"""`pip install --no-build-isolation .` without a working compiler: it installs and says so."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "gemmascope_fast", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
# An editable install of another tree, as `make env` makes it, would lend the new one its extension.
PROBE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import gemmascope_fast
from gemmascope_fast.cli import main as cli
print(gemmascope_fast.__file__)
sys.exit(cli.main(["info", *sys.argv[1:]]))
"""


@pytest.fixture
def source(tmp_path):
    """A clone's files, without what was built from them: pip builds in the folder that it installs from."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in SOURCES:
        origin, copy = ROOT / name, folder / name
        if origin.is_dir():
            shutil.copytree(origin, copy, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(origin, copy)
    return folder


def install(source, target, **environment):
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--verbose"]
    command += ["--no-build-isolation", "--no-deps", "--target", str(target), str(source)]
    env = {k: v for k, v in os.environ.items() if k != "GSF_REQUIRE_EXT"} | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=target.parent)


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("/nonexistent", "no C++ compiler (/nonexistent): installing without"),
        ("false", "the native kernels were not built: "),
    ],
    ids=["no compiler", "a compiler that fails"],
)
def test_without_a_compiler_it_installs_and_says_what_it_lacks(source, tmp_path, compiler, said):
    target = tmp_path / "installed"
    done = install(source, target, CXX=compiler, CC=compiler)
    assert done.returncode == 0, done.stderr
    assert f"gemmascope-fast: {said}" in done.stdout + done.stderr
    assert not list(target.rglob("*.so"))
    for part in (
        "kernels/encode.py",
        "dev/report/templates",
        "analysis/templates",
        "checkpoints/data/examples",
        "py.typed",
    ):
        assert (target / "gemmascope_fast" / part).exists(), part
    assert not (target / "kernels").exists(), "a module of this name is another package's"

    def info(*flags):
        env = {**os.environ, "PYTHONPATH": str(target)}
        command = [sys.executable, "-c", PROBE, *flags]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=tmp_path)
        where, _, printed = run.stdout.partition("\n")
        assert Path(where).is_relative_to(target), "not the package just installed"
        return printed

    found = json.loads(info("--json", "-"))
    assert "the compiled extension is missing" in found["extension_missing"]
    assert {row["backend"] for row in found["ops"] if row["device"] == "cpu"} == {"eager"}
    assert "the compiled extension is missing" in " ".join(info().split())


def test_a_required_extension_is_an_error_without_a_compiler(source, tmp_path):
    done = install(source, tmp_path / "installed", CXX="/nonexistent", GSF_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "GSF_REQUIRE_EXT=1, but no C++ compiler '/nonexistent' was found" in done.stdout + done.stderr
