"""`inilora inspect`: what is in a factor file."""

from __future__ import annotations

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
