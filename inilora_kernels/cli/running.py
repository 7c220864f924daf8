"""What `inilora approximate` does: refuse what can't be written, run, write the files, show the tables."""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..approximate import approximate_each
from ..errors import OptionError
from ..model.layout import find_components
from ..options import ModelOptions
from ..processes import torchruns_job
from ..storage.atomic import require_writable
from ..storage.reading import absolute, reporting
from .arguments import options_from
from .output import draw, require_plot, say, show


def run(model: Path, output: Path, plot: Path | None, given: dict[str, Any], *, every: bool, as_json: bool) -> None:
    """Factorize a model and write the factor file; in a job of several processes, rank 0 writes it.

    given: the options as typed.
    """
    with torchruns_job() as job:
        if job.rank:
            # Rank 0 checks the outputs, shows the result and writes it.
            warnings.simplefilter("ignore")
            approximate_each(model, ModelOptions(**options_from(given)))
        else:
            _approximate(model, output, plot, given, every=every, as_json=as_json)


def _approximate(
    model: Path, output: Path, plot: Path | None, given: dict[str, Any], *, every: bool, as_json: bool
) -> None:
    options = options_from(given)
    ranks = options["rank"]
    outputs = {one: _of_rank(output, one) for one in ranks} if isinstance(ranks, list) else {0: output}
    plots = {one: _of_rank(plot, one) if one and plot else plot for one in outputs}
    with reporting(model):
        inputs = [file for part in find_components(model) for file in part.files] if os.path.exists(model) else []
    if given["start"] is not None:
        inputs.append(given["start"])
    for one, path in outputs.items():
        picture = plots[one]
        _require_no_input(path, inputs)
        require_writable(path)
        if picture is not None:
            _require_no_input(picture, [*inputs, path])
        require_plot(picture)
    first = next(iter(outputs.values()))
    try:
        results = approximate_each(model, ModelOptions(**options), functools.partial(require_writable, first))
    except KeyboardInterrupt as interrupted:
        print(f"inilora: {str(interrupted) or 'stopped before any matrix was solved'}", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGINT) from None
    for one, factors in results.items():
        factors.save(outputs[one])
        draw(factors, plots[one], model)
    show(list(results.values()), as_json, every)
    if not as_json:
        for path in outputs.values():
            say(f"wrote {path}")


def _of_rank(path: Path, rank: int) -> Path:
    """factors.safetensors → factors-r8.safetensors."""
    return path.with_name(f"{path.stem}-r{rank}{path.suffix}")


def _require_no_input(path: Path, inputs: Sequence[Path]) -> None:
    """Raise OptionError if an output would overwrite the model, or the plot the factors."""
    if absolute(path) in {absolute(one) for one in inputs}:
        raise OptionError(f"{path}: this run reads or writes that file already; give another name")
