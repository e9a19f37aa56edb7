"""A user's type checker sees the public types: mypy --strict on code as users write it."""

from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")
ROOT = Path(__file__).parents[2]

# each `type: ignore` is an error that must be found: --strict complains about those that are not needed
CODE = """
import gemmascope_fast as gsf
from torch import nn

def run(model: nn.Module) -> float:
    sae = gsf.SAE.from_pretrained("demo")
    one = gsf.JumpReLUSAE.from_pretrained("demo")
    with gsf.attach(model, {12: one}, edits=gsf.Clamp(3, 5.0)) as found:
        pass
    with gsf.attach(model, {gsf.Site("resid", 3): one, gsf.Site("mlp", 3): one}, mode="splice"):
        pass
    with gsf.attach(model, [one, one], edits={12: [gsf.Ablate(3), gsf.Scale(4, 0.5)]}):
        pass
    gsf.attach(model, sae)
    gsf.attach(model, "demo")  # type: ignore[arg-type]
    gsf.attach(model, one, edits=3)  # type: ignore[arg-type]
    return float(one.threshold.max()) + len(found.tokens)
"""


# The package as in pyproject.toml, so that the cache of `make typecheck` serves; every option of --strict for the user.
CONFIG = """
[mypy]
python_version = 3.10
ignore_missing_imports = True
check_untyped_defs = True
exclude = gemmascope_fast/kernels/

[mypy-user]
disallow_any_generics = True
disallow_subclassing_any = True
disallow_untyped_calls = True
disallow_untyped_defs = True
disallow_incomplete_defs = True
disallow_untyped_decorators = True
warn_unused_ignores = True
warn_return_any = True
strict_equality = True
extra_checks = True

[mypy-gemmascope_fast]
implicit_reexport = False
"""


def test_the_public_api_is_typed(tmp_path):
    path, config = tmp_path / "user.py", tmp_path / "mypy.ini"
    path.write_text(CODE)
    config.write_text(CONFIG)
    out, err, status = api.run(["--config-file", str(config), "--cache-dir", str(ROOT / ".mypy_cache"), str(path)])
    assert status == 0, out + err
