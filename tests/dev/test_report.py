"""The report: pictures and page from rows alone, the README's table equal to the stored JSON's."""

import base64
import json
import re
from pathlib import Path

import pytest

from gemmascope_fast.cli import main as cli
from gemmascope_fast.dev.bench.exponents import exponents
from gemmascope_fast.dev.bench.rows import Ratio, Results, Row
from gemmascope_fast.dev.report import plots, results_page
from gemmascope_fast.errors import GemmaScopeFastError

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks" / "results.json"


def made_up():
    """Rows of one run: ours four times as fast as eager fp32."""
    roof = {"read_gb_s": 30.0, "fma_gflop_s": 200.0, "int8_gop_s": 900.0}
    machine = {"processor": "A <b>processor</b>", "isa": "avx512", "threads": 2, "roof": roof}
    results = Results(
        {**machine, "versions": {"torch": "2.13.0", "scipy": None}}, missing={"x/SAELens": "not installed"}
    )
    shape = (64, 256, 5.0)
    for op in ("encode", "decode", "SAE"):
        for T in (1, 16):
            for impl, ms, speed in (("eager fp32", 4.0, None), ("ours", 1.0, 4.0), ("eager bf16", 2.0, 2.0)):
                suite = "modules" if op == "SAE" else "ops"
                row = Row(suite, op, impl, T, *shape, "fp32", 2, ms * T, ms, ms * T, 99, 99, 0.8, 1e-6, True, 0)
                results.rows.append(row)
                if speed:
                    results.ratios[row.key] = Ratio(speed, speed - 0.5, speed + 0.5)
    for width in (256, 512, 1024):
        results.rows.append(
            Row("scaling", "width", "ours", 1, 64, width, 5.0, "fp32", 2, width / 9, 1, 9, 1, 1, 0.5, None, None, None)
        )
    results.exponents = exponents(results.rows, roof)
    held = {"d_in": 64, "fp32_bytes": 8 * 10**8, "bf16_bytes": 4 * 10**8, "screen_bytes": 2 * 10**8}
    results.memory = [{**held, "d_sae": width} for width in (256, 512, 1024)]
    return results


def test_page_is_whole_by_itself_and_escapes(tmp_path):
    results = made_up()
    results.save(tmp_path / "r.json")
    command = [
        "dev",
        "report",
        str(tmp_path / "r.json"),
        "--html",
        str(tmp_path / "r.html"),
        "--png",
        str(tmp_path / "png"),
    ]
    assert cli.main(command) == 0
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing comes from elsewhere
    assert "A &lt;b&gt;processor" in page
    assert "not installed" in page
    images = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    files = {p.name: p.read_bytes() for p in (tmp_path / "png").iterdir()}
    assert sorted(images) == sorted(files.values())
    assert {"roofline.png", "speedup-encode-64x256.png", "scaling-width.png", "memory.png"} <= set(files)
    assert all(image.startswith(b"\x89PNG") for image in images)


def test_quality_is_drawn_from_quantize_tables(tmp_path):
    key = "ffn/group32/minmax/prefix/int{}/exact"
    table = {"full": {"loss": 2.5}} | {
        key.format(b): {"loss": 2.5 + 1 / b, "bits_per_weight": b + 0.75} for b in (8, 4, 2)
    }
    (tmp_path / "q.json").write_text(json.dumps(table))
    rows = plots.load_quality(tmp_path / "q.json")
    assert [(r["method"], r["activations"], r["bits"], r["loss"]) for r in rows] == [
        ("full", "exact", None, 2.5),
        *(("ffn, group32, minmax, prefix", "exact", b + 0.75, 2.5 + 1 / b) for b in (8, 4, 2)),
    ]
    assert [p.name for p in plots.draw(made_up(), rows)][-1] == "quality"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(GemmaScopeFastError, match="quantize --table"):
        plots.load_quality(tmp_path / "bad.json")


def test_quality_is_drawn_from_what_compare_stored():
    """Other figures stand beside those of widths in its file, some with as many parts in their keys."""
    rows = plots.load_quality(ROOT / "benchmarks" / "measured" / "matryoshka-compare-quick.json")
    methods = {r["method"] for r in rows}
    assert "full" in methods
    assert "ffn, channel, omniquant, alone" in methods
    assert not any("mix" in m or "sae" in m for m in methods)
    assert {r["activations"] for r in rows} == {"exact", "int8"}


def test_colours_are_one_for_each_implementation():
    colors = plots._colors(made_up())
    assert colors["ours"] == plots.OURS
    assert len(set(colors.values())) == len(colors) == 3


