"""The pictures of README and tutorial, `make gallery`: pages of this package, photographed by headless Chromium.

    python scripts/gallery.py [FOLDER, default docs/images]

Writes demo.png (what `gemmascope-fast demo --html` shows), feature.png (a page of `gemmascope-fast dashboard`) and
gallery.json, the figures that they show.  Each picture carries a hash of that file: they belong to one run.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import gemmascope_fast as gsf
from gemmascope_fast.analysis.reading import Reading, read_text
from gemmascope_fast.analysis.reading_page import render
from gemmascope_fast.cli.main import main as gemmascope_fast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import chromium  # noqa: E402 - of the tests

FEATURE = 1383  # the tutorial's
COLOURS = 64  # of a picture: text and one shade


def sentences() -> dict[str, list[str]]:
    """The tutorial's `money` and `other`."""
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(money = \[.*?)^```", tutorial, flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    return {name: found[name] for name in ("money", "other")}


def demo_page(money: list[str], other: list[str]) -> tuple[str, dict[str, Any]]:
    """(the page of a text of three sentences, shaded by the feature; the figures of it)."""
    model, tokenizer, sae, layer = gsf.load_demo()
    text = " ".join([other[0], money[0], other[9]])
    reading = read_text(model, tokenizer, sae, layer, text, model_name="Gemma 3 270M")
    chosen = f'<script>$("feature").value = {FEATURE}; choose({FEATURE});</script>'
    return render(reading).replace("</body>", f"{chosen}</body>"), shown(reading)


def shown(reading: Reading) -> dict[str, Any]:
    values = reading.latents.to_dense()[:, FEATURE]
    figures = {key: reading.figures[key] for key in ("tokens", "l0", "fvu", "delta_loss")}
    return {
        **figures,
        "text": "".join(reading.pieces[1:]).strip(),
        "feature": FEATURE,
        "fires_on": int((values > 0).sum()),
        "maximum": float(values.max()),
    }


def feature_page(folder: Path, texts: list[str]) -> Path:
    """The feature's page, made by the tutorial's commands."""
    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    for command in (
        ["extract", "--text", str(folder / "text.txt"), "--split", "line", "--out", str(folder / "latents")],
        ["dashboard", "--latents", str(folder / "latents"), "--out", str(folder / "site")],
    ):
        if gemmascope_fast(command):
            raise SystemExit(f"gemmascope-fast {' '.join(command)} failed")
    return folder / "site" / "feature" / f"{FEATURE}.html"


def photograph(page: Path, picture: Path, size: tuple[int, int], digest: str) -> None:
    """The page's upper part as a PNG of few colours that carries the digest."""
    with tempfile.TemporaryDirectory() as profile:
        chromium.screenshot(page, profile, picture, size)
    info = PngInfo()
    info.add_text("gallery.json", digest)
    small = Image.open(picture).convert("RGB").quantize(COLOURS)
    small.save(picture, optimize=True, pnginfo=info)


def main(out: Path) -> None:
    texts = sentences()
    page, figures = demo_page(**texts)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "demo.html").write_text(page, encoding="utf-8")
        feature = feature_page(folder, texts["money"] + texts["other"])
        stored = json.dumps({"demo": figures}, indent=2) + "\n"
        digest = hashlib.sha256(stored.encode()).hexdigest()
        (out / "gallery.json").write_text(stored, encoding="utf-8")
        photograph(folder / "demo.html", out / "demo.png", (900, 580), digest)
        photograph(feature, out / "feature.png", (900, 865), digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
