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


def test_the_public_api_is_typed(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(CODE)
    options = ["--strict", "--ignore-missing-imports", "--cache-dir", str(ROOT / ".mypy_cache")]
    out, err, status = api.run([*options, "--follow-imports=silent", str(path)])
    assert status == 0, out + err