def test_several_runs_of_one_machine_make_one_report(tmp_path):
    first, second = made_up(), made_up()
    first.rows = [r for r in first.rows if r.suite != "scaling"]
    first.exponents, first.memory = [], []
    whole = results_page.together([first, second])
    assert len(whole.rows) == len(second.rows)
    assert (whole.exponents, whole.memory) == (second.exponents, second.memory)
    second.machine = {**second.machine, "isa": "avx2"}
    with pytest.raises(GemmaScopeFastError, match="different machines"):
        results_page.together([first, second])


def test_tables_say_what_the_rows_say():
    table = results_page.full_table(made_up())
    assert "| whole SAE | 16 | 16.00 | 4.0 | 2.0 |  | 80% |" in table
    assert table.count("\n| ") == 7  # the heading and two T for each of three ops
    short = results_page.readme_table(made_up())
    assert "| 16 | 16.00 |  | 4.0 |  |  |" in short
    assert short.count("\n| ") == 3  # the heading and two T of the whole SAE


def test_tables_replace_what_is_between_the_marks_and_nothing_else():
    results = made_up()
    for begin, end, table in (
        (results_page.BEGIN, results_page.END, results_page.readme_table),
        (results_page.ALL_BEGIN, results_page.ALL_END, results_page.full_table),
    ):
        again = results_page.with_tables(f"before\n{begin}\nold\n{end}\nafter\n", results)
        assert again == f"before\n{begin}\n{table(results)}{end}\nafter\n"
        with pytest.raises(GemmaScopeFastError, match="expected one"):
            results_page.with_tables(f"{begin}\nold\n{end}\n{end}\n", results)
    with pytest.raises(GemmaScopeFastError, match="expected one"):
        results_page.with_tables("no marks", results)


def test_without_rows_of_the_modules_there_is_no_table():
    for table in (results_page.readme_table, results_page.full_table):
        with pytest.raises(GemmaScopeFastError, match="suite modules"):
            table(Results({}))


@pytest.mark.parametrize("page", ["README.md", "docs/how/speed.md"])
def test_the_figures_of_readme_and_docs_are_those_of_the_stored_run(page):
    """`make figures` was the last to write the tables; without a stored run none are claimed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    results = Results.load(STORED) if STORED.exists() else None
    assert text == results_page.with_tables(text, results), f"{page}: `make figures` writes the table anew"


def test_the_pictures_of_speed_are_of_the_stored_run():
    """Each carries a hash of the rows that it was drawn from."""
    text = (ROOT / "docs" / "how" / "speed.md").read_text(encoding="utf-8")
    shown = re.findall(r"\]\(\.\./(images/[\w-]+\.png)\)", text)
    assert len(shown) >= 2
    source = plots.digest(Results.load(STORED)).encode()
    for name in shown:
        png = (ROOT / "docs" / name).read_bytes()
        assert source in png, f"{name}: `make figures` draws it anew"
        assert plots.digest(made_up()).encode() not in png


def test_the_guides_pictures_are_of_the_stored_scaling_run():
    """`gemmascope-fast dev report benchmarks/measured/scaling.json --png docs/images` draws them anew."""
    source = plots.digest(Results.load(ROOT / "benchmarks" / "measured" / "scaling.json")).encode()
    text = (ROOT / "docs" / "guides" / "wide.md").read_text(encoding="utf-8")
    shown = re.findall(r"\]\(\.\./images/([\w-]+\.png)\)", text)
    assert shown == ["scaling-width.png", "memory.png"]
    assert all(source in (ROOT / "docs" / "images" / name).read_bytes() for name in shown)


def test_the_guides_exponents_are_those_of_the_stored_scaling_run():
    text = (ROOT / "docs" / "guides" / "wide.md").read_text(encoding="utf-8")
    table = [
        line.split("|")[2]
        for line in text.splitlines()
        if line.startswith(("| width,", "| tok", "| feat", "| SAEs", "| thr"))
    ]
    shown = [[float(n) for n in re.findall(r"-?\d\.\d+", cell.replace("\N{MINUS SIGN}", "-"))] for cell in table]
    stored = json.loads((ROOT / "benchmarks" / "measured" / "scaling.json").read_text())["exponents"]
    flat = [e["exponent"] for e in stored]
    # this package's and eager's in turn; widths come as one pair a number of tokens
    assert [n for pair in shown for n in pair] == [pytest.approx(e, abs=0.00501) for e in flat]
