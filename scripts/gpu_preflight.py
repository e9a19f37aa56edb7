"""What `make gpu` needs before it starts: a device, the package with both extensions, pytest.

Run outside the source tree, so that the package that is imported is the one that is installed.  Prints where it lies;
status 2 with a line for everything that is missing.
"""

import importlib
import sys

TESTS = ("pytest", "pytest_timeout", "pytest_benchmark")  # pyproject.toml's options for pytest need the last two


def problems() -> list[str]:
    import torch

    found = [] if torch.cuda.is_available() else ["expected a CUDA device that torch can use, found none"]
    try:
        package = importlib.import_module("gemmascope_fast")
    except ImportError as error:
        return [*found, f"gemmascope_fast cannot be imported: {error}"]
    print(f"gemmascope_fast {package.__version__} in {package.__file__}; torch {torch.__version__}")
    for name in ("_C", "_C_cuda"):
        try:
            print(importlib.import_module(f"gemmascope_fast.{name}").__file__)
        except ImportError as error:
            found.append(f"gemmascope_fast.{name} is missing, build it with `make wheel-cuda`: {error}")
    missing = [name.replace("_", "-") for name in TESTS if importlib.util.find_spec(name) is None]
    return found + ([f"not installed: {', '.join(missing)} (the extra `test` has them)"] if missing else [])


if __name__ == "__main__":
    found = problems()
    for line in found:
        print(f"make gpu: {line}", file=sys.stderr)
    raise SystemExit(2 if found else 0)
