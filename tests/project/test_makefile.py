"""The Makefile's variables mean one thing each, and git ignores its environments."""

import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_no_variable_is_defined_twice():
    """make reads `:=` top to bottom, but recipes only when they run: the last definition serves all of them."""
    names = Counter(re.findall(r"^(\w+)\s*[:?]?=", MAKEFILE, flags=re.MULTILINE))
    assert {"VENV", "LENS", "TORCH"} <= set(names)
    assert [name for name, times in names.items() if times > 1] == []


def test_git_ignores_every_environment(tmp_path):
    """Held in an empty repository: in a checkout `.venv` may be a link, behind which git does not look."""
    folders = set(re.findall(r"\.venv[\w-]*", MAKEFILE))
    assert len(folders) >= 5
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text(encoding="utf-8"), encoding="utf-8")
    for folder in folders:
        ignored = subprocess.run(["git", "check-ignore", "-q", f"{folder}/bin/python"], cwd=tmp_path, check=False)
        assert ignored.returncode == 0, folder
