"""The screen's numbers and names: C++ (csrc/cpu/screen_terms.h), ops.screen_terms and docs/how/screen.md agree."""

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gemmascope_fast.ops import screen_terms
from gemmascope_fast.ops.encode import kappa
from gemmascope_fast.ops.screen_terms import Row

ROOT = Path(__file__).resolve().parents[2]
HEADER = (ROOT / "csrc/cpu/screen_terms.h").read_text(encoding="utf-8")
CODE = re.sub(r"//.*", "", HEADER)
PAGE = (ROOT / "docs/how/screen.md").read_text(encoding="utf-8")
SIZES = [1, 15, 16, 17, 64, 640, 2304, 16_384, 16_385, 66_000]
DIRECTIONS = [0, 1, 4, 128]
FUNCTIONS = {
    "table_stride": [(n,) for n in SIZES],
    "dot_kappa": [(n,) for n in SIZES],
    "direction_steps": [(k,) for k in DIRECTIONS],
    "token_steps": [(k,) for k in DIRECTIONS],
    "start_steps": [(k,) for k in DIRECTIONS],
    "coefficient_steps": [(k, root) for k in DIRECTIONS for root in (1.0, 11.5)],
}


def python_name(name):
    """kTokenSteps → TOKEN_STEPS."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[1:]).upper()


def constants_of_the_header():
    return re.findall(r"constexpr \w+ (k\w+) =", CODE)


def python_constants():
    return {name: value for name, value in vars(screen_terms).items() if name.isupper()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What a program that includes the header says: the values of its constants and functions."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    say = [f'std::printf("{name} %a\\n", (double)gsf::{name});' for name in constants_of_the_header()]
    for name, calls in FUNCTIONS.items():
        for arguments in calls:
            given = ", ".join(map(repr, arguments))
            say.append(f'std::printf("{name}({given}) %a\\n", (double)gsf::{name}({given}));')
    folder = tmp_path_factory.mktemp("terms")
    source, program = folder / "terms.cpp", folder / "terms"
    lines = "\n".join(say)
    source.write_text(
        f'#include <cstdio>\n#include "cpu/screen_terms.h"\nint main() {{\n{lines}\n}}\n', encoding="utf-8"
    )
    subprocess.run([compiler, "-std=c++17", "-I", str(ROOT / "csrc"), str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    pairs = (line.rsplit(" ", 1) for line in said.splitlines())
    return {name: float.fromhex(value) for name, value in pairs}


def test_constants_are_the_same_in_both_languages(compiled):
    in_cpp = {python_name(name): compiled[name] for name in constants_of_the_header()}
    in_python = {name: value for name, value in python_constants().items() if not name.startswith("GPU_")}
    assert len(in_cpp) > 20
    assert in_cpp == in_python


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_same_in_both_languages(compiled, name):
    for arguments in FUNCTIONS[name]:
        given = ", ".join(map(repr, arguments))
        assert compiled[f"{name}({given})"] == getattr(screen_terms, name)(*arguments)


def test_every_function_of_the_header_is_compared():
    assert set(re.findall(r"constexpr \w+ (\w+)\(", CODE)) == set(FUNCTIONS)


def test_the_op_has_the_same_kappa():
    assert [kappa(d) for d in SIZES] == [screen_terms.dot_kappa(d) for d in SIZES]


def members(enum):
    """Names of a C++ enum of the header in order, with their values."""
    body, found, value = re.search(rf"enum {enum} : int {{(.*?)}}", CODE, re.DOTALL)[1], {}, -1
    for name, given in re.findall(r"(k\w+)(?: = (\d+))?", body):
        value = int(given) if given else value + 1
        found[name] = value
    return found


def test_rows_of_the_table_are_the_same():
    rows = members("ScreenRow")
    assert rows.pop("kScreenRows") == len(Row)
    assert {python_name(name): value for name, value in rows.items()} == {row.name: row.value for row in Row}


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def number(text):
    """1 + 8u, 2⁻¹²⁵, 9.1·10⁻¹³, 66,000 → their values."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"**({m[0].translate(SUPERSCRIPTS)})", text)
    text = re.sub(r"(?<=\d)u", "*u", text).replace("·", "*").replace(",", "")
    assert re.fullmatch(r"[\du.*+() -]+", text), text
    return eval(text, {"__builtins__": {}, "u": screen_terms.U})  # a page of this repository, digits and operators


def test_the_page_names_every_number():
    listed = dict(re.findall(r"^\| `([A-Z]\w*)` \| ([^|]+?) \|", PAGE, re.MULTILINE))
    derived = {"TILE_ROWS", "TILE_COLUMNS", "TILE_STEP", "TABLE_LINE"}  # layout, not part of the bound
    assert set(listed) == set(python_constants()) - derived
    for name, said in listed.items():
        assert math.isclose(number(said), python_constants()[name], rel_tol=1e-15), name
