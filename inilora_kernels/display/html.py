"""Tables for a notebook."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

_PRE = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.25; font-family: monospace">{code}</pre>'


def as_html(table: Table, width: int = 100) -> str:
    """HTML that shows a table as a terminal of that width would; it needs no style sheet."""
    console = Console(markup=False, record=True, file=io.StringIO(), width=width, force_jupyter=False)
    console.print(table)
    return console.export_html(inline_styles=True, code_format=_PRE)
