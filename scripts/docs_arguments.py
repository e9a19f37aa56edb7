"""For the documentation's API page: the lines of a docstring that explain an argument or a field become a list.

Docstrings here say `name: what it is` or `one, other: what they are`, a line or more each; as Markdown these would run
together into one paragraph.  Only lines that begin with names of the function's parameters, or of the class's fields
and parameters, count.  mkdocs.yml names this file to mkdocstrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe

NAMED = re.compile(r"^(\w+(?:, \w+)*): (?=\S)")


class ArgumentLists(griffe.Extension):
    """Rewrites docstrings as they are collected."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, (p.name for p in func.parameters))

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        _rewrite(cls, (*cls.members, *(p.name for p in cls.parameters)))


def _rewrite(obj: griffe.Object, names: Iterable[str]) -> None:
    if obj.docstring is not None:
        obj.docstring.value = listed(obj.docstring.value, names)


def listed(text: str, names: Iterable[str]) -> str:
    """The text with its explanations as a Markdown list."""
    known, lines, inside = set(names), [], False
    for line in text.splitlines():
        found = NAMED.match(line)
        if found and set(found[1].split(", ")) <= known:
            if not inside:
                lines.append("")
            lines.append(f"- `{found[1]}`: {line[found.end() :]}")
            inside = True
            continue
        if not line.strip():
            inside = False
        elif inside and re.match(r"(Raises|Returns|Gives) ", line):
            lines.append("")
            inside = False
        lines.append(line)
    return "\n".join(lines)
