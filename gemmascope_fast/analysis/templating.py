"""The jinja2 environment of all pages, and data for their scripts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any


@cache
def environment() -> Any:
    """Templates of gemmascope_fast/analysis/templates: escaped, and an undefined name is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("gemmascope_fast.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """Render the template to text."""
    return environment().get_template(template).render(**values)


def script_data(value: Any) -> str:
    """JSON for a <script> element: "<" is escaped, so that a text with </script> does not end the script."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
