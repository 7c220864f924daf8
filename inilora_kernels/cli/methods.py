"""`inilora methods`: what --method and --solver take."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..initializations import METHODS


def methods_table() -> Table:
    """One row per initialization: what `--method` and `--solver` take, formula, source; and the convention for all."""
    result = Table(
        title="Initializations (--method)",
        caption="W x + s(BA − B₀A₀) x at the start is W x for all; s = lora_alpha/r. d×k = out×in, B: d×r, A: r×k.",
    )
    result.add_column("method", no_wrap=True)
    result.add_column("start of B and A", overflow="fold")
    result.add_column("solver, the default first", overflow="fold")
    result.add_column("source", overflow="fold")
    for name, method in METHODS.items():
        result.add_row(name, method.formula, ", ".join(filter(None, method.solvers)) or "none: random", method.source)
    return result


def methods_json() -> dict[str, Any]:
    """The table's content as JSON values."""
    return {
        name: {
            "formula": method.formula,
            "solvers": [solver for solver in method.solvers if solver],
            "source": method.source,
        }
        for name, method in METHODS.items()
    }
