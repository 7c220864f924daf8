"""`inilora approximate`: from a model to a factor file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..places import file_to_write
from .arguments import Every, Json, ModelPath, Plot, with_options


@with_options
def approximate(
    model: ModelPath,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="PATH", parser=file_to_write, help="The factor file to write (.safetensors)."
        ),
    ],
    plot: Plot = None,
    every: Every = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Factorize a model's weights and write the factor file."""
    from .running import run

    run(model, output, plot, given, every=every, as_json=as_json)
