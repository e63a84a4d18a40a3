"""For mkdocstrings: the library's docstrings as Markdown.

They are written to be read in the source and by ``help``, with a little reStructuredText: references such as
``:func:`name```, literal blocks behind ``::``, and asterisks that mean asterisks. What is returned is said in prose, as
its type is in the signature.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth):`([^`]+)`")
CODE = re.compile(r"(``.+?``|`[^`]+`)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and not obj.is_module:
            owner = obj if obj.is_class else obj.parent
            scope = f"ema_attention.{owner.name}." if owner.is_class else "ema_attention."
            obj.docstring.value = to_markdown(obj.docstring.value, scope)


def to_markdown(docstring: str, scope: str) -> str:
    """The docstring as Markdown; methods that it names are those of ``scope``."""
    lines: list[str] = []
    literal: int | None = None  # the indentation of the text that a literal block belongs to
    doctest = paragraph = False
    for line in docstring.splitlines():
        if line in ("Returns:", "Shape:"):
            lines += [f"**{line}**", ""]
            paragraph = True
            continue
        paragraph = paragraph and line[:1] in ("", " ")
        line = line[4:] if paragraph else line
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            while not lines[-1].strip():
                lines.pop()
            lines += [" " * literal + "```", ""]
            literal = None
        if literal is not None:
            lines.append(line[4:] if line.strip() else line)
            continue
        doctest = line.lstrip().startswith(">>>") or (doctest and bool(line.strip()))
        if doctest:
            lines.append(line)
        elif line.endswith("::"):
            literal = indent
            text = line.rstrip(":")
            lines += [prose(text + ":", scope) if text.strip() else "", "", " " * indent + "```text"]
        elif line.strip() == "Example:":
            lines.append(line.replace("Example:", "Examples:"))
        else:
            lines.append(prose(line, scope))
    if literal is not None:
        lines.append(" " * literal + "```")
    return "\n".join(lines)


def prose(line: str, scope: str) -> str:
    def reference(role: re.Match[str]) -> str:
        is_method = role[0].startswith(":meth:")
        return f"[`{role[1]}`][{scope if is_method else 'ema_attention.'}{role[1]}]"

    pieces = CODE.split(ROLE.sub(reference, line))
    pieces[::2] = [re.sub(r"(?<!\\)\*", r"\\*", piece) for piece in pieces[::2]]
    return "".join(pieces)
