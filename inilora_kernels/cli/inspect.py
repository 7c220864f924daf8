"""`inilora inspect`: what is in a factor file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
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
    if base is not None and not file.is_dir():
        raise OptionError(
            f"{file}: --base is for an authors' folder; a factor file has its own certificates, and is compared with a "
            f"model by inilora export"
        )
    factors = FactorSet.load(file, base)
    draw(factors, plot, base or file)
    if plot is not None:
        say(f"wrote {plot}")
    show([factors], as_json, every)
    spectrum = None if as_json else spectrum_table(factors, every=every)
    if spectrum is not None:
        print_table(spectrum)
