"""`inilora inspect` and `inilora methods`: what is in a factor file, and which initializations there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..model.location import located
from .arguments import Every, FactorFile, Json, Plot


def inspect(
    file: FactorFile,
    base: Annotated[
        Path | None,
        typer.Option(metavar="PATH", parser=located, help="For an authors' folder: the model, to compare with."),
    ] = None,
    plot: Plot = None,
    every: Every = False,
    as_json: Json = False,
) -> None:
    """Show what is in a factor file, how good it is, and the singular spectrum."""
    from ..display.tables import spectrum_table
    from ..factor_set import FactorSet
    from .output import draw, print_table, require_plot, say, show

    require_plot(plot)
    factors = FactorSet.load(file, base)
    draw(factors, plot, base or file)
    if plot is not None:
        say(f"wrote {plot}")
    show([factors], as_json, every)
    spectrum = spectrum_table(factors, every=every)
    if spectrum is not None and not as_json:
        print_table(spectrum)


def methods(as_json: Json = False) -> None:
    """List the initializations that --method takes, with their formula and source."""
    from .methods import methods_json, methods_table
    from .output import print_table

    if as_json:
        print(json.dumps(methods_json(), indent=2, ensure_ascii=False))
    else:
        print_table(methods_table())
