"""Docstrings as this repository writes them, made Markdown: `name: meaning` lines a list, doctests a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"([a-z_]\w*(?:, \w+)*|[A-Z]): +(\S.*)")


class Markdown(griffe.Extension):
    """Docstrings as Markdown; and `options: ModelOptions` as the keywords that callers give in its place."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        func.name = func.name.removeprefix("_")  # approximate is _approximate with its types
        for parameter in func.parameters:
            if parameter.name == "options" and str(parameter.annotation).endswith("Options"):
                parameter.kind = griffe.ParameterKind.var_keyword
                parameter.annotation = None

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A list item for each `name: meaning`, its continuation indented under it; the rest as it is."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in re.split(r"\n\s*\n", text.strip("\n")))


def _paragraph(text: str) -> str:
    if text.lstrip().startswith(">>>"):
        return f"```pycon\n{text}\n```"
    if text.startswith("    "):
        return text  # a formula, set as code
    lines = _plain(text).split("\n")
    return "\n".join(
        f"{chr(10) if place and not _is_entry(lines, place) else ''}- **{entry[1]}**: {entry[2]}"
        if (entry := _ENTRY.fullmatch(line))
        else line
        for place, line in enumerate(lines)
    )


def _plain(text: str) -> str:
    """Mathematics outside backticks taken literally: f* and σ_i are no emphasis, [B][A] is no link."""
    parts = text.split("`")
    return "`".join(part if place % 2 else re.sub(r"[*_\[]", r"\\\g<0>", part) for place, part in enumerate(parts))


def _is_entry(lines: list[str], place: int) -> bool:
    """Whether the line before belongs to a list already."""
    before = lines[place - 1]
    return bool(_ENTRY.fullmatch(before)) or before.startswith("    ")
