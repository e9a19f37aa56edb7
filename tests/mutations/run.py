"""Break the code on purpose, one line at a time, in a copy; the tests must fail each time.

    python tests/mutations/run.py [--only WORD] [--python | --cpp]

Exit status 1 where a break went unnoticed or an entry no longer matches the code it names.  Lines for an instruction
set that this machine lacks are named and not tried.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import CPP, PYTHON, Mutation

from gemmascope_fast import backends

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "csrc",
    "gemmascope_fast",
    "kernels",
    "tests",
    "benchmarks",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def copy_tree(to: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "node_modules")
            shutil.copytree(source, to / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, to / name)


def build(where: Path) -> bool:
    env = {**os.environ, "GSF_REQUIRE_EXT": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
    return done.returncode == 0


def run_tests(where: Path, tests: str) -> int:
    """pytest's exit status: 0 passed, 1 failed; anything else is an error of this script or of the collection."""
    env = {**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        print(done.stdout[-2000:], done.stderr[-2000:])
    # a crash of the process (a signal) is a failure noticed
    return 1 if done.returncode < 0 else done.returncode


def try_one(where: Path, mutation: Mutation, rebuild: bool) -> str:
    """'noticed', 'SURVIVED', or what went wrong."""
    path = where / mutation.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        return f"STALE: stands {original.count(mutation.old)} times in {mutation.file}"
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        if rebuild and not build(where):
            return "DOES NOT BUILD"
        status = run_tests(where, mutation.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    return {0: "SURVIVED", 1: "noticed"}.get(status, f"pytest ended with {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name or file contains this")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--python", action="store_true")
    kinds.add_argument("--cpp", action="store_true")
    args = parser.parse_args()
    chosen = [(m, True) for m in CPP if not args.python] + [(m, False) for m in PYTHON if not args.cpp]
    chosen = [(m, cpp) for m, cpp in chosen if args.only in m.name or args.only in m.file]
    if not chosen:
        parser.error(f"--only: nothing is called {args.only!r}")
    here = backends.supported_isas()
    for mutation in (m for m, _ in chosen if m.needs and m.needs not in here):
        print(f"not tried, no {mutation.needs} here: {mutation.name}")
    chosen = [(m, cpp) for m, cpp in chosen if not m.needs or m.needs in here]
    if not chosen:
        return 0
    bad = 0
    with tempfile.TemporaryDirectory(prefix="gsf-mutations-") as folder:
        where = Path(folder)
        copy_tree(where)
        whole = " ".join(sorted({m.tests for m, _ in chosen}))
        if not build(where) or run_tests(where, whole) != 0:
            print("the unbroken code does not build or does not pass")
            return 1
        # Python first: after a C++ mutation the copy holds a broken extension until the next build
        for mutation, cpp in sorted(chosen, key=lambda pair: pair[1]):
            begin = time.perf_counter()
            outcome = try_one(where, mutation, cpp)
            bad += outcome != "noticed"
            print(f"{outcome:10} {mutation.file}: {mutation.name}  ({time.perf_counter() - begin:.0f} s)", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} breaks noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
