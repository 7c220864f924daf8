"""`inilora methods`: what --method and --solver take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .arguments import Json

if TYPE_CHECKING:
    from ..initializations import Initialization


def methods(as_json: Json = False) -> None:
    """List the initializations that --method takes, with their formula and source."""
    from ..initializations import METHODS
    from .output import print_table

    if as_json:
        print(json.dumps(methods_json(METHODS), indent=2, ensure_ascii=False))
    else:
        print_table(methods_table(METHODS))


def methods_table(methods: Mapping[str, Initialization]) -> Table:
    """One row per initialization: what `--method` and `--solver` take, formula, source; and the convention for all."""
    result = Table(
        title="Initializations (--method)",
        caption="W x + s(BA − B₀A₀) x at the start is W x for all; s = lora_alpha/r. d×k = out×in, B: d×r, A: r×k.",
    )
    result.add_column("method", no_wrap=True)
    result.add_column("start of B and A", overflow="fold")
    result.add_column("solver, the default first", overflow="fold")
    result.add_column("source", overflow="fold")
    for name, method in methods.items():
        result.add_row(name, method.formula, ", ".join(filter(None, method.solvers)) or "none: random", method.source)
    return result


def methods_json(methods: Mapping[str, Initialization]) -> dict[str, Any]:
    """The table's content as JSON values."""
    return {
        name: {
            "formula": method.formula,
            "solvers": [solver for solver in method.solvers if solver],
            "source": method.source,
        }
        for name, method in methods.items()
    }
