"""The HTML page of one reading, self-contained: it needs no network and no other file."""

from __future__ import annotations

import json
from typing import Any

from gemmascope_fast.analysis.reading import Reading


def render(reading: Reading) -> str:
    """The page as text: tokens shaded by a chosen feature, top features on hover, activation histogram, figures."""
    import jinja2

    from gemmascope_fast.analysis.reading import LABELS, TIMES

    figures = [(label, _shown(reading.figures[key])) for key, label in LABELS.items()]
    figures += [
        (f"time per token, {label}", f"{reading.figures['ms_per_token'][k]:.3f} ms") for k, label in TIMES.items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gemmascope_fast.analysis"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    # "<" is escaped, so that a text with </script> does not end the script
    data = json.dumps(page_data(reading), allow_nan=False).replace("<", "\\u003c")
    return environment.get_template("demo.html").render(figures=figures, data=data, run=reading.figures)


def page_data(reading: Reading) -> dict[str, Any]:
    """tokens: [{piece, content, f: [feature…], v: [activation…]}], strongest first."""
    crow = reading.latents.crow_indices.tolist()
    col, values = reading.latents.col_indices.tolist(), reading.latents.values.tolist()
    tokens = []
    for i, piece in enumerate(reading.pieces):
        pairs = sorted(zip(values[crow[i] : crow[i + 1]], col[crow[i] : crow[i + 1]], strict=True), reverse=True)
        tokens.append(
            {
                "piece": piece,
                "content": reading.content[i],
                "f": [f for _, f in pairs],
                "v": [round(v, 3) for v, _ in pairs],
            }
        )
    return {"tokens": tokens}


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
